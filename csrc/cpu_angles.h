// Rows of cosines and sines on a CPU: of tables, or made from fixed-point frequencies.
#pragma once

#include "cpu_types.h"
#include "launch.h"

namespace rope {

// Where the entry of a pair is in a row. Apart: the even entries first, then the odd ones.
ROPE_INLINE int64_t entry_of(int64_t pair, bool apart, int64_t num_pairs) {
  return apart ? pair / 2 + pair % 2 * (num_pairs / 2) : pair;
}

// The rows of tokens of a sequence, from s on: null for a token that is not rotated. Own holds 2 * num_pairs elements a
// token. For 16-bit heads, which are narrow, NaN is made the plain one, and entries may have to be apart.
void token_rows(const Call& call, int64_t b, int64_t s, int64_t tokens, bool narrow, bool apart, float* own,
                const float** cos, const float** sin);
void token_rows(const Call& call, int64_t b, int64_t s, int64_t tokens, bool narrow, bool apart, double* own,
                const double** cos, const double** sin);

}  // namespace rope
