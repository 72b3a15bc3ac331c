// As threads_on_host.cu for norm + rotary and its gradient: the threads of a block in rounds, with their sums between.
#include <cmath>
#include <initializer_list>
#include <vector>

static int64_t misaligned;
#if !defined(__CUDA_ARCH__)  // it is compiled for a GPU as well
#define ROPE_ON_ACCESS(address, bytes) misaligned += reinterpret_cast<uintptr_t>(address) % (bytes) != 0
#endif
#include "norm_backward_threads.h"

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

// As norm_backward_kernel.
struct GradientOnHost {
  const rope::Call& call;
  const rope::Norms& norms;
  const rope::Gradients& gradients;

  template <typename T, bool Interleaved, int N, bool Joint>
  int run(const rope::Shape& shape, int64_t bytes) {
    using Thread = rope::GradientThread<T, Interleaved, N, Joint>;
    constexpr size_t kMargin = 4096;
    const int64_t blocks = gradients.q.blocks + gradients.k.blocks, tokens = call.batch * call.length;
    if (bytes + sizeof(float) * rope::kNormThreads > 48 * 1024) return 1001;
    if (shape.columns * shape.rows > rope::kNormThreads) return 1002;
    for (int index = 0; index < blocks; ++index) {
      // What was not cleared spreads as NaN, what is written past the end is seen.
      const size_t room = static_cast<size_t>(bytes) / sizeof(float);
      std::vector<float> shared(room + kMargin, NAN);
      const rope::Share share(call, norms, gradients, index, shape.rows);
      std::vector<typename Thread::Sums> sums;
      for (int i = 0; i < shape.columns * shape.rows; ++i)
        sums.emplace_back(call, share, i, shape.columns, shape.rows, shared.data());
      for (auto& own : sums) own.clear();
      const int64_t at_once = share.tokens, step = share.blocks * at_once;
      for (int64_t first = share.block * at_once; first < tokens; first += step) {
        for (int64_t token = first; token < tokens && token < first + at_once; ++token) {
          // Heads of a row one after the other, rows of a token likewise.
          const bool joint = share.norm.joint != 0;
          std::vector<float> parts(static_cast<size_t>(shape.rows));
          for (int round = 0; round < 1 + joint; ++round) {
            float mean = 0.0f;
            for (float part : parts) mean += part;
            mean /= static_cast<float>(share.x.heads * call.head_dim);
            for (int row = 0; row < share.heads; ++row) {
              const int of_block = joint ? row : static_cast<int>(token - first) * share.heads + row;
              std::vector<Thread> threads;
              for (int column = 0; column < shape.columns; ++column)
                threads.emplace_back(call, norms, share, token, column, shape.columns);
              std::vector<float> of_row(threads.size());
              for (int head = row; head < share.x.heads; head += share.heads) {
                std::vector<float> values;
                for (size_t i = 0; i < threads.size(); ++i) {
                  auto& own = sums[static_cast<size_t>(of_block * shape.columns) + i];
                  values.push_back(threads[i].begin(head, round == 0 ? &own : nullptr));
                  of_row[i] += values.back();
                }
                if (joint && round == 0) continue;
                const float sum = joint ? mean : row_sum(values) / static_cast<float>(call.head_dim);
                for (auto& thread : threads) thread.end(head, sum);
              }
              if (joint && round == 0) parts[static_cast<size_t>(row)] = row_sum(of_row);
            }
          }
        }
      }
      // Threads of rows that have no token leave no sums behind.
      const int working = share.heads * share.tokens * shape.columns;
      for (int i = 0; i < working; ++i) sums[static_cast<size_t>(i)].flush();
      for (auto& own : sums) own.finish();
      for (size_t i = room; i < shared.size(); ++i)
        if (!std::isnan(shared[i])) return 1003;
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

ROPE_EXPORT int rope_dist_cpu_norm_rotary_backward(const rope::Call* call, const rope::Norms* norms,
                                                   const rope::Gradients* gradients, int64_t) {
  misaligned = 0;
  GradientOnHost launch{*call, *norms, *gradients};
  return rope::choose_gradient(*call, *norms, *gradients, launch);
}
