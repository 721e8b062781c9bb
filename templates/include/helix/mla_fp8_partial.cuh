// Partial of MLA on Hopper over an FP8 cache: e4m3 latents, float16 products, float32 sums.
//
//   q [B, Q, 576], kv [pages, block, 576] e4m3, scales [pages, block], the rest as in mla_partial.cuh, whose workers,
//   segments and rows of several query tokens these are.
//
// S' = K Q' and O' = V' P': what comes from the cache is the operand in registers, 64 tokens or 64 columns at once, and
// the queries are the narrow dim N, 16, 32 or 64. So an element goes from e4m3 to float16, exactly, in the registers of
// the warp that multiplies it: one instruction for two elements, and no multiplication, since a token has one scale for
// all its columns. That multiplies its scores, and its weights before they become float16. Warpgroups: 0 fetches; 1
// computes S' and its softmax; 2 and 3 accumulate 256 columns of O' each. Shared memory: Q (N x 1152 bytes, float16 in
// the end), a ring of four or five e4m3 tiles of 64 tokens (36 KiB each), P (N x 128 bytes).
//
// The FP8 products of the tensor cores would need no conversion, but they keep about 13 bits of a sum's mantissa: too
// few for an LSE that is good to 1e-3, and the fewer the longer the row.
//
// Cycles of a multiprocessor for a tile of 36,928 bytes, N = 64 (16): memory 2,820. Tensor cores 2,180 (540). Shared
// memory 1,920 (1,110): 290 to write the tile, 550 to read it twice, 1,090 (270) for Q and P as the other operand.
// Instructions of a scheduler about 1,150 (950): 750 (550) in the warp of scores, 2 x 200 in those of O'; 270 of them
// convert, at half the rate. Measured on one H100 over 512k tokens: 3,000 for N = 16, which is memory, and 3,500 for
// N = 64: one warpgroup computes, in turn, the scores, 1,150 cycles of the tensor cores if nobody else uses them, and a
// softmax of 1,250. Roofline: memory, 577 bytes a token; the tensor cores for 128 queries.
#pragma once
#include "helix/mla_fp8_accumulate.cuh"
#include "helix/mla_fp8_fetch.cuh"
#include "helix/mla_fp8_softmax.cuh"

namespace helix {

template <class C> HELIX_DEVICE void mla_fp8_partial(const MlaArguments& a, const u8* scales, const MlaMaps& maps) {
  using M8 = MlaFp8Shared<C>;
  const u32 base = shared_address(dynamic_shared());
  if (threadIdx.x == 64) {
    prefetch_map(maps.q);
    prefetch_map(maps.kv);
    prefetch_map(maps.rotary);
  }
  if (threadIdx.x == 96) {
    barrier_init(base + M8::q_full, 1);
    barrier_init(base + M8::q_empty, 4);
    barrier_init(base + M8::p_full, 128);
    barrier_init(base + M8::p_empty, 256);
    for (int stage = 0; stage < C::stages; ++stage) {
      barrier_init(base + M8::full(stage), 1);
      barrier_init(base + M8::empty(stage), 3 * 128 * C::cluster);  // all warpgroups but the first
    }
    barrier_init_visible();
  }
  if constexpr (C::cluster > 1) cluster_barrier();
  else __syncthreads();
  const int group = int(threadIdx.x) / 128;
  if (group == 0) {
    registers_shrink<24>();
    if (threadIdx.x < 32) mla_fp8_fetch<C>(a, scales, maps, base);
  } else if (group == 1) {
    registers_grow<136>();
    mla_fp8_softmax<C>(a, base);
  } else {
    registers_grow<176>();
    mla_fp8_accumulate<C>(a, base, group - 2);
  }
}

}  // namespace helix
