// Partial of MLA on Hopper over an FP8 cache: e4m3 latents with block scales, bf16 products, float32 sums.
//
//   q [B, Q, 576], kv [pages, block, 576] e4m3, scales [pages, block, 5], the rest as in mla_partial.cuh, whose
//   workers, segments and rows of several query tokens these are.
//
// S' = K Q' and O' = V' P': what comes from the cache is the operand in registers, 64 tokens or 64 columns at once, and
// the queries are the narrow dim N, 16, 32 or 64. So an element goes from e4m3 to bf16 in the registers of the warp
// that multiplies it (fp8.cuh), and no bf16 tile exists. Warpgroups: 0 fetches; 1 computes S' and its softmax; 2 and 3
// accumulate 256 columns of O' each. Shared memory: Q (N x 1152 bytes), a ring of four or five e4m3 tiles of 64 tokens
// (36 KiB each), P (N x 128 bytes).
//
// Cycles of a multiprocessor for a tile of 37,184 bytes, N = 64 (16): memory 2,820. Tensor cores 2,180 (540). Shared
// memory 1,920 (1,110): 290 to write the tile, 550 to read it twice, 1,090 (270) for Q and P as the other operand.
// Instructions of a scheduler 1,900: the conversion, 69,600 elements at nine instructions for four and 32 lanes, is
// 1,220 of them, 650 in the warps of scores, 2 x 290 in those of O. With bf16 tiles in shared memory, which half as
// many conversions would write, that memory alone would take 3,070, and its room be gone. Roofline: memory, 581 bytes
// a token; the tensor cores for 128 queries.
#pragma once
#include "helix/mla_fp8_accumulate.cuh"
#include "helix/mla_fp8_fetch.cuh"
#include "helix/mla_fp8_softmax.cuh"

namespace helix {

template <class C> HELIX_DEVICE void mla_fp8_partial(const MlaArguments& a, const u8* scales, const MlaMaps& maps) {
  using M8 = MlaFp8Shared<C>;
  const u32 base = shared_address(dynamic_shared());
  if (threadIdx.x == 0) {
    prefetch_map(maps.q);
    prefetch_map(maps.kv);
    prefetch_map(maps.rotary);
    barrier_init(base + M8::q_full, 1);
    barrier_init(base + M8::q_empty, 4);
    for (int half = 0; half < 2; ++half) {
      barrier_init(base + M8::p_full(half), 2);
      barrier_init(base + M8::p_empty(half), 8);
    }
    for (int stage = 0; stage < C::stages; ++stage) {
      barrier_init(base + M8::full(stage), 1);
      barrier_init(base + M8::empty(stage), 12 * C::cluster);  // warps of all warpgroups but the first
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
