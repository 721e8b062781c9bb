// Reductions over the 32 lanes of one warp; every lane gets the result.
#pragma once
#include "helix/element.cuh"

namespace helix {

constexpr int kWarp = 32;

HELIX_DEVICE float warp_max(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

HELIX_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

}  // namespace helix
