// What the forward and the backward pass of norm + rotary on a CPU share.
#pragma once

#include "cpu_tokens.h"

#if defined(__GNUC__)
#define ROPE_INLINE_LAMBDA __attribute__((always_inline))
#else
#define ROPE_INLINE_LAMBDA
#endif

namespace rope {

// Lanes of a sum, which are added in an order that does not depend on how wide vectors are.
template <typename Compute>
constexpr int64_t kLanes = 64 / static_cast<int64_t>(sizeof(Compute));

// The sum of the lanes: quarters of them, then what is left.
template <typename Compute>
ROPE_INLINE Compute folded(const Compute* lanes) {
  constexpr int64_t kFew = kLanes<Compute> / 4;
#if defined(__GNUC__)
  // A loop of so few the compiler would take apart into single numbers.
  typedef Compute Vector __attribute__((vector_size(16)));
  Vector quarters[4];
  std::memcpy(quarters, lanes, sizeof quarters);
  const Vector sum = (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]);
#else
  Compute sum[kFew];
  for (int64_t i = 0; i < kFew; ++i) {
    sum[i] = (lanes[i] + lanes[i + 2 * kFew]) + (lanes[i + kFew] + lanes[i + 3 * kFew]);
  }
#endif
  if constexpr (kFew == 2) {
    return sum[0] + sum[1];
  } else {
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
}

// The sum of value(i) for i in [0, count). Lanes is a buffer; an array of this function the compiler would keep in
// registers, and take out of them number by number.
template <typename Compute, typename Value>
ROPE_INLINE Compute sum_of(int64_t count, const Value& value, Compute* lanes) {
  constexpr int64_t kMany = kLanes<Compute>;
  const auto four = [&](int64_t i) ROPE_INLINE_LAMBDA {
    return (value(i) + value(i + kMany)) + (value(i + 2 * kMany) + value(i + 3 * kMany));
  };
  int64_t start = 0;
  if (count >= 4 * kMany) {
    ROPE_VECTORIZE_FEW
    for (int64_t i = 0; i < kMany; ++i) lanes[i] = four(i);
    start = 4 * kMany;
  } else {
    ROPE_VECTORIZE_FEW
    for (int64_t i = 0; i < kMany; ++i) lanes[i] = 0;
  }
  for (; start + 4 * kMany <= count; start += 4 * kMany) {
    ROPE_VECTORIZE_FEW
    for (int64_t i = 0; i < kMany; ++i) lanes[i] += four(start + i);
  }
  for (; start + kMany <= count; start += kMany) {
    ROPE_VECTORIZE_FEW
    for (int64_t i = 0; i < kMany; ++i) lanes[i] += value(start + i);
  }
  for (int64_t i = 0; start + i < count; ++i) lanes[i] += value(start + i);
  return folded(lanes);
}

// What a head's loops read of it, in the type that is computed in: the head itself, or wide (room for head_dim) with
// it and its bias.
template <typename T, typename Compute>
ROPE_INLINE const Compute* widen(const T* in, const T* bias, int64_t head_dim, Compute* wide) {
  if constexpr (sizeof(T) == sizeof(Compute)) {
    if (!bias) return in;
  }
  if (bias) {
    ROPE_VECTORIZE
    for (int64_t i = 0; i < head_dim; ++i) wide[i] = load(in, i) + load(bias, i);
  } else {
    ROPE_VECTORIZE
    for (int64_t i = 0; i < head_dim; ++i) wide[i] = load(in, i);
  }
  return wide;
}

// As widen(), and rotated if so wanted.
template <typename T, bool Interleaved, bool Conjugate = false, typename Compute>
ROPE_INLINE const Compute* read_head(const T* in, const T* bias, Compute* own, bool rotated,
                                     const Compute* cos, const Compute* sin, int64_t num_pairs,
                                     int64_t head_dim) {
  const Compute* x = widen(in, bias, head_dim, own);
  if (!rotated) return x;
  ROPE_VECTORIZE
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int64_t a = first_of<Interleaved>(i), b = second_of<Interleaved>(i, num_pairs);
    const Compute first = x[a], second = x[b];
    rotate(first, second, cos[i], Conjugate ? -sin[i] : sin[i], own[a], own[b]);
  }
  if (x != own) {
    for (int64_t i = 2 * num_pairs; i < head_dim; ++i) own[i] = x[i];
  }
  return own;
}

template <typename W, typename Compute>
inline void convert_weight(const W* weight, int64_t count, Compute offset, Compute* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Compute>(load(weight, i)) + offset;
}

inline int64_t weights_of(const Call& call, const Heads& x, const Norm& norm) {
  return norm.joint ? x.heads * call.head_dim : call.head_dim;
}

// The weight plus the offset, as the loops take it: compiled once, and run once for many tokens.
template <typename Compute>
inline void prepare_weight(const Call& call, const Heads& x, const Norm& norm, double weight_offset,
                           Compute* out) {
  const int64_t count = weights_of(call, x, norm);
  const Compute offset = static_cast<Compute>(weight_offset);
  if (!norm.weight || x.heads == 0) {
    for (int64_t i = 0; i < count; ++i) out[i] = 1;
  } else if (norm.weight_dtype == kFloat32) {
    convert_weight(static_cast<const float*>(norm.weight), count, offset, out);
  } else if (norm.weight_dtype == kFloat64) {
    convert_weight(static_cast<const double*>(norm.weight), count, offset, out);
  } else if (norm.weight_dtype == kFloat16) {
    convert_weight(static_cast<const Half*>(norm.weight), count, offset, out);
  } else {
    convert_weight(static_cast<const BFloat16*>(norm.weight), count, offset, out);
  }
  if (size_of(call.dtype) == 2) {
    // Those heads are rounded without a look at NaN, see cpu_types.h.
    for (int64_t i = 0; i < count; ++i) {
      if (out[i] != out[i]) out[i] = static_cast<Compute>(from_bits(0x7fc00000u));
    }
  }
}

// Heads whose sums are made before the first is written, so that no head waits for its own root and division.
constexpr int64_t kTogether = 8;

// In which order the heads of a block are worked on: as they lie in memory, and a token's together if its norm is of
// all.
struct Order {
  bool by_head;
  int64_t outer, inner;
  int64_t outer_step, inner_step;  // in elements of what is read
  int64_t together;

  Order(const Heads& x, bool joint, int64_t tokens)
      : by_head(!joint && x.in_h > x.in_s),
        outer(by_head ? x.heads : tokens),
        inner(by_head ? tokens : x.heads),
        outer_step(by_head ? x.in_h : x.in_s),
        inner_step(by_head ? x.in_s : x.in_h),
        together(joint ? x.heads : kTogether) {}

  int64_t head(int64_t i, int64_t j) const { return by_head ? i : j; }
  int64_t token(int64_t i, int64_t j) const { return by_head ? j : i; }
};

// The most heads of a call that are worked on together.
inline int64_t together(const Call& call, const Norms& norms) {
  int64_t most = kTogether;
  if (norms.q.joint && call.q.heads > most) most = call.q.heads;
  if (norms.k.joint && call.k.heads > most) most = call.k.heads;
  return most;
}

}  // namespace rope
