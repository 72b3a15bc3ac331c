// As threads_on_host.cu for norm + rotary: the threads of a block in two rounds, with their sums between.
#include <initializer_list>
#include <vector>

static int64_t misaligned;
#if !defined(__CUDA_ARCH__)  // it is compiled for a GPU as well
#define ROPE_ON_ACCESS(address, bytes) misaligned += reinterpret_cast<uintptr_t>(address) % (bytes) != 0
#endif
#include "norm_rotary_threads.h"

namespace {

// As the shuffles of norm_rotary_cuda.cu.
float row_sum(std::vector<float> values) {
  for (size_t distance = values.size() / 2; distance > 0; distance /= 2) {
    const std::vector<float> before = values;
    for (size_t i = 0; i < values.size(); ++i) values[i] = before[i] + before[i ^ distance];
  }
  return values[0];
}

struct OnHost {
  const rope::Call& call;
  const rope::Norms& norms;

  template <typename T, bool Interleaved, int N>
  int run() {
    const rope::Shape shape = rope::norm_shape(call, N);
    for (int64_t token = 0; token < call.batch * call.length; ++token) {
      std::vector<rope::NormThread<T, Interleaved, N>> row;
      for (int column = 0; column < shape.columns; ++column)
        row.emplace_back(call, norms, token, column, shape.columns);
      for (int which = 0; which < 2; ++which) {
        const rope::Heads& x = which == 0 ? call.q : call.k;
        const rope::Norm& norm = which == 0 ? norms.q : norms.k;
        std::vector<float> sums(shape.rows);
        for (int64_t head = 0; head < x.heads; ++head) {
          std::vector<float> parts;
          for (auto& thread : row) parts.push_back(thread.begin(x, head));
          // All that a row has read is read by every thread before one writes.
          const float squares = row_sum(parts);
          if (norm.joint) {
            sums[head % shape.rows] += squares;
            continue;
          }
          for (auto& thread : row) {
            thread.end(x, norm, head, rope::reciprocal_norm(squares, call.head_dim, norms.eps));
          }
        }
        if (!norm.joint) continue;
        float squares = 0.0f;
        for (float sum : sums) squares += sum;
        for (int64_t head = 0; head < x.heads; ++head) {
          for (auto& thread : row) {
            thread.read_first(x, head);
            thread.end(x, norm, head, rope::reciprocal_norm(squares, x.heads * call.head_dim, norms.eps));
          }
        }
      }
    }
    return misaligned ? 1000 : rope::kDone;
  }
};

}  // namespace

ROPE_EXPORT int rope_dist_cpu_norm_rotary(const rope::Call* call, const rope::Norms* norms, int64_t) {
  misaligned = 0;
  OnHost launch{*call, *norms};
  return rope::choose_norm(*call, *norms, nullptr, launch);
}
