// RMS norm and rotation on a CPU in one pass over memory; types, places and strides as in rotary_cpu.cpp.
//
// A head is read twice, the second time from the first cache: for the sum of its squares, and to be written.
#include "norm_cpu.h"

namespace rope {
namespace {

// Normalises, scales and rotates, in the order of the reference.
template <typename T, bool Interleaved, typename Compute>
ROPE_INLINE void write_head(const Compute* x, T* out, const Compute* weight, Compute rstd, const Compute* cos,
                            const Compute* sin, int64_t num_pairs, int64_t head_dim) {
  ROPE_VECTORIZE
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int64_t a = first_of<Interleaved>(i), b = second_of<Interleaved>(i, num_pairs);
    Compute first, second;
    rotate(x[a] * rstd * weight[a], x[b] * rstd * weight[b], cos[i], sin[i], first, second);
    store(out, a, first);
    store(out, b, second);
  }
  ROPE_VECTORIZE
  for (int64_t i = 2 * num_pairs; i < head_dim; ++i) store(out, i, x[i] * rstd * weight[i]);
}

template <typename T, bool Interleaved>
ROPE_INLINE void norm_block(const Call& call, const Heads& x, const Norm& norm, double epsilon, bool after,
                            const typename ComputeOf<T>::type* weight,
                            const Block<typename ComputeOf<T>::type>& block,
                            typename ComputeOf<T>::type* wide) {
  using Compute = typename ComputeOf<T>::type;
  const int64_t head_dim = call.head_dim, joint = norm.joint;
  const T* in = static_cast<const T*>(x.in) + block.b * x.in_b + block.s * x.in_s;
  T* out = static_cast<T*>(x.out) + block.b * x.out_b + block.s * x.out_s;
  const T* bias = static_cast<const T*>(x.bias);
  const int64_t each = joint ? 1 : x.heads;
  Compute* rstds = static_cast<Compute*>(norm.rstd);
  if (rstds) rstds += (block.b * call.length + block.s) * each;
  const Order order(x, joint != 0, block.tokens);
  const Compute eps = static_cast<Compute>(epsilon);
  const Compute count = static_cast<Compute>(weights_of(call, x, norm));
  const int64_t out_outer = order.by_head ? x.out_h : x.out_s, out_inner = order.by_head ? x.out_s : x.out_h;
  Ahead<T> ahead(in, in + block.tokens * x.in_s, order.outer, order.inner, order.outer_step, order.inner_step,
                 head_dim);
  Compute lanes[kTogether * kLanes<Compute>];
  for (int64_t i = 0; i < order.outer; ++i) {
    for (int64_t j = 0; j < order.inner; j += order.together) {
      const int64_t heads = order.inner - j < order.together ? order.inner - j : order.together;
      const T* from = in + i * order.outer_step + j * order.inner_step;
      T* to = out + i * out_outer + j * out_inner;
      Compute rstd[kTogether] = {};
      for (int64_t h = 0; h < heads; ++h) {
        ahead();
        const int64_t token = order.token(i, j + h);
        // A token without a row is normalised only.
        const Compute* y = read_head<T, Interleaved>(
            from + h * order.inner_step, bias ? bias + order.head(i, j + h) * head_dim : nullptr,
            wide + h * head_dim, after, block.cos[token], block.sin[token],
            block.cos[token] ? call.num_pairs : 0, head_dim);
        rstd[joint ? 0 : h] += sum_of(
            head_dim, [=](int64_t p) ROPE_INLINE_LAMBDA { return y[p] * y[p]; },
            lanes + h % kTogether * kLanes<Compute>);
      }
      ROPE_VECTORIZE_FEW
      for (int64_t h = 0; h < kTogether; ++h) rstd[h] = 1 / std::sqrt(rstd[h] / count + eps);
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t head = order.head(i, j + h), token = order.token(i, j + h);
        const Compute* y = wide + h * head_dim;
        if constexpr (sizeof(T) == sizeof(Compute)) {
          if (!bias && !after) y = from + h * order.inner_step;
        }
        const Compute own = rstd[joint ? 0 : h];
        write_head<T, Interleaved>(y, to + h * out_inner, weight + (joint ? head * head_dim : 0), own,
                                   block.cos[token], block.sin[token],
                                   after || !block.cos[token] ? 0 : call.num_pairs, head_dim);
        if (rstds && (!joint || h == 0)) rstds[token * each + head] = own;
      }
    }
  }
}

#define ROPE_NORM(name, T)                                                                  \
  void name(const Call& call, const Heads& x, const Norm& norm, double epsilon, bool after, \
            const ComputeOf<T>::type* weight, const Block<ComputeOf<T>::type>& block,       \
            ComputeOf<T>::type* wide) {                                                     \
    if (call.interleaved_in) {                                                              \
      norm_block<T, true>(call, x, norm, epsilon, after, weight, block, wide);              \
    } else {                                                                                \
      norm_block<T, false>(call, x, norm, epsilon, after, weight, block, wide);             \
    }                                                                                       \
  }
ROPE_CLONES ROPE_NORM(norm_float32, float) ROPE_CLONES ROPE_NORM(norm_float16, Half) ROPE_CLONES
    ROPE_NORM(norm_bfloat16, BFloat16) ROPE_NORM(norm_float64, double)  // rare

    template <typename Compute>
    using NormBlock = void (*)(const Call&, const Heads&, const Norm&, double, bool, const Compute*,
                               const Block<Compute>&, Compute*);

// Tokens [first, last) of batch * length.
template <typename Compute>
void norm_tokens(const Call& call, const Norms& norms, NormBlock<Compute> norm_block, int64_t first,
                 int64_t last, void* scratch) {
  Compute* rows = static_cast<Compute*>(scratch);
  Compute* q_weight = rows + 2 * kBlock * call.num_pairs;
  Compute* k_weight = q_weight + weights_of(call, call.q, norms.q);
  Compute* wide = k_weight + weights_of(call, call.k, norms.k);
  prepare_weight(call, call.q, norms.q, norms.weight_offset, q_weight);
  prepare_weight(call, call.k, norms.k, norms.weight_offset, k_weight);
  Block<Compute> block;
  for (; first < last; first += block.tokens) {
    block_at(call, first, last, false, rows, block);
    norm_block(call, call.q, norms.q, norms.eps, norms.after != 0, q_weight, block, wide);
    if (call.k.heads > 0)
      norm_block(call, call.k, norms.k, norms.eps, norms.after != 0, k_weight, block, wide);
  }
}

}  // namespace
}  // namespace rope

// Normalises and rotates q and k, with at most that many threads, whose number changes no bit of the results.
ROPE_EXPORT int rope_dist_cpu_norm_rotary(const rope::Call* call, const rope::Norms* norms, int64_t threads) {
  using namespace rope;
  if (!supported(*call) || call->interleaved_in != call->interleaved_out) return kUnsupported;
  const int64_t tokens = call->batch * call->length;
  const int64_t bytes = tokens * (call->q.heads + call->k.heads) * call->head_dim * size_of(call->dtype);
  if (bytes == 0) return kDone;
  if (threads > bytes / kBytesAThread) threads = bytes / kBytesAThread;
  const int64_t scratch = 2 * kBlock * call->num_pairs + weights_of(*call, call->q, norms->q) +
                          weights_of(*call, call->k, norms->k) + together(*call, *norms) * call->head_dim;
  return run_threads(
      tokens, threads, scratch * compute_size_of(call->dtype), [=](int64_t first, int64_t last, void* own) {
        if (call->dtype == kFloat64) {
          norm_tokens(*call, *norms, NormBlock<double>(norm_float64), first, last, own);
        } else {
          static const NormBlock<float> blocks[] = {norm_float32, nullptr, norm_float16, norm_bfloat16};
          norm_tokens(*call, *norms, blocks[call->dtype], first, last, own);
        }
      });
}
