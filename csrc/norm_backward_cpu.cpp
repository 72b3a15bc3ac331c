// The gradient of norm + rotary on a CPU in one pass: that of the heads, from what they were, the reciprocal norms and
// the gradient of what they became; and that of the norms' weights.
//
// The weights' gradient is a sum over all tokens: in the heads' type over a block, in float64 over blocks and over
// parts of the tokens whose number does not depend on that of the threads, and so neither does any bit of the result.
#include <initializer_list>

#include "norm_cpu.h"

namespace rope {
namespace {

// The gradient of a head from that of its scaled norm; rotated back if the norm follows the rotation.
template <typename T, bool Interleaved, typename Compute>
ROPE_INLINE void write_gradient(const Compute* scaled, const Compute* normed, T* out, Compute rstd,
                                Compute mean, const Compute* cos, const Compute* sin, int64_t num_pairs,
                                int64_t head_dim) {
  ROPE_VECTORIZE
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int64_t a = first_of<Interleaved>(i), b = second_of<Interleaved>(i, num_pairs);
    Compute first, second;
    rotate(rstd * (scaled[a] - normed[a] * mean), rstd * (scaled[b] - normed[b] * mean), cos[i], -sin[i],
           first, second);
    store(out, a, first);
    store(out, b, second);
  }
  ROPE_VECTORIZE
  for (int64_t i = 2 * num_pairs; i < head_dim; ++i) store(out, i, rstd * (scaled[i] - normed[i] * mean));
}

// Of weight the sums of the block's gradients; buffers hold together * head_dim each.
template <typename T, bool Interleaved, typename Compute>
ROPE_INLINE void gradient_block(const Call& call, const Heads& x, const Norm& norm, const Gradient& gradient,
                                bool after, const Compute* weight, const Block<Compute>& block,
                                Compute* of_weight, Compute* all_normed, Compute* all_scaled) {
  const int64_t head_dim = call.head_dim;
  const T* in = static_cast<const T*>(x.in) + block.b * x.in_b + block.s * x.in_s;
  T* out = static_cast<T*>(x.out) + block.b * x.out_b + block.s * x.out_s;
  const T* grad = static_cast<const T*>(gradient.in) + block.b * gradient.in_b + block.s * gradient.in_s;
  const T* bias = static_cast<const T*>(x.bias);
  const int64_t each = norm.joint ? 1 : x.heads;
  const Compute* rstds = static_cast<const Compute*>(norm.rstd) + (block.b * call.length + block.s) * each;
  const Order order(x, norm.joint != 0, block.tokens);
  const Compute count = static_cast<Compute>(weights_of(call, x, norm));
  Compute lanes[kTogether * kLanes<Compute>];
  for (int64_t i = 0; i < order.outer; ++i) {
    for (int64_t j = 0; j < order.inner; j += order.together) {
      const int64_t heads = order.inner - j < order.together ? order.inner - j : order.together;
      Compute sums[kTogether] = {};
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t head = order.head(i, j + h), token = order.token(i, j + h);
        const int64_t start = norm.joint ? head * head_dim : 0;
        const Compute* cos = block.cos[token];
        const Compute* sin = block.sin[token];
        const int64_t num_pairs = cos ? call.num_pairs : 0;
        const Compute rstd = rstds[token * each + (norm.joint ? 0 : head)];
        Compute* normed = all_normed + h * head_dim;
        Compute* scaled = all_scaled + h * head_dim;
        const Compute* y = read_head<T, Interleaved>(in + token * x.in_s + head * x.in_h,
                                                     bias ? bias + head * head_dim : nullptr, normed, after,
                                                     cos, sin, num_pairs, head_dim);
        const Compute* dy = read_head<T, Interleaved, true>(
            grad + token * gradient.in_s + head * gradient.in_h, static_cast<const T*>(nullptr), scaled,
            !after, cos, sin, num_pairs, head_dim);
        ROPE_VECTORIZE
        for (int64_t p = 0; p < head_dim; ++p) {
          normed[p] = y[p] * rstd;
          of_weight[start + p] += dy[p] * normed[p];
          scaled[p] = dy[p] * weight[start + p];
        }
        sums[norm.joint ? 0 : h] += sum_of(
            head_dim, [=](int64_t p) ROPE_INLINE_LAMBDA { return scaled[p] * normed[p]; },
            lanes + h % kTogether * kLanes<Compute>);
      }
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t head = order.head(i, j + h), token = order.token(i, j + h);
        write_gradient<T, Interleaved>(
            all_scaled + h * head_dim, all_normed + h * head_dim, out + token * x.out_s + head * x.out_h,
            rstds[token * each + (norm.joint ? 0 : head)], sums[norm.joint ? 0 : h] / count, block.cos[token],
            block.sin[token], after && block.cos[token] ? call.num_pairs : 0, head_dim);
      }
    }
  }
}

#define ROPE_GRADIENT(name, T)                                                                            \
  void name(const Call& call, const Heads& x, const Norm& norm, const Gradient& gradient, bool after,     \
            const ComputeOf<T>::type* weight, const Block<ComputeOf<T>::type>& block,                     \
            ComputeOf<T>::type* of_weight, ComputeOf<T>::type* normed, ComputeOf<T>::type* scaled) {      \
    if (call.interleaved_in) {                                                                            \
      gradient_block<T, true>(call, x, norm, gradient, after, weight, block, of_weight, normed, scaled);  \
    } else {                                                                                              \
      gradient_block<T, false>(call, x, norm, gradient, after, weight, block, of_weight, normed, scaled); \
    }                                                                                                     \
  }
ROPE_CLONES ROPE_GRADIENT(gradient_float32, float) ROPE_CLONES
    ROPE_GRADIENT(gradient_float16, Half) ROPE_CLONES ROPE_GRADIENT(gradient_bfloat16, BFloat16)
        ROPE_GRADIENT(gradient_float64, double)  // rare

    template <typename Compute>
    using GradientBlock = void (*)(const Call&, const Heads&, const Norm&, const Gradient&, bool,
                                   const Compute*, const Block<Compute>&, Compute*, Compute*, Compute*);

// Tokens [first, last) of batch * length; adds the gradients of the weights, queries' first, to of_weights.
template <typename Compute>
void gradient_tokens(const Call& call, const Norms& norms, const Gradients& gradients,
                     GradientBlock<Compute> gradient_block, int64_t first, int64_t last, void* scratch,
                     double* of_weights) {
  const int64_t q_count = weights_of(call, call.q, norms.q), k_count = weights_of(call, call.k, norms.k);
  Compute* rows = static_cast<Compute*>(scratch);
  Compute* weights = rows + 2 * kBlock * call.num_pairs;
  Compute* sums = weights + q_count + k_count;
  Compute* normed = sums + q_count + k_count;
  Compute* scaled = normed + together(call, norms) * call.head_dim;
  prepare_weight(call, call.q, norms.q, norms.weight_offset, weights);
  prepare_weight(call, call.k, norms.k, norms.weight_offset, weights + q_count);
  Block<Compute> block;
  for (; first < last; first += block.tokens) {
    block_at(call, first, last, false, rows, block);
    for (int64_t i = 0; i < q_count + k_count; ++i) sums[i] = 0;
    for (bool keys : {false, true}) {
      gradient_block(call, keys ? call.k : call.q, keys ? norms.k : norms.q, keys ? gradients.k : gradients.q,
                     norms.after != 0, weights + (keys ? q_count : 0), block, sums + (keys ? q_count : 0),
                     normed, scaled);
    }
    for (int64_t i = 0; i < q_count + k_count; ++i) of_weights[i] += static_cast<double>(sums[i]);
  }
}

// Parts of the tokens: the more, the more threads; each has its own sums of the weights' gradients.
constexpr int64_t kMostParts = 256, kTokensAPart = 64;

}  // namespace
}  // namespace rope

// The backward pass, with at most that many threads, whose number changes no bit of the results.
ROPE_EXPORT int rope_dist_cpu_norm_rotary_backward(const rope::Call* call, const rope::Norms* norms,
                                                   const rope::Gradients* gradients, int64_t threads) {
  using namespace rope;
  if (!supported(*call) || call->interleaved_in != call->interleaved_out) return kUnsupported;
  const int64_t tokens = call->batch * call->length;
  const int64_t q_count = weights_of(*call, call->q, norms->q),
                k_count = weights_of(*call, call->k, norms->k);
  const int64_t count = q_count + k_count;
  const int64_t bytes = tokens * (call->q.heads + call->k.heads) * call->head_dim * size_of(call->dtype);
  if (threads > bytes / kBytesAThread) threads = bytes / kBytesAThread;
  const int64_t wanted = (tokens + kTokensAPart - 1) / kTokensAPart,
                parts = wanted < kMostParts ? wanted : kMostParts;
  try {
    std::vector<double> sums(static_cast<size_t>(parts * count));
    double* of_weights = sums.data();
    const int64_t scratch =
        2 * kBlock * call->num_pairs + 2 * count + 2 * together(*call, *norms) * call->head_dim;
    const auto run = [=](int64_t first, int64_t last, void* own, double* of_part) {
      if (call->dtype == kFloat64) {
        gradient_tokens(*call, *norms, *gradients, GradientBlock<double>(gradient_float64), first, last, own,
                        of_part);
      } else {
        static const GradientBlock<float> blocks[] = {gradient_float32, nullptr, gradient_float16,
                                                      gradient_bfloat16};
        gradient_tokens(*call, *norms, *gradients, blocks[call->dtype], first, last, own, of_part);
      }
    };
    const int status = run_threads(
        parts, threads, scratch * compute_size_of(call->dtype), [=](int64_t first, int64_t last, void* own) {
          for (int64_t part = first; part < last; ++part) {
            run(tokens * part / parts, tokens * (part + 1) / parts, own, of_weights + part * count);
          }
        });
    if (status != kDone) return status;
    for (bool keys : {false, true}) {
      double* out = static_cast<double*>(keys ? gradients->k.weight : gradients->q.weight);
      const double* from = of_weights + (keys ? q_count : 0);
      for (int64_t i = 0; out && i < (keys ? k_count : q_count); ++i) {
        out[i] = 0.0;
        for (int64_t part = 0; part < parts; ++part) out[i] += from[part * count + i];
      }
    }
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kDone;
}
