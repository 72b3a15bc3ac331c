// What the passes over a CPU's tokens share: blocks of tokens with their rows of the tables.
#pragma once

#include "cpu_angles.h"
#include "cpu_clones.h"
#include "cpu_threads.h"

namespace rope {

// Tokens that are worked on together where the heads of a token lie far apart ([B, H, S, D] transposed): one
// head's tokens are then contiguous, and the tables of a block stay in the first cache.
constexpr int64_t kBlock = 16;

// Prefetch distance in bytes: the few heads whose arithmetic a core overlaps keep too few reads in flight. In place,
// 16k tokens of LLaMA2-7B, rows of q, k and v, one thread: bfloat16 46 ms without and 31 with it, float32 66 and 55;
// adding 1 to as many 32-bit integers takes 25 and 54. Twice as far is slower by an eighth with norms: 8k tokens of
// Qwen3-0.6B in float32, two threads, take 7.4 and 6.6 ms.
constexpr int64_t kAhead = 2048;

template <typename T>
ROPE_INLINE void prefetch(const T* x, int64_t count) {
#if defined(__GNUC__)
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  int64_t i = 0;
  for (; i + 4 * kLine <= count; i += 4 * kLine) {
    __builtin_prefetch(x + i);
    __builtin_prefetch(x + i + kLine);
    __builtin_prefetch(x + i + 2 * kLine);
    __builtin_prefetch(x + i + 3 * kLine);
  }
  for (; i < count; i += kLine) __builtin_prefetch(x + i);
#endif
}

// Prefetches heads in the order in which they are read: the rows of a block one after the other, and then the next
// block's first.
template <typename T>
struct Ahead {
  const T* row;
  const T* next;
  const T* block;
  int64_t rows, inner, outer_step, inner_step, head_dim, left;

  ROPE_INLINE Ahead(const T* in, const T* next_block, int64_t outer, int64_t of_inner, int64_t of_outer_step,
                    int64_t of_inner_step, int64_t size)
      : row(in),
        block(next_block),
        rows(outer),
        inner(of_inner),
        outer_step(of_outer_step),
        inner_step(of_inner_step),
        head_dim(size) {
    const int64_t fit = kAhead / (head_dim * static_cast<int64_t>(sizeof(T)));
    const int64_t ahead = fit < inner ? fit : inner;
    next = row + ahead * inner_step;
    left = inner - ahead;
  }

  ROPE_INLINE void operator()() {
    if (left-- == 0) {
      row = --rows == 0 ? block : row + outer_step;
      next = row;
      left = inner - 1;
    }
    prefetch(next, head_dim);
    next += inner_step;
  }
};

// Tokens of one sequence of the batch that are worked on together, at most kBlock, with their rows of the tables.
template <typename Compute>
struct Block {
  int64_t b, s, tokens;
  const Compute* cos[kBlock];
  const Compute* sin[kBlock];
};

// The block from a token on, of those before last. Own holds 2 * kBlock * num_pairs elements.
template <typename Compute>
inline void block_at(const Call& call, int64_t first, int64_t last, bool apart, Compute* own,
                     Block<Compute>& block) {
  block.b = first / call.length;
  block.s = first % call.length;
  block.tokens = call.length - block.s;
  if (block.tokens > last - first) block.tokens = last - first;
  if (block.tokens > kBlock) block.tokens = kBlock;
  const bool narrow = call.dtype == kFloat16 || call.dtype == kBFloat16;
  token_rows(call, block.b, block.s, block.tokens, narrow, apart, own, block.cos, block.sin);
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
