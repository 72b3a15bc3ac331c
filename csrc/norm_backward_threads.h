// What one GPU thread does for the gradient of norm + rotary, in steps as in norm_rotary_threads.h: begin() gives its
// part of a head's sum, end() takes the mean that is made of it.
//
// Blocks stay: each takes every n-th token, or several at once where a token has fewer heads than a block has rows.
// The gradient of the weight is a sum over tokens. A thread has the same columns at every token, so it sums in
// registers where each head has a norm of its own. Where all have one together, each head has its own weights: the
// block's shared memory has room for as many. What a block found is a row of a buffer that is added up afterwards.
// Nothing is summed by atomics: the same call gives the same bits.
#pragma once

#include "norm_rotary_threads.h"

namespace rope {

// Floats of shared memory for the sums of a block: 48 KiB need no permission, and kNormThreads are for norms of all
// heads.
constexpr int64_t kMostSums = 12 * 1024 - kNormThreads;

// As norm_shape(); where heads are so wide that the sums of every row do not fit, with fewer rows.
inline Shape gradient_shape(const Call& call, int pairs) {
  const int64_t units = units_of(call, pairs), fitting = kMostSums / (units * 2 * pairs);
  const int columns = norm_columns(units);
  const int64_t rows = kNormThreads / columns < fitting ? kNormThreads / columns : fitting;
  return {columns, static_cast<int>(rows < 1 ? 1 : rows)};
}

// What a block works on: queries or keys, and which tokens of them.
struct Share {
  const Heads& x;
  const Norm& norm;
  const Gradient& gradient;
  int64_t block, blocks;
  int heads, tokens;  // that are worked on at once, by a row each; a norm of all heads takes one token

  ROPE_INLINE Share(const Call& call, const Norms& norms, const Gradients& gradients, int64_t index, int rows)
      : x(index < gradients.q.blocks ? call.q : call.k),
        norm(index < gradients.q.blocks ? norms.q : norms.k),
        gradient(index < gradients.q.blocks ? gradients.q : gradients.k),
        block(index < gradients.q.blocks ? index : index - gradients.q.blocks),
        blocks(gradient.blocks) {
    heads = x.heads < rows ? static_cast<int>(x.heads) : rows;
    tokens = norm.joint ? 1 : rows / heads;
  }
};

// The sums of a block for the weight's gradient, in slots of a head's size: one a row, or one a head if the norm is of
// all. In shared memory the units lie beside each other, number by number, so that threads use different banks; what
// does not fit is in the block's row of the buffer from the start, in the order of the weight.
template <bool Interleaved, int N>
struct WeightSums {
  const Call& call;
  float* row;      // of the buffer; null: no weight
  float* memory;   // row, or shared
  int64_t slots, units;
  bool joint;
  float own[2 * N];  // of the thread's first unit, unless joint

  ROPE_INLINE WeightSums(const Call& of, const Share& share, float* shared) : call(of) {
    joint = share.norm.joint != 0;
    slots = joint ? share.x.heads : share.heads * share.tokens;
    units = units_of(call, N);
    row = static_cast<float*>(share.gradient.weight);
    if (row) row += share.block * (joint ? share.x.heads : 1) * call.head_dim;
    memory = size() <= kMostSums ? shared : row;
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) own[i] = 0.0f;
  }

  // Floats of shared memory, if it is there that they are.
  ROPE_INLINE int64_t size() const { return slots * units * 2 * N; }

  ROPE_INLINE bool is_shared() const { return memory != row; }

  // Where number i of a unit is within a head: past its end, if a head of odd size ends within the unit.
  ROPE_INLINE int64_t place(int64_t unit, int i) const {
    return i < N ? first_run_of<Interleaved, N>(call, unit) + i
                 : second_run_of<Interleaved, N>(call, unit) + i - N;
  }

  ROPE_INLINE int64_t index(int64_t slot, int64_t unit, int i) const {
    return is_shared() ? (i * slots + slot) * units + unit : slot * call.head_dim + place(unit, i);
  }

  // Before any thread adds.
  ROPE_INLINE void clear(int thread, int threads) {
    if (!row) return;
    const int64_t count = is_shared() ? size() : slots * call.head_dim;
    for (int64_t i = thread; i < count; i += threads) memory[i] = 0.0f;
  }

  ROPE_INLINE void add(int64_t slot, int64_t unit, bool first, const float* values) {
    if (!row) return;
    if (first && !joint) {
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) own[i] += values[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      if (N > 1 || place(unit, i) < call.head_dim) memory[index(slot, unit, i)] += values[i];
    }
  }

  // Of a thread that had that slot, when it has added all.
  ROPE_INLINE void flush(int64_t slot, int64_t unit) {
    if (!row || joint || unit >= units) return;
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      if (N > 1 || place(unit, i) < call.head_dim) memory[index(slot, unit, i)] = own[i];
    }
  }

  // After every thread.
  ROPE_INLINE void finish(int thread, int threads) const {
    if (!row || !is_shared()) return;
    const int64_t apart = joint ? slots : 1, together = joint ? 1 : slots;
    for (int64_t i = thread; i < apart * units * 2 * N; i += threads) {
      const int64_t unit = i % units, head = i / units % apart;
      const int number = static_cast<int>(i / units / apart);
      if (place(unit, number) >= call.head_dim) continue;
      float sum = 0.0f;
      for (int64_t slot = 0; slot < together; ++slot) sum += memory[index(head + slot, unit, number)];
      row[head * call.head_dim + place(unit, number)] = sum;
    }
  }
};

// Of one token.
template <typename T, bool Interleaved, int N>
struct GradientThread : NormThread<T, Interleaved, N> {
  using Base = NormThread<T, Interleaved, N>;
  using Sums = WeightSums<Interleaved, N>;

  const Share& share;
  float scaled[2 * N], rstd;  // of the head that is worked on; y: its norm

  ROPE_INLINE GradientThread(const Call& call, const Norms& norms, const Share& of, int64_t token, int column,
                             int columns)
      : Base(call, norms, token, column, columns), share(of) {}

  // A unit of the norm, and the gradient of it as it was scaled; both are added to the sums, unless null.
  ROPE_INLINE void read_both(int64_t head, int64_t unit, const float* c, const float* d, float* normed,
                             float* gradient, Sums* sums, int64_t slot) {
    const Gradient& from = share.gradient;
    Base::load_unit(static_cast<const T*>(from.in) + this->b * from.in_b + this->s * from.in_s +
                        head * from.in_h,
                    unit, gradient);
    Base::read(share.x, head, unit, c, d, normed);
    if (!this->norms.after) Base::template rotate_unit<true>(unit, c, d, gradient);
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) normed[i] *= rstd;
    if (sums) {
      float products[2 * N];
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) products[i] = gradient[i] * normed[i];
      sums->add(slot, unit, unit == this->column, products);
    }
    Base::scale_unit(share.norm, head, unit, gradient);
  }

  ROPE_INLINE void write_both(int64_t head, int64_t unit, const float* c, const float* d,
                              const float* normed, float* gradient, float mean) const {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) gradient[i] = rstd * (gradient[i] - normed[i] * mean);
    if (this->norms.after) Base::template rotate_unit<true>(unit, c, d, gradient);
    const Heads& x = share.x;
    Base::store_unit(static_cast<T*>(x.out) + this->b * x.out_b + this->s * x.out_s + head * x.out_h, unit,
                     gradient);
  }

  // The thread's part of the sum of products of a head's norm and gradient.
  ROPE_INLINE float begin(int64_t head, Sums* sums, int64_t slot) {
    const int64_t token = this->b * this->call.length + this->s;
    rstd = static_cast<const float*>(
        share.norm.rstd)[share.norm.joint ? token : token * share.x.heads + head];
    float sum = 0.0f;
    if (this->column < this->units) {
      read_both(head, this->column, this->cos, this->sin, this->y, scaled, sums, slot);
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) sum += scaled[i] * this->y[i];
    }
    for (int64_t unit = this->column + this->columns; Base::kRounds && unit < this->units;
         unit += this->columns) {
      float c[N], d[N], normed[2 * N], gradient[2 * N];
      Base::angles(unit, c, d);
      read_both(head, unit, c, d, normed, gradient, sums, slot);
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) sum += gradient[i] * normed[i];
    }
    return sum;
  }

  // After begin() of the same head.
  ROPE_INLINE void end(int64_t head, float mean) {
    if (this->column < this->units)
      write_both(head, this->column, this->cos, this->sin, this->y, scaled, mean);
    for (int64_t unit = this->column + this->columns; Base::kRounds && unit < this->units;
         unit += this->columns) {
      float c[N], d[N], normed[2 * N], gradient[2 * N];
      Base::angles(unit, c, d);
      read_both(head, unit, c, d, normed, gradient, nullptr, 0);
      write_both(head, unit, c, d, normed, gradient, mean);
    }
  }
};

// Bytes of shared memory for the sums of both queries and keys.
inline int64_t sums_bytes(const Call& call, const Norms& norms, int pairs) {
  int64_t most = 0;
  const int64_t each = units_of(call, pairs) * 2 * pairs;
  for (bool keys : {false, true}) {
    const Heads& x = keys ? call.k : call.q;
    const int64_t slots = (keys ? norms.k : norms.q).joint ? x.heads : gradient_shape(call, pairs).rows;
    if (slots * each <= kMostSums && slots * each > most) most = slots * each;
  }
  return most * static_cast<int64_t>(sizeof(float));
}

// As choose_norm(), for the backward pass.
template <typename Launch>
int choose_gradient(const Call& call, const Norms& norms, const Gradients& gradients, Launch& launch) {
  for (bool keys : {false, true}) {
    const Gradient& gradient = keys ? gradients.k : gradients.q;
    // Heads without a block would not be written, and blocks without heads have nothing to do.
    if (((keys ? call.k : call.q).heads > 0) != (gradient.blocks > 0) || gradient.blocks > 0xffff)
      return kUnsupported;
  }
  return choose_norm(call, norms, &gradients, launch);
}

}  // namespace rope
