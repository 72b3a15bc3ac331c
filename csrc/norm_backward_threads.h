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

// As norm_shape(), but for heads of several tokens. Where sums of heads that wide do not fit, with one row.
inline Shape gradient_shape(const Call& call, int pairs) {
  const int64_t units = units_of(call, pairs);
  const int columns = norm_columns(units);
  const bool fits = (units + columns - 1) / columns * 2 * pairs * kNormThreads <= kMostSums;
  return {columns, fits ? kNormThreads / columns : 1};
}

// What a block works on: queries or keys, and which tokens of them.
struct Share {
  const Heads& x;
  const Norm& norm;
  const Gradient& gradient;
  int block, blocks;
  int heads, tokens;  // that are worked on at once, by a row each; a norm of all heads takes one token

  ROPE_INLINE Share(const Call& call, const Norms& norms, const Gradients& gradients, int index, int rows)
      : x(index < gradients.q.blocks ? call.q : call.k),
        norm(index < gradients.q.blocks ? norms.q : norms.k),
        gradient(index < gradients.q.blocks ? gradients.q : gradients.k),
        block(index < gradients.q.blocks ? index : index - static_cast<int>(gradients.q.blocks)),
        blocks(static_cast<int>(gradient.blocks)) {
    heads = x.heads < rows ? static_cast<int>(x.heads) : rows;
    tokens = norm.joint ? 1 : rows / heads;
  }
};

// The sums of a block for the weight's gradient. Each thread has sums of its own for what it owns, its n-th unit here
// or there: in registers for the only head's first, unless Joint; else in shared memory, where threads use different
// banks. What does not fit, with N 1 only, is in the block's row of the buffer from the start, in the weight's order.
template <bool Interleaved, int N, bool Joint>
struct WeightSums {
  const Call& call;
  float* row;  // of the buffer; null: no weight
  float* memory;
  int thread, columns, rows;
  int heads, slots;  // of the weight; threads of a column that have sums for it
  bool is_shared;
  float own[2 * N];

  ROPE_INLINE WeightSums(const Call& of, const Share& share, int of_thread, int all_columns, int all_rows,
                         float* shared)
      : call(of), thread(of_thread), columns(all_columns), rows(all_rows) {
    heads = Joint && share.norm.joint ? static_cast<int>(share.x.heads) : 1;
    slots = Joint && share.norm.joint ? 1 : share.heads * share.tokens;
    row = static_cast<float*>(share.gradient.weight);
    if (row) row += static_cast<int64_t>(share.block) * heads * call.head_dim;
    is_shared = N > 1 || size(call, heads, rows, columns) <= kMostSums;
    memory = is_shared ? shared + thread : row;
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) own[i] = 0.0f;
  }

  // Floats of shared memory for a weight of that many heads.
  static ROPE_INLINE int64_t size(const Call& call, int64_t heads, int rows, int columns) {
    return (heads + rows - 1) / rows * rounds(call, columns) * 2 * N * kNormThreads;
  }

  // Most units of a head that a thread has.
  static ROPE_INLINE int rounds(const Call& call, int columns) {
    return N > 1 ? 1 : static_cast<int>((units_of(call, N) + columns - 1) / columns);
  }

  // The thread's number of a unit.
  ROPE_INLINE int number_of(int head, int64_t unit) const {
    const int own_unit = N > 1 ? 0 : static_cast<int>(unit / columns);
    return Joint ? head / rows * rounds(call, columns) + own_unit : own_unit;
  }

  // Where number i of a unit is within a head: past its end, if a head of odd size ends within the unit.
  ROPE_INLINE int64_t place(int64_t unit, int i) const {
    return i < N ? first_run_of<Interleaved, N>(call, unit) + i
                 : second_run_of<Interleaved, N>(call, unit) + i - N;
  }

  // Before any thread adds.
  ROPE_INLINE void clear() {
    if (!row) return;
    if (is_shared) {
      const int64_t count = size(call, heads, rows, columns);
      for (int64_t i = 0; i < count; i += kNormThreads) memory[i] = 0.0f;
    } else {
      for (int64_t i = thread; i < heads * call.head_dim; i += columns * rows) memory[i] = 0.0f;
    }
  }

  // Head: 0 if each has a norm of its own.
  ROPE_INLINE void add(int head, int64_t unit, const float* values) {
    if (!row) return;
    if (!Joint && (N > 1 || unit < columns)) {
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) own[i] += values[i];
    } else if (is_shared) {
      float* sums = memory + number_of(head, unit) * 2 * N * kNormThreads;
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) sums[i * kNormThreads] += values[i];
    } else {
      add_in_place(head, unit, values);
    }
  }

  ROPE_INLINE void add_in_place(int head, int64_t unit, const float* values) {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      if (place(unit, i) < call.head_dim) memory[head * call.head_dim + place(unit, i)] += values[i];
    }
  }

  // When the thread has added all.
  ROPE_INLINE void flush() {
    const int column = thread % columns;
    if (!row || Joint || column >= units_of(call, N)) return;
    if (is_shared) {
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) memory[i * kNormThreads] = own[i];
    } else {
      add_in_place(0, column, own);
    }
  }

  // After every thread.
  ROPE_INLINE void finish() const {
    if (!row || !is_shared) return;
    const float* all = memory - thread;
    const int units = static_cast<int>(units_of(call, N));
    for (int i = thread; i < heads * units * 2 * N; i += columns * rows) {
      const int unit = i % units, head = i / units % heads, number = i / units / heads;
      if (place(unit, number) >= call.head_dim) continue;
      const float* sums = all + (number_of(head, unit) * 2 * N + number) * kNormThreads;
      float sum = 0.0f;
      for (int slot = 0; slot < slots; ++slot)
        sum += sums[(heads > 1 ? head % rows : slot) * columns + unit % columns];
      row[head * call.head_dim + place(unit, number)] = sum;
    }
  }
};

// Of one token.
template <typename T, bool Interleaved, int N, bool Joint>
struct GradientThread : NormThread<T, Interleaved, N> {
  using Base = NormThread<T, Interleaved, N>;
  using Sums = WeightSums<Interleaved, N, Joint>;

  const Share& share;
  float scaled[2 * N], rstd;  // of the head that is worked on; y: its norm

  ROPE_INLINE GradientThread(const Call& call, const Norms& norms, const Share& of, int64_t token, int column,
                             int columns)
      : Base(call, norms, token, column, columns), share(of) {}

  // A unit of the norm, and the gradient of it as it was scaled; both are added to the sums, unless null.
  ROPE_INLINE void read_both(int head, int64_t unit, const float* c, const float* d, float* normed,
                             float* gradient, Sums* sums) {
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
      sums->add(Joint && share.norm.joint ? head : 0, unit, products);
    }
    Base::scale_unit(share.norm, head, unit, gradient);
  }

  ROPE_INLINE void write_both(int head, int64_t unit, const float* c, const float* d,
                              const float* normed, float* gradient, float mean) const {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) gradient[i] = rstd * (gradient[i] - normed[i] * mean);
    if (this->norms.after) Base::template rotate_unit<true>(unit, c, d, gradient);
    const Heads& x = share.x;
    Base::store_unit(static_cast<T*>(x.out) + this->b * x.out_b + this->s * x.out_s + head * x.out_h, unit,
                     gradient);
  }

  // The thread's part of the sum of products of a head's norm and gradient.
  ROPE_INLINE float begin(int head, Sums* sums) {
    const int64_t token = this->b * this->call.length + this->s;
    rstd = static_cast<const float*>(
        share.norm.rstd)[Joint && share.norm.joint ? token : token * share.x.heads + head];
    float sum = 0.0f;
    if (this->column < this->units) {
      read_both(head, this->column, this->cos, this->sin, this->y, scaled, sums);
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) sum += scaled[i] * this->y[i];
    }
    for (int64_t unit = this->column + this->columns; Base::kRounds && unit < this->units;
         unit += this->columns) {
      float c[N], d[N], normed[2 * N], gradient[2 * N];
      Base::angles(unit, c, d);
      read_both(head, unit, c, d, normed, gradient, sums);
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) sum += gradient[i] * normed[i];
    }
    return sum;
  }

  // After begin() of the same head.
  ROPE_INLINE void end(int head, float mean) {
    if (this->column < this->units)
      write_both(head, this->column, this->cos, this->sin, this->y, scaled, mean);
    for (int64_t unit = this->column + this->columns; Base::kRounds && unit < this->units;
         unit += this->columns) {
      float c[N], d[N], normed[2 * N], gradient[2 * N];
      Base::angles(unit, c, d);
      read_both(head, unit, c, d, normed, gradient, nullptr);
      write_both(head, unit, c, d, normed, gradient, mean);
    }
  }
};

// Shared memory for the sums of queries and of keys, and the variant that has room for them.
template <typename Launch>
struct GradientChoice {
  const Call& call;
  const Norms& norms;
  Launch& launch;

  template <typename T, bool Interleaved, int N>
  int run() {
    const Shape shape = gradient_shape(call, N);
    int64_t most = 0;
    for (bool keys : {false, true}) {
      const int64_t heads = !(keys ? norms.k : norms.q).joint ? 1 : keys ? call.k.heads : call.q.heads;
      const int64_t size = WeightSums<Interleaved, N, true>::size(call, heads, shape.rows, shape.columns);
      if (N > 1 && size > kMostSums) return run<T, Interleaved, 1>();
      if (size <= kMostSums && size > most) most = size;
    }
    most *= static_cast<int64_t>(sizeof(float));
    return norms.q.joint || norms.k.joint ? launch.template run<T, Interleaved, N, true>(shape, most)
                                          : launch.template run<T, Interleaved, N, false>(shape, most);
  }
};

// As choose_norm(): calls launch.run<T, Interleaved, N, Joint>(shape of a block, bytes of shared memory).
template <typename Launch>
int choose_gradient(const Call& call, const Norms& norms, const Gradients& gradients, Launch& launch) {
  for (bool keys : {false, true}) {
    const Gradient& gradient = keys ? gradients.k : gradients.q;
    // Heads without a block would not be written, and blocks without heads have nothing to do.
    if (((keys ? call.k : call.q).heads > 0) != (gradient.blocks > 0) || gradient.blocks > 0xffff)
      return kUnsupported;
  }
  GradientChoice<Launch> choice{call, norms, launch};
  return choose_norm(call, norms, &gradients, choice);
}

}  // namespace rope
