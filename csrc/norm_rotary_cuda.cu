// RMS norm and rotation on an NVIDIA GPU: queries and keys in one launch, each read and written once.
#include <cuda_runtime.h>

#include <initializer_list>

#include "norm_rotary_threads.h"
#include "row_sum.h"

namespace rope {
namespace {

template <typename T, bool Interleaved, int N>
__global__ void __launch_bounds__(kNormThreads, 6)
    norm_kernel(const __grid_constant__ Call call, const __grid_constant__ Norms norms) {
  __shared__ float sums[kNormThreads];
  const int row = threadIdx.y, rows = blockDim.y;
  NormThread<T, Interleaved, N> thread(call, norms, blockIdx.x, threadIdx.x, blockDim.x);
  const int64_t heads = call.q.heads + call.k.heads;
  for (int64_t head = row; head < heads; head += rows) {
    const bool query = head < call.q.heads;
    const Heads& x = query ? call.q : call.k;
    const Norm& norm = query ? norms.q : norms.k;
    if (norm.joint) continue;
    const int64_t own = query ? head : head - call.q.heads;
    const float squares = row_sum(thread.begin(x, own));
    thread.end(x, norm, own, reciprocal_norm(squares, call.head_dim, norms.eps));
  }
  for (int which = 0; which < 2; ++which) {
    const Heads& x = which == 0 ? call.q : call.k;
    const Norm& norm = which == 0 ? norms.q : norms.k;
    if (!norm.joint) continue;
    float squares = 0.0f;
    for (int64_t head = row; head < x.heads; head += rows) squares += thread.begin(x, head);
    squares = row_sum(squares);
    __syncthreads();  // sums is read of the queries
    if (threadIdx.x == 0) sums[row] = squares;
    __syncthreads();
    squares = 0.0f;
    for (int other = 0; other < rows; ++other) squares += sums[other];
    const float rstd = reciprocal_norm(squares, x.heads * call.head_dim, norms.eps);
    // Read again, from the first cache.
    for (int64_t head = row; head < x.heads; head += rows) {
      thread.read_first(x, head);
      thread.end(x, norm, head, rstd);
    }
  }
}

struct NormOnStream {
  const Call& call;
  const Norms& norms;
  cudaStream_t stream;

  template <typename T, bool Interleaved, int N>
  int run() {
    const Shape shape = norm_shape(call, N);
    const dim3 block(static_cast<unsigned>(shape.columns), static_cast<unsigned>(shape.rows));
    const unsigned tokens = static_cast<unsigned>(call.batch * call.length);
    norm_kernel<T, Interleaved, N><<<tokens, block, 0, stream>>>(call, norms);
    return static_cast<int>(cudaGetLastError());
  }
};

}  // namespace
}  // namespace rope

// Normalises and rotates q and k on a stream of the current device. Returns a cudaError_t, or a negative rope::Status.
ROPE_EXPORT int rope_dist_cuda_norm_rotary(const rope::Call* call, const rope::Norms* norms,
                                           cudaStream_t stream) {
  rope::NormOnStream launch{*call, *norms, stream};
  return rope::choose_norm(*call, *norms, nullptr, launch);
}
