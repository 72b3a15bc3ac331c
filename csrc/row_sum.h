// A sum over threads of a GPU.
#pragma once

namespace rope {

// The sum over the threads of a row, the same to the last bit in each: every one adds the same pairs.
__device__ __forceinline__ float row_sum(float value) {
  const unsigned lane = (threadIdx.y * blockDim.x + threadIdx.x) % 32, columns = blockDim.x;
  // Rows do not end together: only this one's lanes take part.
  const unsigned mask = columns == 32 ? 0xffffffffu : ((1u << columns) - 1) << (lane & ~(columns - 1));
  for (unsigned distance = columns / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(mask, value, distance);
  }
  return value;
}

}  // namespace rope
