// The rotation on a CPU: float32, float64, float16 and bfloat16, in place or not, any strides but the innermost.
//
// Plain loops over rotary.h that the compiler turns into vectors, once for each level of x86-64. What is compiled so
// often is kept small: a block of one type and layout, with or without a bias. All else is compiled once.
#include "cpu_tokens.h"

namespace rope {
namespace {

// 16-bit heads are rotated two elements at a time, as the halves of a word: widening to 32-bit lanes and
// narrowing again would cost as much as the rotation. Where halves are read or written, a word of them has members
// of two pairs, which takes the even entries of the tables apart from the odd ones.
bool in_words(const Call& call) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  return size_of(call.dtype) == 2 &&
         ((call.interleaved_in && call.interleaved_out) || call.num_pairs % 2 == 0);
#else
  return false;
#endif
}

bool tables_apart(const Call& call) {
  return in_words(call) && !(call.interleaved_in && call.interleaved_out);
}

// In, Out: whether the pairs are interleaved in what is read and in what is written.
template <typename T, bool In, bool Out, bool Biased>
ROPE_INLINE void rotate_words(const T* in, T* out, const T* bias, const float* cos, const float* sin,
                              int64_t num_pairs) {
  const T type{};
  if constexpr (In && Out) {
    ROPE_VECTORIZE
    for (int64_t i = 0; i < num_pairs; ++i) {
      const uint32_t word = load_word(in + 2 * i);
      float first = lower(type, word), second = upper(type, word);
      if constexpr (Biased) {
        const uint32_t more = load_word(bias + 2 * i);
        first += lower(type, more);
        second += upper(type, more);
      }
      rotate(first, second, cos[i], sin[i], first, second);
      store_word(out + 2 * i, to_lower(type, first) | to_upper(type, second));
    }
  } else {
    const float* odd_cos = cos + num_pairs / 2;
    const float* odd_sin = sin + num_pairs / 2;
    ROPE_VECTORIZE
    for (int64_t i = 0; i < num_pairs / 2; ++i) {
      // Two pairs: halves have their first members in one word and their second ones in another.
      const int64_t a_at = In ? 4 * i : 2 * i, b_at = In ? 4 * i + 2 : num_pairs + 2 * i;
      const uint32_t a = load_word(in + a_at), b = load_word(in + b_at);
      float a_lower = lower(type, a), a_upper = upper(type, a);
      float b_lower = lower(type, b), b_upper = upper(type, b);
      if constexpr (Biased) {
        const uint32_t more_a = load_word(bias + a_at), more_b = load_word(bias + b_at);
        a_lower += lower(type, more_a);
        a_upper += upper(type, more_a);
        b_lower += lower(type, more_b);
        b_upper += upper(type, more_b);
      }
      float first, second, odd_first, odd_second;
      rotate(a_lower, In ? a_upper : b_lower, cos[i], sin[i], first, second);
      rotate(In ? b_lower : a_upper, b_upper, odd_cos[i], odd_sin[i], odd_first, odd_second);
      store_word(out + (Out ? 4 * i : 2 * i),
                 to_lower(type, first) | to_upper(type, Out ? second : odd_first));
      store_word(out + (Out ? 4 * i + 2 : num_pairs + 2 * i),
                 to_lower(type, Out ? odd_first : second) | to_upper(type, odd_second));
    }
  }
}

template <bool In, bool Out, bool Biased>
ROPE_INLINE void rotate_pairs(const float* in, float* out, const float* bias, const float* cos,
                              const float* sin, int64_t num_pairs) {
  ROPE_VECTORIZE
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int64_t a = first_of<In>(i), b = second_of<In>(i, num_pairs);
    const float x = Biased ? in[a] + bias[a] : in[a], y = Biased ? in[b] + bias[b] : in[b];
    float first, second;
    rotate(x, y, cos[i], sin[i], first, second);
    out[first_of<Out>(i)] = first;
    out[second_of<Out>(i, num_pairs)] = second;
  }
}

// One head. Its size is not a template's argument: 16 seconds of compilation bought nothing measurable.
template <typename T, bool In, bool Out, bool Biased>
struct Fast {
  ROPE_INLINE void operator()(const Call& call, const T* in, T* out, const T* bias, const float* cos,
                              const float* sin, int64_t num_pairs) const {
    if constexpr (sizeof(T) == 2) {
      rotate_words<T, In, Out, Biased>(in, out, bias, cos, sin, num_pairs);
    } else {
      rotate_pairs<In, Out, Biased>(in, out, bias, cos, sin, num_pairs);
    }
    if constexpr (Biased) {
      for (int64_t i = 2 * num_pairs; i < call.head_dim; ++i) store(out, i, load(in, i) + load(bias, i));
    } else if (in != out && 2 * num_pairs < call.head_dim) {
      std::memcpy(out + 2 * num_pairs, in + 2 * num_pairs,
                  static_cast<size_t>(call.head_dim - 2 * num_pairs) * sizeof(T));
    }
  }
};

// One head of a rare form: float64, or an odd number of pairs in 16 bits.
template <typename T>
struct Rare {
  template <typename Compute>
  ROPE_INLINE void operator()(const Call& call, const T* in, T* out, const T* bias, const Compute* cos,
                              const Compute* sin, int64_t num_pairs) const {
    const int64_t in_step = call.interleaved_in ? 2 : 1, in_second = call.interleaved_in ? 1 : num_pairs;
    const int64_t out_step = call.interleaved_out ? 2 : 1, out_second = call.interleaved_out ? 1 : num_pairs;
    for (int64_t i = 0; i < num_pairs; ++i) {
      const int64_t a = in_step * i, b = a + in_second;
      Compute first = load(in, a), second = load(in, b);
      if (bias) {
        first += load(bias, a);
        second += load(bias, b);
      }
      rotate(first, second, cos[i], sin[i], first, second);
      store(out, out_step * i, first);
      store(out, out_step * i + out_second, second);
    }
    for (int64_t i = 2 * num_pairs; i < call.head_dim; ++i) {
      if (bias) {
        store(out, i, load(in, i) + load(bias, i));
      } else {
        out[i] = in[i];
      }
    }
  }
};

template <typename T, typename Head, typename Compute>
ROPE_INLINE void rotate_block(const Call& call, const Heads& x, const Block<Compute>& block,
                              const Head& rotate_head) {
  const T* in = static_cast<const T*>(x.in) + block.b * x.in_b + block.s * x.in_s;
  T* out = static_cast<T*>(x.out) + block.b * x.out_b + block.s * x.out_s;
  const T* bias = static_cast<const T*>(x.bias);
  const bool by_head = x.in_h > x.in_s;
  const int64_t outer = by_head ? x.heads : block.tokens, inner = by_head ? block.tokens : x.heads;
  Ahead<T> ahead(in, in + block.tokens * x.in_s, outer, inner, by_head ? x.in_h : x.in_s,
                 by_head ? x.in_s : x.in_h, call.head_dim);
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j) {
      ahead();
      const int64_t head = by_head ? i : j, token = by_head ? j : i;
      // A token without a row passes through: as one of which nothing is rotated.
      rotate_head(call, in + token * x.in_s + head * x.in_h, out + token * x.out_s + head * x.out_h,
                  bias ? bias + head * call.head_dim : nullptr, block.cos[token], block.sin[token],
                  block.cos[token] ? call.num_pairs : 0);
    }
  }
}

template <typename T, bool Biased>
ROPE_INLINE void rotate_fast(const Call& call, const Heads& x, const Block<float>& block) {
  if (call.interleaved_in && call.interleaved_out) {
    rotate_block<T>(call, x, block, Fast<T, true, true, Biased>{});
  } else if (call.interleaved_in) {
    rotate_block<T>(call, x, block, Fast<T, true, false, Biased>{});
  } else if (call.interleaved_out) {
    rotate_block<T>(call, x, block, Fast<T, false, true, Biased>{});
  } else {
    rotate_block<T>(call, x, block, Fast<T, false, false, Biased>{});
  }
}

#define ROPE_FAST(name, type, biased)                                                  \
  ROPE_CLONES void name(const Call& call, const Heads& x, const Block<float>& block) { \
    rotate_fast<type, biased>(call, x, block);                                         \
  }
ROPE_FAST(rotate_float32, float, false)
ROPE_FAST(rotate_float16, Half, false)
ROPE_FAST(rotate_bfloat16, BFloat16, false)
ROPE_FAST(biased_float32, float, true)
ROPE_FAST(biased_float16, Half, true)
ROPE_FAST(biased_bfloat16, BFloat16, true)

template <typename T, typename Compute>
void rotate_rare(const Call& call, const Heads& x, const Block<Compute>& block) {
  rotate_block<T>(call, x, block, Rare<T>{});
}

template <typename Compute>
using Rotate = void (*)(const Call&, const Heads&, const Block<Compute>&);

// Tokens [first, last) of batch * length. Scratch holds 2 * kBlock * num_pairs elements.
template <typename Compute>
void rotate_tokens(const Call& call, Rotate<Compute> q, Rotate<Compute> k, int64_t first, int64_t last,
                   void* scratch) {
  Block<Compute> block;
  for (; first < last; first += block.tokens) {
    block_at(call, first, last, tables_apart(call), static_cast<Compute*>(scratch), block);
    q(call, call.q, block);
    if (call.k.heads > 0) k(call, call.k, block);
  }
}

Rotate<float> rotate_of(const Call& call, const Heads& x) {
  if (call.dtype == kFloat32) return x.bias ? biased_float32 : rotate_float32;
  if (call.dtype == kFloat16) {
    return !in_words(call) ? rotate_rare<Half, float> : x.bias ? biased_float16 : rotate_float16;
  }
  return !in_words(call) ? rotate_rare<BFloat16, float> : x.bias ? biased_bfloat16 : rotate_bfloat16;
}

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
  if (!supported(*call)) return kUnsupported;
  const int64_t tokens = call->batch * call->length;
  const int64_t bytes = tokens * (call->q.heads + call->k.heads) * call->head_dim * size_of(call->dtype);
  if (bytes == 0) return kDone;
  if (threads > bytes / kBytesAThread) threads = bytes / kBytesAThread;
  const int64_t scratch_size = 2 * kBlock * call->num_pairs * compute_size_of(call->dtype);
  return run_threads(tokens, threads, scratch_size, [=](int64_t first, int64_t last, void* scratch) {
    if (call->dtype == kFloat64) {
      const Rotate<double> rotate = rotate_rare<double, double>;
      rotate_tokens(*call, rotate, rotate, first, last, scratch);
    } else {
      rotate_tokens(*call, rotate_of(*call, call->q), rotate_of(*call, call->k), first, last, scratch);
    }
  });
}
