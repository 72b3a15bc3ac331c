// What the launchers of csrc take: structs of raw pointers and strides, one for the rotation and one for norms with it.
//
// Every field is eight bytes wide, in the order in which rope_dist/ops/native.py packs them. Strides count
// elements; the innermost stride of q and k is 1. Change the layout or a meaning and ROPE_ABI changes with it.
#pragma once

#include <cstdint>

#define ROPE_ABI 5

#if defined(_WIN32)
#define ROPE_EXPORT extern "C" __declspec(dllexport)
#else
#define ROPE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace rope {

enum Dtype : int64_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// Results of the launchers; a positive one is a CUDA error.
enum Status : int { kDone = 0, kUnsupported = -1, kNoMemory = -2 };

// Queries or keys [batch, length, heads, head_dim]. out may be in itself, with the same strides.
struct Heads {
  const void* in;
  void* out;
  const void* bias;  // [heads * head_dim] of the same type, added before the rotation; or null
  int64_t heads;
  int64_t in_b, in_s, in_h;
  int64_t out_b, out_s, out_h;
};

struct Call {
  int64_t dtype;
  int64_t batch, length, head_dim;
  int64_t num_pairs;  // rotated pairs of a head
  // Whether pairs are interleaved in what is read and in what is written; in place both are the same.
  int64_t interleaved_in, interleaved_out;
  int64_t conjugate;
  Heads q, k;  // k.heads 0: no keys
  // Tables [batch, rows, num_pairs], float64 for float64 heads and float32 otherwise, innermost stride 1; a token's
  // row is its position, and a token whose row is not there passes through.
  const void* cos;
  int64_t cos_b, cos_s;
  const void* sin;
  int64_t sin_b, sin_s;
  int64_t rows;
  // Instead of tables, not for float64 heads: fixed-point frequencies [2, num_pairs] and the factor on cosine and sine.
  const int32_t* inv_freq_q64;
  double scaling;
  // Position of a token: as given; else its index in its sequence, plus offset and its sequence's offsets. A
  // token before the first bound, or from the last on, is in no sequence and passes through.
  const int64_t* positions;
  int64_t positions_b, positions_s;
  const int64_t* bounds;  // cu_seqlens [sequences + 1], with batch 1
  int64_t sequences;
  const int64_t* seqlen_offsets;
  int64_t offset;
};

// The RMS norm of queries or keys: x / sqrt(mean(x^2) + eps) * (weight + weight_offset).
struct Norm {
  const void* weight;  // [head_dim], or [heads * head_dim] if joint; null: as one of ones, without the offset
  int64_t weight_dtype;  // any on a CPU; float32 or that of the heads on a GPU
  int64_t joint;         // all heads of a token together, not each by itself
  void* rstd;  // [batch, length, heads or 1], the reciprocal norms, float64 for float64 heads and float32
               // otherwise: written, and read by the backward pass; or null
};

struct Norms {
  Norm q, k;
  double eps, weight_offset;
  int64_t after;  // the norm follows the rotation
};

// The backward pass, of a Call whose in are the heads before the norm and whose out are their gradients.
struct Gradient {
  const void* in;  // gradient of the normalised and rotated heads, with these strides
  int64_t in_b, in_s, in_h;
  // Gradient of the norm's weight, or null: float64 [weights] on a CPU; on a GPU float32 [blocks, weights], what each
  // block of threads found, to be added up.
  void* weight;
  int64_t blocks;  // of a GPU that work on these heads
};

struct Gradients {
  Gradient q, k;
};

static_assert(sizeof(void*) == 8, "the launchers are for 64-bit systems");
static_assert(sizeof(Call) == 8 * 44 && sizeof(Norms) == 8 * 11 && sizeof(Gradients) == 8 * 12,
              "a field is not eight bytes wide");

// Of a token in no sequence; all others are within 32 bits.
constexpr int64_t kNowhere = INT64_MIN;

// The largest bound that is not past the token is where its sequence starts.
#if defined(__CUDACC__)
__host__ __device__ __forceinline__
#else
inline
#endif
    int64_t position_of(const Call& call, int64_t b, int64_t s) {
  if (call.positions) return call.positions[b * call.positions_b + s * call.positions_s];
  int64_t sequence = b, start = 0;
  if (call.bounds) {
    if (s < call.bounds[0] || s >= call.bounds[call.sequences]) return kNowhere;
    // Invariant: bounds[low] <= s < bounds[high].
    int64_t low = 0, high = call.sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (call.bounds[middle] <= s) {
        low = middle;
      } else {
        high = middle;
      }
    }
    sequence = low;
    start = call.bounds[low];
  }
  return s - start + (call.seqlen_offsets ? call.seqlen_offsets[sequence] : 0) + call.offset;
}

}  // namespace rope
