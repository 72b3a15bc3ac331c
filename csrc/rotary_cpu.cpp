// The rotation on a CPU: float32, float64, float16 and bfloat16, in place or not, any strides but the innermost.
//
// Plain loops over rotary.h that the compiler turns into vectors, once for each level of x86-64. 16-bit types are
// converted by integer arithmetic without branches, which every compiler vectorizes; measured against explicit
// vectors this loses little and needs no header of torch.
#include <cstddef>
#include <exception>
#include <initializer_list>
#include <new>
#include <thread>
#include <vector>

#include "launch.h"
#include "rotary.h"

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
namespace {

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
// bfloat16 heads, biases and the tables (see table_row) have none in the lower 16 bits, so rounding adds nothing.
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
    const int64_t entry = apart ? i / 2 + i % 2 * (num_pairs / 2) : i;
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

template <typename T, bool In, bool Out, typename Compute>
ROPE_INLINE void rotate_block(const Call& call, const Heads& x, int64_t b, int64_t s, int64_t tokens,
                              const Compute* const* cos, const Compute* const* sin) {
  const T* in = static_cast<const T*>(x.in) + b * x.in_b + s * x.in_s;
  T* out = static_cast<T*>(x.out) + b * x.out_b + s * x.out_s;
  const T* bias = static_cast<const T*>(x.bias);
  const bool by_head = x.in_h > x.in_s;
  const int64_t outer = by_head ? x.heads : tokens, inner = by_head ? tokens : x.heads;
  const int64_t outer_step = by_head ? x.in_h : x.in_s, inner_step = by_head ? x.in_s : x.in_h;
  const int64_t fit = kAhead / (call.head_dim * static_cast<int64_t>(sizeof(T)));
  const int64_t ahead = fit < inner ? fit : inner;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t later = j + ahead < inner ? j + ahead : j + ahead - inner;
      prefetch(in + (later < j + ahead ? i + 1 : i) * outer_step + later * inner_step, call.head_dim);
      const int64_t head = by_head ? i : j, token = by_head ? j : i;
      // A token without a row passes through: as one of which nothing is rotated.
      rotate_head<T, In, Out>(in + token * x.in_s + head * x.in_h, out + token * x.out_s + head * x.out_h,
                              bias ? bias + head * call.head_dim : nullptr, cos[token], sin[token],
                              cos[token] ? call.num_pairs : 0, call.head_dim);
    }
  }
}

// A row of cosines or sines as the loops want it: as it lies, or in own (room for num_pairs entries) where it has to
// be changed. For 16-bit heads NaN is made the plain one. Row is null for a token that is not rotated.
template <typename T, bool In, bool Out, typename Compute>
ROPE_INLINE const Compute* table_row(const Compute* row, bool negate, int64_t num_pairs, Compute* own) {
  if (!row) return nullptr;
  if constexpr (sizeof(T) == 2) {
    const float nan = from_bits(0x7fc00000u);
    const float sign = negate ? -1.0f : 1.0f;
    const bool apart = tables_apart<T, In, Out>(num_pairs);
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

// Tokens [first, last) of batch * length. Scratch holds 2 * kBlock * num_pairs elements.
template <typename T, bool In, bool Out>
ROPE_INLINE void rotate_tokens(const Call& call, int64_t first, int64_t last, void* scratch) {
  using Compute = typename ComputeOf<T>::type;
  const Compute* cos[kBlock];
  const Compute* sin[kBlock];
  while (first < last) {
    const int64_t b = first / call.length, s = first % call.length;
    int64_t tokens = call.length - s;
    if (tokens > last - first) tokens = last - first;
    if (tokens > kBlock) tokens = kBlock;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t row = position_of(call, b, s + t);
      const bool known = row >= 0 && row < call.rows;
      const Compute* cos_row =
          static_cast<const Compute*>(call.cos) + (known ? b * call.cos_b + row * call.cos_s : 0);
      const Compute* sin_row =
          static_cast<const Compute*>(call.sin) + (known ? b * call.sin_b + row * call.sin_s : 0);
      Compute* own = static_cast<Compute*>(scratch) + 2 * t * call.num_pairs;
      cos[t] = table_row<T, In, Out>(known ? cos_row : nullptr, false, call.num_pairs, own);
      sin[t] = table_row<T, In, Out>(known ? sin_row : nullptr, call.conjugate != 0, call.num_pairs,
                                     own + call.num_pairs);
    }
    for (const Heads* x : {&call.q, &call.k}) rotate_block<T, In, Out>(call, *x, b, s, tokens, cos, sin);
    first += tokens;
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

// Fewer bytes than this are rotated before another thread has started.
constexpr int64_t kBytesAThread = 512 * 1024;

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
// results do not depend on their number. The threads end with the call: none is there for a fork to lose.
ROPE_EXPORT int rope_dist_cpu_rotary(const rope::Call* call, int64_t threads) {
  using namespace rope;
  static const Range ranges[] = {rotate_float32, rotate_float64, rotate_float16, rotate_bfloat16};
  static const int64_t sizes[] = {4, 8, 2, 2};
  if (call->dtype < 0 || call->dtype > 3 || call->inv_freq_q64) return kUnsupported;
  const Range run = ranges[call->dtype];
  const int64_t tokens = call->batch * call->length;
  const int64_t bytes = tokens * (call->q.heads + call->k.heads) * call->head_dim * sizes[call->dtype];
  if (bytes == 0) return kDone;
  if (threads > bytes / kBytesAThread) threads = bytes / kBytesAThread;
  if (threads > tokens) threads = tokens;
  if (threads < 1) threads = 1;
  try {
    const size_t scratch_size =
        static_cast<size_t>(2 * kBlock * call->num_pairs) * (call->dtype == kFloat64 ? 8 : 4);
    // Apart by two cache lines, so that no thread waits for another's writes.
    const size_t apart = scratch_size + 128;
    std::vector<char> scratch(apart * static_cast<size_t>(threads));
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(threads - 1));
    int64_t given = 1;
    for (; given < threads; ++given) {
      char* own = scratch.data() + apart * static_cast<size_t>(given);
      const int64_t first = tokens * given / threads, last = tokens * (given + 1) / threads;
      try {
        others.emplace_back([=] { run(*call, first, last, own); });
      } catch (const std::exception&) {
        break;  // The system gives no more threads: this one does the rest.
      }
    }
    run(*call, 0, tokens / threads, scratch.data());
    if (given < threads) run(*call, tokens * given / threads, tokens, scratch.data());
    for (std::thread& other : others) other.join();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kDone;
}
