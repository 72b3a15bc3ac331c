// The rotation on an NVIDIA GPU: queries and keys in one launch, by tables or by positions, and with a bias added
// first where a matrix product (quantised or not) left it out.
#include <cuda_runtime.h>

#include <initializer_list>

#include "rotary_threads.h"

#define ROPE_TEXT_OF(...) #__VA_ARGS__
#define ROPE_TEXT(...) ROPE_TEXT_OF(__VA_ARGS__)

namespace rope {
namespace {

template <typename T, bool In, bool Out, int N, bool Bias>
__global__ void __launch_bounds__(128) rotary_kernel(const __grid_constant__ Call call) {
  rotate_thread<T, In, Out, N, Bias>(call, blockIdx.x, threadIdx.x, threadIdx.y, blockDim.x, blockDim.y);
}

struct OnStream {
  const Call& call;
  cudaStream_t stream;

  template <typename T, bool In, bool Out, int N, bool Bias>
  int run() {
    const Shape shape = shape_of(call, N);
    const dim3 block(static_cast<unsigned>(shape.columns), static_cast<unsigned>(shape.rows));
    const unsigned tokens = static_cast<unsigned>(call.batch * call.length);
    rotary_kernel<T, In, Out, N, Bias><<<tokens, block, 0, stream>>>(call);
    return static_cast<int>(cudaGetLastError());
  }
};

}  // namespace
}  // namespace rope

ROPE_EXPORT int rope_dist_cuda_abi() { return ROPE_ABI; }

// Compiler, for `rope-dist info`.
ROPE_EXPORT const char* rope_dist_cuda_build() {
  return "nvcc " ROPE_TEXT(__CUDACC_VER_MAJOR__) "." ROPE_TEXT(__CUDACC_VER_MINOR__);
}

// Compute capabilities there is code for, as "800,900"; the last is there as PTX too.
ROPE_EXPORT const char* rope_dist_cuda_architectures() { return ROPE_TEXT(__CUDA_ARCH_LIST__); }

// Rotates q and k on a stream of the current device. Returns a cudaError_t, or a negative rope::Status.
ROPE_EXPORT int rope_dist_cuda_rotary(const rope::Call* call, cudaStream_t stream) {
  rope::OnStream launch{*call, stream};
  return rope::choose(*call, launch);
}

ROPE_EXPORT const char* rope_dist_cuda_error(int status) {
  if (status < 0) return "unsupported arguments";
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
