// Router: logits [N, E] = x [N, D] W[E, D]^T, bfloat16 operands, float32 products and sums.
//
// Not by tensor cores, whose sums round otherwise than float32 ones: an expert is chosen or not by the last bit. A block
// computes one logit, so that a thread has all its loads under way at once; those of the weights before the kernel waits
// for x. Shared memory: a word a warp. Roofline: memory, E * D * 2 bytes, but it is the latency of the loads that counts.
#pragma once
#include "helix/sm90.cuh"
#include "helix/warp.cuh"

namespace helix {

// 16 bytes for each thread of the block, as often as a row needs.
template <class C> struct RouterRow {
  static constexpr int kStride = C::threads * 8, kLoads = (C::hidden + kStride - 1) / kStride;
  Vector16 vectors[kLoads];

  HELIX_DEVICE void load(const bfloat16* row) {
    const int own = int(threadIdx.x) * 8;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      vectors[i] = own + i * kStride < C::hidden ? load_global(row + own + i * kStride) : Vector16{{0, 0, 0, 0}};
  }
};

HELIX_DEVICE float low_half(u32 pair) { return __int_as_float(int(pair << 16)); }
HELIX_DEVICE float high_half(u32 pair) { return __int_as_float(int(pair & 0xffff0000u)); }

// Grid: experts in x, tokens in y.
template <class C> HELIX_DEVICE void router(float* logits, const bfloat16* x, const bfloat16* weights) {
  __shared__ float sums[C::threads / kWarp];
  const i64 expert = blockIdx.x, token = blockIdx.y;
  RouterRow<C> w, v;
  w.load(weights + expert * C::hidden);
  let_next_kernel_start();
  wait_for_previous_kernels();
  v.load(x + token * C::hidden);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < RouterRow<C>::kLoads; ++i)
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const u32 a = w.vectors[i].words[word], b = v.vectors[i].words[word];
      sum += low_half(a) * low_half(b);
      sum += high_half(a) * high_half(b);
    }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int i = 0; i < C::threads / kWarp; ++i) total += sums[i];
    logits[token * C::experts + expert] = total;
  }
}

}  // namespace helix
