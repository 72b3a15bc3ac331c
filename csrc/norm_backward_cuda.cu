// The gradient of norm + rotary on an NVIDIA GPU: of queries, keys and the norms' weights in one launch.
#include <cuda_runtime.h>

#include <initializer_list>

#include "norm_backward_threads.h"
#include "row_sum.h"

namespace rope {
namespace {

// 128 registers a thread: a multiprocessor has room for four blocks, as native.py counts them.
template <typename T, bool Interleaved, int N, bool Joint>
__global__ void __launch_bounds__(kNormThreads, 4)
    norm_backward_kernel(const __grid_constant__ Call call, const __grid_constant__ Norms norms,
                         const __grid_constant__ Gradients gradients) {
  using Thread = GradientThread<T, Interleaved, N, Joint>;
  extern __shared__ float shared[];
  __shared__ float parts[kNormThreads];
  const int column = threadIdx.x, columns = blockDim.x, row = threadIdx.y, rows = blockDim.y;
  const Share share(call, norms, gradients, static_cast<int>(blockIdx.x), rows);
  const int64_t tokens = call.batch * call.length;
  const int heads = static_cast<int>(share.x.heads);
  typename Thread::Sums sums(call, share, row * columns + column, columns, rows, shared);
  sums.clear();
  __syncthreads();
  if (!Joint || !share.norm.joint) {
    const int own = row / share.heads;
    if (own < share.tokens) {
      const int64_t step = static_cast<int64_t>(share.blocks) * share.tokens;
      const int64_t first = static_cast<int64_t>(share.block) * share.tokens + own;
      for (int64_t token = first; token < tokens; token += step) {
        Thread thread(call, norms, share, token, column, columns);
        for (int head = row % share.heads; head < heads; head += share.heads) {
          const float sum = row_sum(thread.begin(head, &sums));
          thread.end(head, sum / static_cast<float>(call.head_dim));
        }
      }
      sums.flush();
    }
  } else {
    for (int64_t token = share.block; token < tokens; token += share.blocks) {
      Thread thread(call, norms, share, token, column, columns);
      float sum = 0.0f;
      for (int head = row; head < heads; head += rows) sum += thread.begin(head, &sums);
      sum = row_sum(sum);
      __syncthreads();  // parts is read of the token before
      if (column == 0) parts[row] = sum;
      __syncthreads();
      sum = 0.0f;
      for (int other = 0; other < rows; ++other) sum += parts[other];
      const float mean = sum / static_cast<float>(share.x.heads * call.head_dim);
      // Read again, from the first cache.
      for (int head = row; head < heads; head += rows) {
        thread.begin(head, nullptr);
        thread.end(head, mean);
      }
    }
  }
  __syncthreads();
  sums.finish();
}

struct GradientOnStream {
  const Call& call;
  const Norms& norms;
  const Gradients& gradients;
  cudaStream_t stream;

  template <typename T, bool Interleaved, int N, bool Joint>
  int run(const Shape& shape, int64_t bytes) {
    const dim3 block(static_cast<unsigned>(shape.columns), static_cast<unsigned>(shape.rows));
    const unsigned blocks = static_cast<unsigned>(gradients.q.blocks + gradients.k.blocks);
    norm_backward_kernel<T, Interleaved, N, Joint>
        <<<blocks, block, static_cast<size_t>(bytes), stream>>>(call, norms, gradients);
    return static_cast<int>(cudaGetLastError());
  }
};

}  // namespace
}  // namespace rope

// The backward pass on a stream of the current device. Returns a cudaError_t, or a negative rope::Status.
ROPE_EXPORT int rope_dist_cuda_norm_rotary_backward(const rope::Call* call, const rope::Norms* norms,
                                                    const rope::Gradients* gradients, cudaStream_t stream) {
  rope::GradientOnStream launch{*call, *norms, *gradients, stream};
  return rope::choose_gradient(*call, *norms, *gradients, launch);
}
