// Router: logits [N, E] = x [N, D] W[E, D]^T, bfloat16 operands, float32 products and sums.
//
// Not by tensor cores, whose sums round otherwise than float32 ones: an expert is chosen or not by the last bit. A warp
// computes one logit; its first weights are on their way before the kernel waits for x.
// Shared memory: none. Roofline: memory, E * D * 2 bytes, and the latency of two loads.
#pragma once
#include "helix/sm90.cuh"
#include "helix/warp.cuh"

namespace helix {

constexpr int kRouterLoads = 8;   // of a lane, under way at a time
constexpr int kRouterColumns = kRouterLoads * kWarp * 8;

// `from` and `columns` are those from the lane's first one on.
HELIX_DEVICE void load_columns(Vector16 (&to)[kRouterLoads], const bfloat16* from, int columns) {
#pragma unroll
  for (int i = 0; i < kRouterLoads; ++i)
    to[i] = i * kWarp * 8 < columns ? load_global(from + i * kWarp * 8) : Vector16{{0, 0, 0, 0}};
}

HELIX_DEVICE float low_half(u32 pair) { return __int_as_float(int(pair << 16)); }
HELIX_DEVICE float high_half(u32 pair) { return __int_as_float(int(pair & 0xffff0000u)); }

// Grid: a warp for each expert in x, tokens in y.
template <class C> HELIX_DEVICE void router(float* logits, const bfloat16* x, const bfloat16* weights) {
  const int expert = int(blockIdx.x) * (C::threads / kWarp) + int(threadIdx.x) / kWarp;
  const i64 token = blockIdx.y;
  const int own = int(threadIdx.x) % kWarp * 8;
  weights += i64(min(expert, C::experts - 1)) * C::hidden + own;
  x += token * C::hidden + own;
  Vector16 w[kRouterLoads], v[kRouterLoads];
  load_columns(w, weights, C::hidden - own);
  wait_for_previous_kernels();
  let_next_kernel_start();
  float sums[2] = {};
#pragma unroll 1
  for (int first = 0; first < C::hidden; first += kRouterColumns) {
    if (first > 0) load_columns(w, weights + first, C::hidden - own - first);
    load_columns(v, x + first, C::hidden - own - first);
#pragma unroll
    for (int i = kRouterLoads - 1; i >= 0; --i)  // the last first, so that all loads are under way before any is used
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        sums[0] += low_half(w[i].words[word]) * low_half(v[i].words[word]);
        sums[1] += high_half(w[i].words[word]) * high_half(v[i].words[word]);
      }
  }
  const float sum = warp_sum(sums[0] + sums[1]);
  if (threadIdx.x % kWarp == 0 && expert < C::experts) logits[token * C::experts + expert] = sum;
}

}  // namespace helix
