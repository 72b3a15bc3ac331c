// What one GPU thread does, as a function of its place in the grid, so that a CPU can run it as well (the tests do).
//
// A block takes one token. Across, a thread owns as many pairs as make 16 bytes and keeps their cosines and sines;
// down, the rows of the block go over the heads of q and k. So each table entry, or each polynomial, is made once
// a row and used for several heads, and every access to the heads is one of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"
#include "rotary.h"

// The tests define it to see whether an access is aligned, without which a GPU faults.
#if !defined(ROPE_ON_ACCESS)
#define ROPE_ON_ACCESS(address, bytes)
#endif

namespace rope {

ROPE_INLINE float to_float(float x) { return x; }
ROPE_INLINE float to_float(__half x) { return __half2float(x); }
ROPE_INLINE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
ROPE_INLINE void round_to(float x, float& out) { out = x; }
ROPE_INLINE void round_to(float x, __half& out) { out = __float2half_rn(x); }
ROPE_INLINE void round_to(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// What one instruction loads or stores.
template <int Bytes>
struct Access;
template <>
struct Access<16> {
  using type = uint4;
};
template <>
struct Access<8> {
  using type = uint2;
};
template <>
struct Access<4> {
  using type = uint32_t;
};
template <>
struct Access<2> {
  using type = uint16_t;
};

// The compiler takes a store of 16 bytes apart again, into one for each element.
template <typename Type>
ROPE_INLINE void store_whole(void* to, const Type& word) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Type) == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x),
                 "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
    return;
  }
#endif
  *static_cast<Type*>(to) = word;
}

// N elements from x on, as float32, in accesses of at most 16 bytes and that many elements: x is aligned to those.
template <int N, int Most = N, typename T>
ROPE_INLINE void load_some(const T* x, float* out) {
  constexpr int kSize = static_cast<int>(sizeof(T)), kCount = Most * kSize > 16 ? 16 / kSize : Most;
  using Type = typename Access<kCount * kSize>::type;
#pragma unroll
  for (int i = 0; i < N; i += kCount) {
    ROPE_ON_ACCESS(x + i, sizeof(Type));
    const Type word = *reinterpret_cast<const Type*>(x + i);
    T part[kCount];
    memcpy(part, &word, sizeof word);
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[i + j] = to_float(part[j]);
  }
}

template <int N, int Most = N, typename T>
ROPE_INLINE void store_some(T* x, const float* values) {
  constexpr int kSize = static_cast<int>(sizeof(T)), kCount = Most * kSize > 16 ? 16 / kSize : Most;
  using Type = typename Access<kCount * kSize>::type;
#pragma unroll
  for (int i = 0; i < N; i += kCount) {
    T part[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) round_to(values[i + j], part[j]);
    Type word;
    memcpy(&word, part, sizeof word);
    ROPE_ON_ACCESS(x + i, sizeof(Type));
    store_whole(x + i, word);
  }
}

// Cosines and sines of pairs [pair, pair + N) at a position; 1 and 0 for a token that has none. (A branch around the
// rotation, which would keep infinities from their partners, costs registers: spills on sm_120.)
template <int N>
ROPE_INLINE void angles_of(const Call& call, int64_t b, int64_t position, int64_t pair, float* cos,
                           float* sin) {
  const float sign = call.conjugate ? -1.0f : 1.0f;
  if (call.inv_freq_q64) {
    const float scaling = static_cast<float>(call.scaling);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int32_t revolutions = angle(static_cast<int32_t>(position), call.inv_freq_q64[pair + i],
                                        call.inv_freq_q64[call.num_pairs + pair + i]);
      cos_sin(revolutions, cos[i], sin[i]);
      cos[i] = position == kNowhere ? 1.0f : cos[i] * scaling;
      sin[i] = position == kNowhere ? 0.0f : sin[i] * scaling * sign;
    }
    return;
  }
  const bool known = position >= 0 && position < call.rows;
  const float* cos_row = static_cast<const float*>(call.cos) + b * call.cos_b + position * call.cos_s + pair;
  const float* sin_row = static_cast<const float*>(call.sin) + b * call.sin_b + position * call.sin_s + pair;
  if (known && N % 4 == 0 &&
      (reinterpret_cast<uintptr_t>(cos_row) | reinterpret_cast<uintptr_t>(sin_row)) % 16 == 0) {
    load_some<N>(cos_row, cos);
    load_some<N>(sin_row, sin);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      cos[i] = known ? cos_row[i] : 1.0f;
      sin[i] = known ? sin_row[i] : 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) sin[i] *= sign;
}

// N pairs of one head: adjacent ones, whose members are N elements in each half, or 2 N neighbours. In, Out: whether
// pairs are interleaved in what is read and in what is written.
template <typename T, bool In, bool Out, int N>
ROPE_INLINE void rotate_some(const T* in, T* out, const T* bias, int64_t pair, int64_t num_pairs,
                             const float* cos, const float* sin) {
  // Heads that are not aligned have N 1, and then a pair of neighbours may not be aligned to its size.
  constexpr int kMost = N == 1 ? 1 : 2 * N;
  float x[2 * N], y[2 * N];
  if (In) {
    load_some<2 * N, kMost>(in + 2 * pair, x);
  } else {
    load_some<N>(in + pair, x);
    load_some<N>(in + num_pairs + pair, x + N);
  }
  if (bias) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[In ? 2 * i : i] += to_float(bias[first_of<In>(pair + i)]);
      x[In ? 2 * i + 1 : N + i] += to_float(bias[second_of<In>(pair + i, num_pairs)]);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    rotate(x[In ? 2 * i : i], x[In ? 2 * i + 1 : N + i], cos[i], sin[i], y[Out ? 2 * i : i],
           y[Out ? 2 * i + 1 : N + i]);
  }
  if (Out) {
    store_some<2 * N, kMost>(out + 2 * pair, y);
  } else {
    store_some<N>(out + pair, y);
    store_some<N>(out + num_pairs + pair, y + N);
  }
}

// The dimensions from first on, which pass through, shared by the threads of a row.
template <typename T>
ROPE_INLINE void pass_rest(const Call& call, const T* in, T* out, const T* bias, int64_t first, int column,
                           int columns) {
  if (in == out && !bias) return;
  for (int64_t i = first + column; i < call.head_dim; i += columns) {
    if (bias) {
      round_to(to_float(in[i]) + to_float(bias[i]), out[i]);
    } else {
      out[i] = in[i];
    }
  }
}

// Thread (column, row) of columns x rows in the block of a token. Bias: some heads have one.
template <typename T, bool In, bool Out, int N, bool Bias>
ROPE_INLINE void rotate_thread(const Call& call, int64_t token, int column, int row, int columns, int rows) {
  const int64_t b = token / call.length, s = token % call.length;
  const int64_t position = position_of(call, b, s);
  const int64_t heads = call.q.heads + call.k.heads;
  // Angles of zero leave a token as it is where pairs stay in their places; elsewhere it has to be copied.
  const bool known =
      In == Out || (call.inv_freq_q64 ? position != kNowhere : position >= 0 && position < call.rows);
  // Wide heads take several rounds; the usual ones take one.
  for (int64_t pair = static_cast<int64_t>(column) * N;
       pair < call.num_pairs || pair == static_cast<int64_t>(column) * N;
       pair += static_cast<int64_t>(columns) * N) {
    const bool rotated = pair < call.num_pairs && known;
    const bool once = pair == static_cast<int64_t>(column) * N;
    float cos[N], sin[N];
    if (rotated) angles_of<N>(call, b, position, pair, cos, sin);
    // Two heads at a time keep more accesses under way; with pairs that change their order registers would spill.
#pragma unroll(Bias || In != Out ? 1 : 2)
    for (int64_t head = row; head < heads; head += rows) {
      const bool query = head < call.q.heads;
      const Heads& x = query ? call.q : call.k;
      const int64_t own = query ? head : head - call.q.heads;
      const T* in = static_cast<const T*>(x.in) + b * x.in_b + s * x.in_s + own * x.in_h;
      T* out = static_cast<T*>(x.out) + b * x.out_b + s * x.out_s + own * x.out_h;
      const T* bias = Bias && x.bias ? static_cast<const T*>(x.bias) + own * call.head_dim : nullptr;
      if (rotated) rotate_some<T, In, Out, N>(in, out, bias, pair, call.num_pairs, cos, sin);
      if (once) pass_rest(call, in, out, bias, known ? 2 * call.num_pairs : 0, column, columns);
    }
  }
}

// Whether accesses of 16 bytes fit: every head starts on 16 bytes, and so do both halves.
template <typename T>
inline bool wide(const Call& call) {
  constexpr int64_t kVector = 16 / sizeof(T);
  bool fits =
      (call.interleaved_in && call.interleaved_out ? 2 * call.num_pairs : call.num_pairs) % kVector == 0;
  for (const Heads* x : {&call.q, &call.k}) {
    const int64_t all = x->in_b | x->in_s | x->in_h | x->out_b | x->out_s | x->out_h;
    fits = fits && all % kVector == 0 && reinterpret_cast<uintptr_t>(x->in) % 16 == 0 &&
           reinterpret_cast<uintptr_t>(x->out) % 16 == 0;
  }
  return fits;
}

// The shape of a block: columns for the pairs of a head, rows for heads, about 128 threads in all. With more the
// angles would be made more often, with fewer too few accesses would be under way.
struct Shape {
  int columns, rows;
};

inline Shape shape_of(const Call& call, int pairs) {
  const int64_t wanted = (call.num_pairs + pairs - 1) / pairs;
  const int64_t columns = wanted < 1 ? 1 : (wanted > 128 ? 128 : wanted);
  const int64_t heads = call.q.heads + call.k.heads;
  const int64_t rows = 128 / columns < heads ? 128 / columns : heads;
  return {static_cast<int>(columns), static_cast<int>(rows < 1 ? 1 : rows)};
}

// Calls launch.run<T, In, Out, N, Bias>() with the variant for this call; other results of rope::Status.
template <typename T, bool In, bool Out, typename Launch>
int choose_for(const Call& call, Launch& launch) {
  constexpr int kVector = 16 / sizeof(T), kPairs = In && Out ? kVector / 2 : kVector;
  const bool bias = call.q.bias || call.k.bias;
  if (!wide<T>(call))
    return bias ? launch.template run<T, In, Out, 1, true>() : launch.template run<T, In, Out, 1, false>();
  return bias ? launch.template run<T, In, Out, kPairs, true>()
              : launch.template run<T, In, Out, kPairs, false>();
}

template <typename T, typename Launch>
int choose_order(const Call& call, Launch& launch) {
  if (call.interleaved_in) {
    return call.interleaved_out ? choose_for<T, true, true>(call, launch)
                                : choose_for<T, true, false>(call, launch);
  }
  return call.interleaved_out ? choose_for<T, false, true>(call, launch)
                              : choose_for<T, false, false>(call, launch);
}

template <typename Launch>
int choose(const Call& call, Launch& launch) {
  const int64_t tokens = call.batch * call.length;
  if (tokens == 0 || call.head_dim == 0) return kDone;
  if (tokens > 0x7fffffff) return kUnsupported;
  switch (call.dtype) {
    case kFloat32:
      return choose_order<float>(call, launch);
    case kFloat16:
      return choose_order<__half>(call, launch);
    case kBFloat16:
      return choose_order<__nv_bfloat16>(call, launch);
    default:
      return kUnsupported;
  }
}

}  // namespace rope
