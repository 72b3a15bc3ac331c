// The GPU kernel's threads one after another on the CPU, behind the CPU launcher's interface: the tests load this
// where no GPU is, and compare it with the reference. It is no part of an installation.
#include <initializer_list>

static int64_t misaligned;
#if !defined(__CUDA_ARCH__)  // it is compiled for a GPU as well
#define ROPE_ON_ACCESS(address, bytes) misaligned += reinterpret_cast<uintptr_t>(address) % (bytes) != 0
#endif
#include "rotary_threads.h"

namespace {

struct OnHost {
  const rope::Call& call;

  template <typename T, bool In, bool Out, int N, bool Bias>
  int run() {
    const rope::Shape shape = rope::shape_of(call, N);
    for (int64_t token = 0; token < call.batch * call.length; ++token) {
      for (int row = 0; row < shape.rows; ++row) {
        for (int column = 0; column < shape.columns; ++column) {
          rope::rotate_thread<T, In, Out, N, Bias>(call, token, column, row, shape.columns, shape.rows);
        }
      }
    }
    return misaligned ? 1000 : rope::kDone;
  }
};

}  // namespace

ROPE_EXPORT int rope_dist_cpu_abi() { return ROPE_ABI; }

ROPE_EXPORT const char* rope_dist_cpu_build() { return "the GPU kernel's threads, on the host"; }

ROPE_EXPORT int rope_dist_cpu_rotary(const rope::Call* call, int64_t) {
  misaligned = 0;
  OnHost launch{*call};
  return rope::choose(*call, launch);
}
