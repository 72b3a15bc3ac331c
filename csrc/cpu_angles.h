// Rows of cosines and sines on a CPU: of tables, or made from fixed-point frequencies.
#pragma once

#include "cpu_types.h"
#include "launch.h"

namespace rope {

// Cosine and sine of an angle in 2^-32 revolutions in float64, to about its rounding. As cos_sin() of rotary.h: what
// is left of the nearest quarter revolution, and Taylor's series, which end below 2^-55 there.
ROPE_INLINE void cos_sin(int32_t revolutions, double& cos, double& sin) {
  const uint32_t quarter = static_cast<uint32_t>(revolutions) + (1u << 29);
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
  s = s * z * x + x;
  double c = 1.0 / 20922789888000.0;
  c = c * z - 1.0 / 87178291200.0;
  c = c * z + 1.0 / 479001600.0;
  c = c * z - 1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  c = c * z + 1.0;
  const bool odd = quarter & (1u << 30);
  const double cos_size = odd ? s : c, sin_size = odd ? c : s;
  cos = (quarter + (1u << 30)) & (1u << 31) ? -cos_size : cos_size;
  sin = quarter & (1u << 31) ? -sin_size : sin_size;
}

// Where the entry of a pair is in a row. Apart: the even entries first, then the odd ones.
ROPE_INLINE int64_t entry_of(int64_t pair, bool apart, int64_t num_pairs) {
  return apart ? pair / 2 + pair % 2 * (num_pairs / 2) : pair;
}

// Rows of a position from fixed-point frequencies, computed in float64 and rounded once as fixed_point.tables does.
ROPE_INLINE void make_rows(const Call& call, int64_t position, bool apart, float* cos, float* sin) {
  constexpr int64_t kSome = 64;
  const double cos_factor = call.scaling, sin_factor = call.conjugate ? -call.scaling : call.scaling;
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
      cos_sin(revolutions[i], c, s);
      some_cos[i] = static_cast<float>(c * cos_factor);
      some_sin[i] = static_cast<float>(s * sin_factor);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t entry = entry_of(start + i, apart, call.num_pairs);
      cos[entry] = some_cos[i];
      sin[entry] = some_sin[i];
    }
  }
}

// A row of a table as the loops want it: as it lies, or in own (room for num_pairs entries) where it has to be
// changed. For 16-bit heads NaN is made the plain one, and entries may have to be apart. Row is null for a token that
// is not rotated.
template <typename T, typename Compute>
ROPE_INLINE const Compute* table_row(const Compute* row, bool negate, bool apart, int64_t num_pairs,
                                     Compute* own) {
  if (!row) return nullptr;
  if constexpr (sizeof(T) == 2) {
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
  if (!negate) return row;
  for (int64_t i = 0; i < num_pairs; ++i) own[i] = -row[i];
  return own;
}

// Rows of token s of batch entry b, or null ones. Own holds 2 * num_pairs elements.
template <typename T, typename Compute>
ROPE_INLINE void token_rows(const Call& call, int64_t b, int64_t s, bool apart, Compute* own,
                            const Compute*& cos, const Compute*& sin) {
  const int64_t position = position_of(call, b, s);
  if constexpr (sizeof(Compute) == sizeof(float)) {
    if (call.inv_freq_q64) {
      cos = position == kNowhere ? nullptr : own;
      sin = position == kNowhere ? nullptr : own + call.num_pairs;
      if (cos) make_rows(call, position, apart, own, own + call.num_pairs);
      return;
    }
  }
  const bool known = position >= 0 && position < call.rows;
  const Compute* cos_row =
      static_cast<const Compute*>(call.cos) + (known ? b * call.cos_b + position * call.cos_s : 0);
  const Compute* sin_row =
      static_cast<const Compute*>(call.sin) + (known ? b * call.sin_b + position * call.sin_s : 0);
  cos = table_row<T>(known ? cos_row : nullptr, false, apart, call.num_pairs, own);
  sin = table_row<T>(known ? sin_row : nullptr, call.conjugate != 0, apart, call.num_pairs,
                     own + call.num_pairs);
}

}  // namespace rope
