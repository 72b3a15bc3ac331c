// The rotation itself, for host and device: no torch, no CUDA header, nothing but arithmetic.
//
// Compile with contraction of products and sums off (-ffp-contract=off, nvcc -fmad=false): every operation is
// then rounded as PyTorch rounds it, and the results equal rope_dist/ops/reference.py to the last bit.
// The passes are bound by memory; the multiply-adds saved would not be seen.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ROPE_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define ROPE_INLINE inline __attribute__((always_inline))
#else
#define ROPE_INLINE inline
#endif

namespace rope {

// Rotates the pair (first, second) by the angle. The conjugate rotation is the same with -sin: negating is exact.
template <typename Compute>
ROPE_INLINE void rotate(Compute first, Compute second, Compute cos, Compute sin, Compute& out_first,
                        Compute& out_second) {
  out_first = first * cos - second * sin;
  out_second = second * cos + first * sin;
}

// Where the members of pair i lie within a head: Hugging Face's halves, or GPT-J's neighbours.
template <bool Interleaved>
ROPE_INLINE int64_t first_of(int64_t i) {
  return Interleaved ? 2 * i : i;
}

template <bool Interleaved>
ROPE_INLINE int64_t second_of(int64_t i, int64_t num_pairs) {
  return Interleaved ? 2 * i + 1 : i + num_pairs;
}

// Angle of a position in 2^-32 revolutions; high and low are the halves of inv_freq_q64 (fixed_point.py), both signed.
ROPE_INLINE int32_t angle(int32_t position, int32_t high, int32_t low) {
  const int64_t carry = (static_cast<int64_t>(position) * low) >> 32;
  return static_cast<int32_t>(static_cast<uint32_t>(position) * static_cast<uint32_t>(high) +
                              static_cast<uint32_t>(carry));
}

ROPE_INLINE float flip_sign(float x, uint32_t sign) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits ^= sign & 0x80000000u;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// Cosine and sine of an angle in 2^-32 revolutions: the polynomials of rope_dist/ops/triton_angles.py, whose largest
// error is 7e-8. The library functions would reduce an argument that is reduced already.
ROPE_INLINE void cos_sin(int32_t revolutions, float& cos, float& sin) {
  // Two bits of this are the nearest quarter revolution; shifted out, what is left is the signed distance to it.
  const uint32_t quarter = static_cast<uint32_t>(revolutions) + (1u << 29);
  const float u = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(revolutions) << 2)) *
                  4.656612873077393e-10f;
  const float z = u * u;
  float s = fmaf(z, -3.588034451240674e-05f, 0.0024898769333958626f);
  s = fmaf(z, s, -0.08074536919593811f);
  s = fmaf(z, s, -3.271051340902886e-08f);
  s = fmaf(u, 0.7853981852531433f, u * s);
  float c = fmaf(z, 3.490520384730189e-06f, -0.000325863336911425f);
  c = fmaf(z, c, 0.015854282304644585f);
  c = fmaf(z, c, -0.3084251284599304f);
  c = fmaf(z, c, 1.0f);
  const bool odd = quarter & (1u << 30);
  cos = flip_sign(odd ? s : c, quarter + (1u << 30));
  sin = flip_sign(odd ? c : s, quarter);
}

}  // namespace rope
