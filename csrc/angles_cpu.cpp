// Rows of cosines and sines, compiled once for all passes.
#include "cpu_angles.h"

#include <cstddef>

#include "cpu_clones.h"

namespace rope {
namespace {

// Cosine and sine of what is left of an angle, in 2^-32 revolutions, to its nearest quarter, in float64 to about its
// rounding: Taylor's series, which end below 2^-55 there.
ROPE_INLINE void cos_sin_of_rest(int32_t revolutions, double& cos, double& sin) {
  const double x = static_cast<double>(static_cast<int32_t>(static_cast<uint32_t>(revolutions) << 2)) *
                   (0.78539816339744830961566 / 2147483648.0);
  const double z = x * x;
  double s = -1.0 / 1307674368000.0;
  s = s * z + 1.0 / 6227020800.0;
  s = s * z - 1.0 / 39916800.0;
  s = s * z + 1.0 / 362880.0;
  s = s * z - 1.0 / 5040.0;
  s = s * z + 1.0 / 120.0;
  s = s * z - 1.0 / 6.0;
  sin = s * z * x + x;
  double c = 1.0 / 20922789888000.0;
  c = c * z - 1.0 / 87178291200.0;
  c = c * z + 1.0 / 479001600.0;
  c = c * z - 1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  cos = c * z + 1.0;
}

// Rows of a position from fixed-point frequencies, computed in float64 and rounded once as fixed_point.tables does.
// Apart only where num_pairs is even.
ROPE_INLINE void make_rows(const Call& call, int64_t position, bool apart, float* cos, float* sin) {
  constexpr int64_t kSome = 64;
  const double scaling = call.scaling;
  const uint32_t conjugate = call.conjugate ? 1u << 31 : 0;
  const int32_t at = static_cast<int32_t>(position);
  int32_t revolutions[kSome];
  float some_cos[kSome], some_sin[kSome];
  for (int64_t start = 0; start < call.num_pairs; start += kSome) {
    const int64_t count = call.num_pairs - start < kSome ? call.num_pairs - start : kSome;
    const int32_t* high = call.inv_freq_q64 + start;
    const int32_t* low = high + call.num_pairs;
    for (int64_t i = 0; i < count; ++i) revolutions[i] = angle(at, high[i], low[i]);
    for (int64_t i = 0; i < count; ++i) {
      double c, s;
      cos_sin_of_rest(revolutions[i], c, s);
      some_cos[i] = static_cast<float>(c * scaling);
      some_sin[i] = static_cast<float>(s * scaling);
    }
    // The quarters are added last, in float32: to exchange and to negate is exact.
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t quarter = static_cast<uint32_t>(revolutions[i]) + (1u << 29);
      const float c = some_cos[i], s = some_sin[i];
      const bool odd = quarter & (1u << 30);
      some_cos[i] = flip_sign(odd ? s : c, quarter + (1u << 30));
      some_sin[i] = flip_sign(odd ? c : s, quarter ^ conjugate);
    }
    if (apart) {
      for (int64_t i = 0; i < count / 2; ++i) {
        const int64_t even = start / 2 + i, odd = even + call.num_pairs / 2;
        cos[even] = some_cos[2 * i];
        cos[odd] = some_cos[2 * i + 1];
        sin[even] = some_sin[2 * i];
        sin[odd] = some_sin[2 * i + 1];
      }
    } else {
      const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(float);
      std::memcpy(cos + start, some_cos, bytes);
      std::memcpy(sin + start, some_sin, bytes);
    }
  }
}

// A row of a table as the loops want it: as it lies, or in own (room for num_pairs entries) where it has to be
// changed.
template <typename Compute>
ROPE_INLINE const Compute* table_row(const Compute* row, bool negate, bool narrow, bool apart,
                                     int64_t num_pairs, Compute* own) {
  if constexpr (sizeof(Compute) == sizeof(float)) {
    if (narrow) {
      const float nan = from_bits(0x7fc00000u);
      const float sign = negate ? -1.0f : 1.0f;
      const int64_t step = apart ? 2 : 1, entries = apart ? num_pairs / 2 : num_pairs;
      for (int64_t i = 0; i < entries; ++i)
        own[i] = row[step * i] == row[step * i] ? sign * row[step * i] : nan;
      for (int64_t i = 0; i < num_pairs - entries; ++i) {
        own[entries + i] = row[2 * i + 1] == row[2 * i + 1] ? sign * row[2 * i + 1] : nan;
      }
      return own;
    }
  }
  if (!negate) return row;
  for (int64_t i = 0; i < num_pairs; ++i) own[i] = -row[i];
  return own;
}

template <typename Compute>
ROPE_INLINE void rows_of(const Call& call, int64_t b, int64_t s, int64_t tokens, bool narrow, bool apart,
                         Compute* own, const Compute** cos, const Compute** sin) {
  for (int64_t t = 0; t < tokens; ++t, own += 2 * call.num_pairs) {
    const int64_t position = position_of(call, b, s + t);
    if constexpr (sizeof(Compute) == sizeof(float)) {
      if (call.inv_freq_q64) {
        cos[t] = position == kNowhere ? nullptr : own;
        sin[t] = position == kNowhere ? nullptr : own + call.num_pairs;
        if (cos[t]) make_rows(call, position, apart, own, own + call.num_pairs);
        continue;
      }
    }
    cos[t] = sin[t] = nullptr;
    if (position < 0 || position >= call.rows) continue;
    cos[t] = table_row(static_cast<const Compute*>(call.cos) + b * call.cos_b + position * call.cos_s, false,
                       narrow, apart, call.num_pairs, own);
    sin[t] = table_row(static_cast<const Compute*>(call.sin) + b * call.sin_b + position * call.sin_s,
                       call.conjugate != 0, narrow, apart, call.num_pairs, own + call.num_pairs);
  }
}

// Not the function of the header: GCC exports those that it clones, hidden or not.
ROPE_CLONES void rows_of_floats(const Call& call, int64_t b, int64_t s, int64_t tokens, bool narrow,
                                bool apart, float* own, const float** cos, const float** sin) {
  rows_of(call, b, s, tokens, narrow, apart, own, cos, sin);
}

}  // namespace

void token_rows(const Call& call, int64_t b, int64_t s, int64_t tokens, bool narrow, bool apart, float* own,
                const float** cos, const float** sin) {
  rows_of_floats(call, b, s, tokens, narrow, apart, own, cos, sin);
}

void token_rows(const Call& call, int64_t b, int64_t s, int64_t tokens, bool narrow, bool apart, double* own,
                const double** cos, const double** sin) {
  rows_of(call, b, s, tokens, narrow, apart, own, cos, sin);
}

}  // namespace rope
