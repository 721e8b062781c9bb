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

// Of unsigned integers, which travel as the bits of floats; several at a time, which hides the latency of each.
template <int kLanes, int count> HELIX_DEVICE void warp_max_bits(u32 (&x)[count]) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const u32 other = u32(__float_as_int(__shfl_xor_sync(0xffffffffu, __int_as_float(int(x[i])), distance)));
      x[i] = other > x[i] ? other : x[i];
    }
}

}  // namespace helix
