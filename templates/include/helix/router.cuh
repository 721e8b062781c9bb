// Router: logits [N, E] = x [N, D] W[E, D]^T, bfloat16 operands, float32 products and sums.
//
// Not by tensor cores, whose sums round otherwise than float32 ones: an expert is chosen or not by the last bit. A warp
// computes one expert's logits of two tokens; its first weights are on their way before the kernel waits for x.
// Shared memory: none. Roofline: memory, E * D * 2 bytes, and the latency of two loads.
#pragma once
#include "helix/sm90.cuh"
#include "helix/warp.cuh"

namespace helix {

constexpr int kRouterTokens = 2;  // of a warp
constexpr int kRouterLoads = 8;   // of a lane, under way at a time
constexpr int kRouterColumns = kRouterLoads * kWarp * 8;

HELIX_DEVICE void load_columns(Vector16 (&to)[kRouterLoads], const bfloat16* from, int first, int columns, bool used) {
#pragma unroll
  for (int i = 0; i < kRouterLoads; ++i) {
    const int at = first + (i * kWarp + int(threadIdx.x) % kWarp) * 8;
    to[i] = used && at < columns ? load_global(from + at) : Vector16{{0, 0, 0, 0}};
  }
}

HELIX_DEVICE float low_half(u32 pair) { return __int_as_float(int(pair << 16)); }
HELIX_DEVICE float high_half(u32 pair) { return __int_as_float(int(pair & 0xffff0000u)); }

// Grid: a warp for each expert in x, pairs of tokens in y.
template <class C>
HELIX_DEVICE void router(float* logits, const bfloat16* x, const bfloat16* weights, int tokens) {
  const int expert = int(blockIdx.x) * (C::threads / kWarp) + int(threadIdx.x) / kWarp;
  const int first_token = int(blockIdx.y) * kRouterTokens;
  const bool used = expert < C::experts;
  const bfloat16* row = weights + i64(expert) * C::hidden;
  float sums[kRouterTokens] = {};
  Vector16 w[kRouterLoads];
  load_columns(w, row, 0, C::hidden, used);
  wait_for_previous_kernels();
  let_next_kernel_start();
#pragma unroll 1
  for (int first = 0; first < C::hidden; first += kRouterColumns) {
    if (first > 0) load_columns(w, row, first, C::hidden, used);
#pragma unroll
    for (int t = 0; t < kRouterTokens; ++t) {
      const int token = first_token + t;
      Vector16 v[kRouterLoads];
      load_columns(v, x + i64(token) * C::hidden, first, C::hidden, used && token < tokens);
#pragma unroll
      for (int i = 0; i < kRouterLoads; ++i)
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          sums[t] += low_half(w[i].words[word]) * low_half(v[i].words[word]);
          sums[t] += high_half(w[i].words[word]) * high_half(v[i].words[word]);
        }
    }
  }
#pragma unroll
  for (int t = 0; t < kRouterTokens; ++t) {
    const float sum = warp_sum(sums[t]);
    const int token = first_token + t;
    if (threadIdx.x % kWarp == 0 && used && token < tokens) logits[i64(token) * C::experts + expert] = sum;
  }
}

}  // namespace helix
