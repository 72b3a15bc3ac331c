// The rotation on a CPU: float32, float64, float16 and bfloat16, in place or not, any strides but the innermost.
//
// Plain loops over rotary.h that the compiler turns into vectors, once for each level of x86-64.
#include <initializer_list>

#include "cpu_tokens.h"

namespace rope {
namespace {

// 16-bit heads are rotated two elements at a time, as the halves of a word: widening to 32-bit lanes and
// narrowing again would cost as much as the rotation. Where halves are read or written, a word of them has members
// of two pairs, which takes the even entries of the tables apart from the odd ones.
//
// In, Out: whether the pairs are interleaved in what is read and in what is written.
template <typename T, bool In, bool Out>
ROPE_INLINE bool in_words(int64_t num_pairs) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  return sizeof(T) == 2 && ((In && Out) || num_pairs % 2 == 0);
#else
  return false;
#endif
}

template <typename T, bool In, bool Out>
ROPE_INLINE bool tables_apart(int64_t num_pairs) {
  return in_words<T, In, Out>(num_pairs) && !(In && Out);
}

template <typename T, bool In, bool Out>
ROPE_INLINE void rotate_words(const T* in, T* out, const float* cos, const float* sin, int64_t num_pairs) {
  const T type{};
  if (In && Out) {
    ROPE_VECTORIZE
    for (int64_t i = 0; i < num_pairs; ++i) {
      const uint32_t word = load_word(in + 2 * i);
      float first, second;
      rotate(lower(type, word), upper(type, word), cos[i], sin[i], first, second);
      store_word(out + 2 * i, to_lower(type, first) | to_upper(type, second));
    }
    return;
  }
  const float* odd_cos = cos + num_pairs / 2;
  const float* odd_sin = sin + num_pairs / 2;
  ROPE_VECTORIZE
  for (int64_t i = 0; i < num_pairs / 2; ++i) {
    // Two pairs: halves have their first members in one word and their second ones in another.
    const uint32_t a = load_word(in + (In ? 4 * i : 2 * i));
    const uint32_t b = load_word(in + (In ? 4 * i + 2 : num_pairs + 2 * i));
    float first, second, odd_first, odd_second;
    rotate(lower(type, a), In ? upper(type, a) : lower(type, b), cos[i], sin[i], first, second);
    rotate(In ? lower(type, b) : upper(type, a), upper(type, b), odd_cos[i], odd_sin[i], odd_first,
           odd_second);
    store_word(out + (Out ? 4 * i : 2 * i), to_lower(type, first) | to_upper(type, Out ? second : odd_first));
    store_word(out + (Out ? 4 * i + 2 : num_pairs + 2 * i),
               to_lower(type, Out ? odd_first : second) | to_upper(type, odd_second));
  }
}

template <typename T, bool In, bool Out, typename Compute>
ROPE_INLINE void rotate_pairs(const T* in, T* out, const Compute* cos, const Compute* sin,
                              int64_t num_pairs) {
  ROPE_VECTORIZE
  for (int64_t i = 0; i < num_pairs; ++i) {
    Compute first, second;
    rotate(load(in, first_of<In>(i)), load(in, second_of<In>(i, num_pairs)), cos[i], sin[i], first, second);
    store(out, first_of<Out>(i), first);
    store(out, second_of<Out>(i, num_pairs), second);
  }
}

// Without words, and with a bias.
template <typename T, bool In, bool Out, typename Compute>
ROPE_INLINE void rotate_biased(const T* in, T* out, const T* bias, const Compute* cos, const Compute* sin,
                               int64_t num_pairs, int64_t head_dim) {
  const bool apart = tables_apart<T, In, Out>(num_pairs);
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int64_t a = first_of<In>(i), b = second_of<In>(i, num_pairs);
    const int64_t entry = entry_of(i, apart, num_pairs);
    Compute first, second;
    rotate(load(in, a) + load(bias, a), load(in, b) + load(bias, b), cos[entry], sin[entry], first, second);
    store(out, first_of<Out>(i), first);
    store(out, second_of<Out>(i, num_pairs), second);
  }
  for (int64_t i = 2 * num_pairs; i < head_dim; ++i) store(out, i, load(in, i) + load(bias, i));
}

// One head. Its size is not a template's argument: 16 seconds of compilation bought nothing measurable.
template <typename T, bool In, bool Out, typename Compute>
ROPE_INLINE void rotate_head(const T* in, T* out, const T* bias, const Compute* cos, const Compute* sin,
                             int64_t num_pairs, int64_t head_dim) {
  if (bias) {
    rotate_biased<T, In, Out>(in, out, bias, cos, sin, num_pairs, head_dim);
    return;
  }
  if constexpr (sizeof(T) == 2) {
    if (in_words<T, In, Out>(num_pairs)) {
      rotate_words<T, In, Out>(in, out, cos, sin, num_pairs);
    } else {
      rotate_pairs<T, In, Out>(in, out, cos, sin, num_pairs);
    }
  } else {
    rotate_pairs<T, In, Out>(in, out, cos, sin, num_pairs);
  }
  if (in != out && 2 * num_pairs < head_dim) {
    std::memcpy(out + 2 * num_pairs, in + 2 * num_pairs,
                static_cast<size_t>(head_dim - 2 * num_pairs) * sizeof(T));
  }
}

template <typename T, bool In, bool Out, typename Compute>
ROPE_INLINE void rotate_block(const Call& call, const Heads& x, int64_t b, int64_t s, int64_t tokens,
                              const Compute* const* cos, const Compute* const* sin) {
  const T* in = static_cast<const T*>(x.in) + b * x.in_b + s * x.in_s;
  T* out = static_cast<T*>(x.out) + b * x.out_b + s * x.out_s;
  const T* bias = static_cast<const T*>(x.bias);
  const bool by_head = x.in_h > x.in_s;
  const int64_t outer = by_head ? x.heads : tokens, inner = by_head ? tokens : x.heads;
  Ahead<T> ahead(in, in + tokens * x.in_s, outer, inner, by_head ? x.in_h : x.in_s, by_head ? x.in_s : x.in_h,
                 call.head_dim);
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j) {
      ahead();
      const int64_t head = by_head ? i : j, token = by_head ? j : i;
      // A token without a row passes through: as one of which nothing is rotated.
      rotate_head<T, In, Out>(in + token * x.in_s + head * x.in_h, out + token * x.out_s + head * x.out_h,
                              bias ? bias + head * call.head_dim : nullptr, cos[token], sin[token],
                              cos[token] ? call.num_pairs : 0, call.head_dim);
    }
  }
}

// Tokens [first, last) of batch * length. Scratch holds 2 * kBlock * num_pairs elements.
template <typename T, bool In, bool Out>
ROPE_INLINE void rotate_tokens(const Call& call, int64_t first, int64_t last, void* scratch) {
  using Compute = typename ComputeOf<T>::type;
  Block<Compute> block;
  for (; first < last; first += block.tokens) {
    block_at<T>(call, first, last, tables_apart<T, In, Out>(call.num_pairs), static_cast<Compute*>(scratch),
                block);
    for (const Heads* x : {&call.q, &call.k}) {
      rotate_block<T, In, Out>(call, *x, block.b, block.s, block.tokens, block.cos, block.sin);
    }
  }
}

template <typename T>
ROPE_INLINE void rotate_any(const Call& call, int64_t first, int64_t last, void* scratch) {
  if (call.interleaved_in && call.interleaved_out) {
    rotate_tokens<T, true, true>(call, first, last, scratch);
  } else if (call.interleaved_in) {
    rotate_tokens<T, true, false>(call, first, last, scratch);
  } else if (call.interleaved_out) {
    rotate_tokens<T, false, true>(call, first, last, scratch);
  } else {
    rotate_tokens<T, false, false>(call, first, last, scratch);
  }
}

ROPE_CLONES void rotate_float32(const Call& call, int64_t first, int64_t last, void* scratch) {
  rotate_any<float>(call, first, last, scratch);
}
ROPE_CLONES void rotate_float64(const Call& call, int64_t first, int64_t last, void* scratch) {
  rotate_any<double>(call, first, last, scratch);
}
ROPE_CLONES void rotate_float16(const Call& call, int64_t first, int64_t last, void* scratch) {
  rotate_any<Half>(call, first, last, scratch);
}
ROPE_CLONES void rotate_bfloat16(const Call& call, int64_t first, int64_t last, void* scratch) {
  rotate_any<BFloat16>(call, first, last, scratch);
}

using Range = void (*)(const Call&, int64_t, int64_t, void*);

}  // namespace
}  // namespace rope

ROPE_EXPORT int rope_dist_cpu_abi() { return ROPE_ABI; }

// Compiler and instruction sets, for `rope-dist info`.
ROPE_EXPORT const char* rope_dist_cpu_build() {
#if defined(__clang__)
  return "clang " __clang_version__ ", " ROPE_LEVELS;
#elif defined(__GNUC__)
  return "gcc " __VERSION__ ", " ROPE_LEVELS;
#else
  return "another compiler, " ROPE_LEVELS;
#endif
}

// Rotates q and k, with at most that many threads. Each token is worked on by one thread in one way, so the
// results do not depend on their number.
ROPE_EXPORT int rope_dist_cpu_rotary(const rope::Call* call, int64_t threads) {
  using namespace rope;
  static const Range ranges[] = {rotate_float32, rotate_float64, rotate_float16, rotate_bfloat16};
  if (!supported(*call)) return kUnsupported;
  const Range range = ranges[call->dtype];
  const int64_t tokens = call->batch * call->length;
  const int64_t bytes = tokens * (call->q.heads + call->k.heads) * call->head_dim * size_of(call->dtype);
  if (bytes == 0) return kDone;
  if (threads > bytes / kBytesAThread) threads = bytes / kBytesAThread;
  return run_threads(tokens, threads, 2 * kBlock * call->num_pairs * compute_size_of(call->dtype),
                     [=](int64_t first, int64_t last, void* scratch) { range(*call, first, last, scratch); });
}
