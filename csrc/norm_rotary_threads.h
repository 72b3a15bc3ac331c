// What one GPU thread does for norm + rotary, in two steps: begin() gives its part of the sum of squares, end() takes
// the reciprocal norm. The sum is made between, by shuffles on a GPU, by a loop in the tests: they run the same steps
// for the threads of a block one after the other. What it is given stays in registers meanwhile.
//
// As in rotary_threads.h a block takes one token, and a row of threads a head. A thread owns units of 2 N elements:
// the members of N pairs, or of what is not rotated; as 16 bytes each of two runs.
#pragma once

#include "rotary_threads.h"

namespace rope {

constexpr int kNormThreads = 128;
constexpr int kMostColumns = 32;  // of a row: they sum by shuffles

ROPE_INLINE float reciprocal_norm(float squares, int64_t count, double eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(count) + static_cast<float>(eps));
}

// Units of a head, for that many pairs in each.
ROPE_INLINE int64_t units_of(const Call& call, int pairs) {
  return call.num_pairs / pairs + (call.head_dim - 2 * call.num_pairs + 2 * pairs - 1) / (2 * pairs);
}

// Where the runs of a unit start.
template <bool Interleaved, int N>
ROPE_INLINE int64_t first_run_of(const Call& call, int64_t unit) {
  return !Interleaved && unit < call.num_pairs / N ? unit * N : unit * 2 * N;
}
template <bool Interleaved, int N>
ROPE_INLINE int64_t second_run_of(const Call& call, int64_t unit) {
  return !Interleaved && unit < call.num_pairs / N ? call.num_pairs + unit * N : unit * 2 * N + N;
}

template <typename T, bool Interleaved, int N>
struct NormThread {
  // Whether a thread may have several units of a head. With accesses of 16 bytes that would take registers for heads of
  // more than 256 elements of float32, or 512 of 16 bits; see norm_wide().
  static constexpr bool kRounds = N == 1;

  const Call& call;
  const Norms& norms;
  int64_t b, s, position;
  int64_t rotated, units;  // units of pairs, and all
  int column, columns;
  float cos[N], sin[N], y[2 * N];  // of the first unit

  ROPE_INLINE NormThread(const Call& of, const Norms& with, int64_t token, int own_column, int all_columns)
      : call(of), norms(with), column(own_column), columns(all_columns) {
    b = token / call.length;
    s = token % call.length;
    position = position_of(call, b, s);
    rotated = call.num_pairs / N;
    units = units_of(call, N);
    if (column < units) angles(column, cos, sin);
  }

  // Cosines and sines of a unit; 1 and 0 where it is not rotated.
  ROPE_INLINE void angles(int64_t unit, float* c, float* d) const {
    if (unit < rotated) {
      angles_of<N>(call, b, position, unit * N, c, d);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        c[i] = 1.0f;
        d[i] = 0.0f;
      }
    }
  }

  // Whether a unit is rotated: by an angle of zero infinities would become NaN.
  ROPE_INLINE bool rotates(int64_t unit) const {
    const bool known = call.inv_freq_q64 ? position != kNowhere : position >= 0 && position < call.rows;
    return known && unit < rotated;
  }

  ROPE_INLINE int64_t first_run(int64_t unit) const { return first_run_of<Interleaved, N>(call, unit); }
  ROPE_INLINE int64_t second_run(int64_t unit) const { return second_run_of<Interleaved, N>(call, unit); }

  // A head of odd size ends within a unit; then N is 1.
  ROPE_INLINE bool whole(int64_t second) const { return N > 1 || second < call.head_dim; }

  // Back: by the negative angles.
  template <bool Back = false>
  ROPE_INLINE void rotate_unit(int64_t unit, const float* c, const float* d, float* x) const {
    if (!rotates(unit)) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float first, second;
      rotate(x[Interleaved ? 2 * i : i], x[Interleaved ? 2 * i + 1 : N + i], c[i], Back ? -d[i] : d[i], first,
             second);
      x[Interleaved ? 2 * i : i] = first;
      x[Interleaved ? 2 * i + 1 : N + i] = second;
    }
  }

  ROPE_INLINE void load_unit(const T* head, int64_t unit, float* out) const {
    load_some<N>(head + first_run(unit), out);
    if (whole(second_run(unit))) {
      load_some<N>(head + second_run(unit), out + N);
    } else {
      out[N] = 0.0f;
    }
  }

  ROPE_INLINE void store_unit(T* head, int64_t unit, const float* values) const {
    store_some<N>(head + first_run(unit), values);
    if (whole(second_run(unit))) store_some<N>(head + second_run(unit), values + N);
  }

  // A unit of a head with its bias, as it is normalised.
  ROPE_INLINE void read(const Heads& x, int64_t head, int64_t unit, const float* c, const float* d,
                        float* out) const {
    const T* in = static_cast<const T*>(x.in) + b * x.in_b + s * x.in_s + head * x.in_h;
    load_unit(in, unit, out);
    if (x.bias) {
      const int64_t first = first_run(unit), second = second_run(unit);
      const T* bias = static_cast<const T*>(x.bias) + head * call.head_dim;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        out[i] += to_float(bias[first + i]);
        if (whole(second)) out[N + i] += to_float(bias[second + i]);
      }
    }
    if (norms.after) rotate_unit(unit, c, d, out);
  }

  template <typename W>
  ROPE_INLINE void scale(const W* weight, int64_t first, int64_t second, float* x) const {
    const float offset = static_cast<float>(norms.weight_offset);
    float factors[2 * N];
    load_some<N>(weight + first, factors);
    if (whole(second)) {
      load_some<N>(weight + second, factors + N);
    } else {
      factors[N] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) x[i] *= factors[i] + offset;
  }

  // Times the weight.
  ROPE_INLINE void scale_unit(const Norm& norm, int64_t head, int64_t unit, float* values) const {
    const int64_t first = first_run(unit), second = second_run(unit);
    const int64_t start = norm.joint ? head * call.head_dim : 0;
    if (norm.weight && norm.weight_dtype == kFloat32) {
      scale(static_cast<const float*>(norm.weight) + start, first, second, values);
    } else if (norm.weight) {
      scale(static_cast<const T*>(norm.weight) + start, first, second, values);
    }
  }

  ROPE_INLINE void write(const Heads& x, const Norm& norm, int64_t head, int64_t unit, const float* c,
                         const float* d, float* values, float rstd) const {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) values[i] *= rstd;
    scale_unit(norm, head, unit, values);
    if (!norms.after) rotate_unit(unit, c, d, values);
    store_unit(static_cast<T*>(x.out) + b * x.out_b + s * x.out_s + head * x.out_h, unit, values);
  }

  ROPE_INLINE void read_first(const Heads& x, int64_t head) {
    if (column < units) read(x, head, column, cos, sin, y);
  }

  // The thread's part of the sum of squares of a head.
  ROPE_INLINE float begin(const Heads& x, int64_t head) {
    float sum = 0.0f;
    read_first(x, head);
    if (column < units) {
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) sum += y[i] * y[i];
    }
    // More units than columns: these are read again by end().
    for (int64_t unit = column + columns; kRounds && unit < units; unit += columns) {
      float c[N], d[N], more[2 * N];
      angles(unit, c, d);
      read(x, head, unit, c, d, more);
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) sum += more[i] * more[i];
    }
    return sum;
  }

  // After begin() or read_first() of the same head.
  ROPE_INLINE void end(const Heads& x, const Norm& norm, int64_t head, float rstd) {
    if (column < units) write(x, norm, head, column, cos, sin, y, rstd);
    for (int64_t unit = column + columns; kRounds && unit < units; unit += columns) {
      float c[N], d[N], more[2 * N];
      angles(unit, c, d);
      read(x, head, unit, c, d, more);
      write(x, norm, head, unit, c, d, more, rstd);
    }
    if (norm.rstd && column == 0) {
      const int64_t token = b * call.length + s;
      static_cast<float*>(norm.rstd)[norm.joint ? token : token * x.heads + head] = rstd;
    }
  }
};

// As many columns as units of a head, up to a power of two.
inline int norm_columns(int64_t units) {
  int columns = 1;
  while (columns < units && columns < kMostColumns) columns *= 2;
  return columns;
}

// The shape of a block.
inline Shape norm_shape(const Call& call, int pairs) {
  const int columns = norm_columns(units_of(call, pairs));
  const int64_t heads = call.q.heads + call.k.heads;
  const int64_t rows = kNormThreads / columns < heads ? kNormThreads / columns : heads;
  return {columns, static_cast<int>(rows < 1 ? 1 : rows)};
}

// Whether accesses of 16 bytes fit all that is read and written.
template <typename T>
inline bool norm_wide(const Call& call, const Norms& norms, const Gradients* gradients) {
  constexpr int64_t kVector = 16 / sizeof(T);
  bool fits = wide<T>(call) && call.num_pairs % kVector == 0 &&
              (call.head_dim - 2 * call.num_pairs) % (2 * kVector) == 0 &&
              call.head_dim <= 2 * kVector * kMostColumns;
  for (const Norm* norm : {&norms.q, &norms.k})
    fits = fits && reinterpret_cast<uintptr_t>(norm->weight) % 16 == 0;
  if (!gradients) return fits;
  for (const Gradient* gradient : {&gradients->q, &gradients->k}) {
    fits = fits && (gradient->in_b | gradient->in_s | gradient->in_h) % kVector == 0 &&
           reinterpret_cast<uintptr_t>(gradient->in) % 16 == 0;
  }
  return fits;
}

template <typename T, bool Interleaved, typename Launch>
int choose_norm_for(const Call& call, const Norms& norms, const Gradients* gradients, Launch& launch) {
  return norm_wide<T>(call, norms, gradients) ? launch.template run<T, Interleaved, 16 / sizeof(T)>()
                                   : launch.template run<T, Interleaved, 1>();
}

// Calls launch.run<T, Interleaved, N>() with the variant for this call; other results of rope::Status. Gradients: of
// the backward pass, or null.
template <typename Launch>
int choose_norm(const Call& call, const Norms& norms, const Gradients* gradients, Launch& launch) {
  const int64_t tokens = call.batch * call.length;
  if (tokens == 0 || call.head_dim == 0) return kDone;
  if (tokens > 0x7fffffff || call.interleaved_in != call.interleaved_out) return kUnsupported;
  for (const Norm* norm : {&norms.q, &norms.k}) {
    if (norm->weight && norm->weight_dtype != kFloat32 && norm->weight_dtype != call.dtype)
      return kUnsupported;
  }
  const bool interleaved = call.interleaved_in != 0;
  switch (call.dtype) {
    case kFloat32:
      return interleaved ? choose_norm_for<float, true>(call, norms, gradients, launch)
                         : choose_norm_for<float, false>(call, norms, gradients, launch);
    case kFloat16:
      return interleaved ? choose_norm_for<__half, true>(call, norms, gradients, launch)
                         : choose_norm_for<__half, false>(call, norms, gradients, launch);
    case kBFloat16:
      return interleaved ? choose_norm_for<__nv_bfloat16, true>(call, norms, gradients, launch)
                         : choose_norm_for<__nv_bfloat16, false>(call, norms, gradients, launch);
    default:
      return kUnsupported;
  }
}

}  // namespace rope
