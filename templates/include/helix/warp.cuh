// Reductions over the 32 lanes of one warp, or over each kLanes consecutive ones (every lane gets the result), and a
// scan; all 32 must take part.
#pragma once
#include "helix/element.cuh"

namespace helix {

constexpr int kWarp = 32;

HELIX_DEVICE float warp_max(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

template <int kLanes = kWarp> HELIX_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Of the lanes up to and with this one.
HELIX_DEVICE int inclusive_scan(int x, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, x, distance);
    if (lane >= distance) x += below;
  }
  return x;
}

// Of unsigned integers.
template <int kLanes> HELIX_DEVICE u32 warp_max_bits(u32 x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const u32 other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace helix
