// What the passes over a CPU's tokens share: loops for each level of x86-64, and blocks of tokens with their rows of the
// tables.
#pragma once

#include "cpu_angles.h"
#include "cpu_threads.h"

#if !defined(ROPE_NO_CLONES) && defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && \
    !defined(__clang__) && __GNUC__ >= 12
#define ROPE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define ROPE_LEVELS "x86-64-v4 x86-64-v3 x86-64"
#else
#define ROPE_CLONES
#define ROPE_LEVELS "one instruction set"
#endif

// Iterations do not depend on each other although in and out may be one array: each pair is read before it is
// written, and belongs to one iteration.
#if defined(__clang__)
#define ROPE_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define ROPE_VECTORIZE _Pragma("GCC ivdep")
#else
#define ROPE_VECTORIZE
#endif

namespace rope {

// Tokens that are worked on together where the heads of a token lie far apart ([B, H, S, D] transposed): one
// head's tokens are then contiguous, and the tables of a block stay in the first cache.
constexpr int64_t kBlock = 16;

// Prefetch distance in bytes: the few heads whose arithmetic a core overlaps keep too few reads in flight. In place,
// 16k tokens of LLaMA2-7B, rows of q, k and v, one thread: bfloat16 46 ms without and 31 with it, float32 66 and 55;
// adding 1 to as many 32-bit integers takes 25 and 54.
constexpr int64_t kAhead = 4096;

template <typename T>
ROPE_INLINE void prefetch(const T* x, int64_t count) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(x + i);
#endif
}

// Tokens of one sequence of the batch that are worked on together, at most kBlock, with their rows of the tables.
template <typename Compute>
struct Block {
  int64_t b, s, tokens;
  const Compute* cos[kBlock];
  const Compute* sin[kBlock];
};

// The block from a token on, of those before last. Own holds 2 * kBlock * num_pairs elements.
template <typename T, typename Compute>
ROPE_INLINE void block_at(const Call& call, int64_t first, int64_t last, bool apart, Compute* own,
                          Block<Compute>& block) {
  block.b = first / call.length;
  block.s = first % call.length;
  block.tokens = call.length - block.s;
  if (block.tokens > last - first) block.tokens = last - first;
  if (block.tokens > kBlock) block.tokens = kBlock;
  for (int64_t t = 0; t < block.tokens; ++t, own += 2 * call.num_pairs) {
    token_rows<T>(call, block.b, block.s + t, apart, own, block.cos[t], block.sin[t]);
  }
}

// Fewer bytes than this are worked on before another thread has started.
constexpr int64_t kBytesAThread = 512 * 1024;

// Whether the loops take such a call.
inline bool supported(const Call& call) {
  return call.dtype >= 0 && call.dtype <= 3 && !(call.inv_freq_q64 && call.dtype == kFloat64);
}

inline int64_t size_of(int64_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
inline int64_t compute_size_of(int64_t dtype) { return dtype == kFloat64 ? 8 : 4; }

}  // namespace rope
