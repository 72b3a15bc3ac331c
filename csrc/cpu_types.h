// The types of heads on a CPU, and how they are read and written: converted by integer arithmetic without branches,
// which every compiler vectorizes; measured against explicit vectors this loses little and needs no header of torch.
#pragma once

#include "rotary.h"

namespace rope {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

ROPE_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

ROPE_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Between float32 and a 16-bit type whose bits stand in the lower half of a word, or in the upper one. Without
// branches, and in 32-bit lanes throughout; to nearest, ties to even, and NaN stays NaN.
//
// A bfloat16 is rounded without a look at NaN: the NaN of an operation has the payload of an operand or none, and
// bfloat16 heads, biases and the tables (see cpu_angles.h) have none in the lower 16 bits, so rounding adds nothing.
ROPE_INLINE uint32_t round_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
ROPE_INLINE float lower(BFloat16, uint32_t word) { return from_bits(word << 16); }
ROPE_INLINE float upper(BFloat16, uint32_t word) { return from_bits(word & 0xffff0000u); }
ROPE_INLINE uint32_t to_lower(BFloat16, float value) { return round_bfloat16(value) >> 16; }
ROPE_INLINE uint32_t to_upper(BFloat16, float value) { return round_bfloat16(value) & 0xffff0000u; }

ROPE_INLINE float lower(Half, uint32_t word) {
  const uint32_t exponent = word & 0x7c00u;
  const uint32_t shifted = ((word & 0x7fffu) << 13) + (112u << 23);
  const uint32_t normal = shifted + (exponent == 0x7c00u ? 112u << 23 : 0u);
  // A subnormal is a normal float32: let the subtraction normalize it.
  const uint32_t small = bits_of(from_bits(shifted + (1u << 23)) - from_bits(113u << 23));
  return from_bits((exponent == 0 ? small : normal) | (word & 0x8000u) << 16);
}
ROPE_INLINE float upper(Half type, uint32_t word) { return lower(type, word >> 16); }
ROPE_INLINE uint32_t to_lower(Half, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t size = bits & 0x7fffffffu;
  const uint32_t large = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // Adding 0.5 aligns the bits of a subnormal result at the end of the mantissa, and the addition rounds.
  const uint32_t small = bits_of(from_bits(size) + from_bits(126u << 23)) - (126u << 23);
  const uint32_t normal = (size + ((size >> 13) & 1u) + 0xfffu - (112u << 23)) >> 13;
  const uint32_t result = size >= 0x47800000u ? large : (size < (113u << 23) ? small : normal);
  return result | ((bits >> 16) & 0x8000u);
}
ROPE_INLINE uint32_t to_upper(Half type, float value) { return to_lower(type, value) << 16; }

ROPE_INLINE float load(const float* x, int64_t i) { return x[i]; }
ROPE_INLINE double load(const double* x, int64_t i) { return x[i]; }
template <typename T>
ROPE_INLINE float load(const T* x, int64_t i) {
  return lower(T{}, x[i].bits);
}
ROPE_INLINE void store(float* x, int64_t i, float value) { x[i] = value; }
ROPE_INLINE void store(double* x, int64_t i, double value) { x[i] = value; }
template <typename T>
ROPE_INLINE void store(T* x, int64_t i, float value) {
  x[i].bits = static_cast<uint16_t>(to_lower(T{}, value));
}

template <typename T>
ROPE_INLINE uint32_t load_word(const T* x) {
  uint32_t word;
  std::memcpy(&word, x, sizeof word);
  return word;
}

template <typename T>
ROPE_INLINE void store_word(T* x, uint32_t word) {
  std::memcpy(x, &word, sizeof word);
}

template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

}  // namespace rope
