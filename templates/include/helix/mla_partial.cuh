// Partial of MLA on Hopper: query tokens with a bound each, absorbed queries, paged latent KV, bf16 with float32 sums.
//
//   q [B, Q, 576], kv [pages, block, 576], page_table [B / shares, max_pages], lengths [B, row_tokens], a schedule  ->
//   whole rows: o [B, Q, 512], lse [B, Q];  split rows: part_o [2 W, Q, 512], part_lse [2 W, Q] for the merge.
//
// The Q queries of a row (of mla_schedule.cuh) are all heads of `row_tokens` query tokens; `shares` rows in a row read
// the same pages where more query tokens do not fit together. A worker is one thread block (Q <= 64) or a cluster of
// two (Q <= 128, 64 queries in the first; every tile is fetched once and multicast). Warpgroups: 0 fetches KV; 1 computes S = Q K' and its softmax; 2 and 3 accumulate 256 columns of O each.
// Shared memory: Q 72 KiB, two tiles of 64 tokens of KV (72 KiB each), P 8 KiB. A tile lies in five regions, 64 rotary
// columns and four times 128: the unit in which it arrives, so that the scores start on the first, and in which its
// memory is passed back. Within a region [8-token group][64-column chunk][8 tokens][128 bytes, swizzled]: K (k
// contiguous) and V (n contiguous) are the same bytes. Roofline: memory, 1152 bytes a token, for Q <= 64; the tensor
// cores about as much for Q = 128.
//
// Programmatic dependent launch: the schedule, the page table and all tokens but a row's newest are read before the
// previous kernel is waited for, so they must be older than that; every kernel in the chain lets its successor start
// only after it has waited itself.
#pragma once
#include "helix/mla_accumulate.cuh"
#include "helix/mla_fetch.cuh"
#include "helix/mla_softmax.cuh"

namespace helix {

template <class C> HELIX_DEVICE void mla_partial(const MlaArguments& a, const MlaMaps& maps) {
  const u32 base = shared_address(dynamic_shared());
  if (threadIdx.x == 0) {
    prefetch_map(maps.q);
    prefetch_map(maps.kv);
    prefetch_map(maps.rotary);
    barrier_init(base + M::q_empty, 4);
    for (u32 slot = 0; slot < Stage::kSlots; ++slot) {
      const Stage stage = {slot, 0, slot, 0};
      barrier_init(base + M::p_full(stage), 4);
      for (int region = 0; region < kRegions; ++region) {
        barrier_init(base + M::full(stage, region), 1);
        // Warps of the warpgroup whose columns these are, or of both for P.
        barrier_init(base + M::empty(stage, region), (region == kRotary ? 8 : 4) * C::cluster);
      }
    }
    barrier_init_visible();
  }
  if constexpr (C::cluster > 1) cluster_barrier();
  else __syncthreads();
  const int group = int(threadIdx.x) / 128;
  if (group == 0) {
    registers_shrink<32>();
    if (threadIdx.x < 32) mla_fetch<C>(a, maps, base);
  } else if (group == 1) {
    registers_grow<160>();
    mla_softmax<C>(a, base);
  } else {
    registers_grow<160>();
    mla_accumulate<C>(a, base, group - 2);
  }
}

}  // namespace helix
