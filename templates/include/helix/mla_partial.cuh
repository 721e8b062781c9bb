// Partial of MLA on Hopper: one query token a row, absorbed queries, paged latent KV, bf16 with float32 sums.
//
//   q [B, H, 576], kv [pages, block, 576], page_table [B, max_pages], a schedule (mla_schedule.cuh)  ->
//   whole rows: o [B, H, 512], lse [B, H];  split rows: part_o [2 W, H, 512], part_lse [2 W, H] for the merge.
//
// A worker is one thread block (H <= 64) or a cluster of two (H = 128, 64 heads each; every tile is fetched once and
// multicast). Warpgroups: 0 fetches KV; 1 computes S = Q K' and its softmax; 2 and 3 accumulate 256 columns of O each.
// Shared memory: Q 72 KiB, two tiles of 64 tokens of KV (72 KiB each), P 8 KiB. A tile lies in five regions, 64 rotary
// columns and four times 128: the unit in which it arrives, so that the scores start on the first, and in which its
// memory is passed back. Within a region [8-token group][64-column chunk][8 tokens][128 bytes, swizzled]: K (k
// contiguous) and V (n contiguous) are the same bytes. Roofline: memory, 1152 bytes a token, for H <= 64; the tensor
// cores about as much for H = 128.
//
// Programmatic dependent launch: the schedule and the page table are read before the previous kernel is waited for, so
// they must be older than that; every kernel in the chain lets its successor start only after it has waited itself.
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
    barrier_init(base + M::q_full, 1);
    barrier_init(base + M::q_empty, 4);
    barrier_init(base + M::p_full, 128);
    barrier_init(base + M::p_empty, 8);
    for (int stage = 0; stage < 2; ++stage) {
      for (int region = 0; region < kRegions; ++region) {
        barrier_init(base + M::full(stage, region), 1);
        barrier_init(base + M::empty(stage, region), 4 * C::cluster);  // warps of one warpgroup
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
    registers_grow<128>();
    mla_softmax<C>(a, base);
  } else {
    registers_grow<176>();
    mla_accumulate<C>(a, base, group - 2);
  }
}

}  // namespace helix
