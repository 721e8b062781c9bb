// Partial of MLA on Hopper: query tokens with a bound each, absorbed queries, paged latent KV, bf16 with float32 sums.
//
//   q [B, Q, 576], kv [pages, block, 576], page_table [B / shares, max_pages], lengths [B, row_tokens], a schedule  ->
//   whole rows: o [B, Q, 512], lse [B, Q];  split rows: part_o [2 W, Q, 512], part_lse [2 W, Q] for the merge.
//
// The Q queries of a row (of mla_schedule.cuh) are all heads of `row_tokens` query tokens; `shares` rows in a row read
// the same pages where a row has not all query tokens. A worker is a team of clusters, each for some of the query
// tokens, that go through the same tiles at the same time, so that memory is read once. A cluster is one thread block
// (up to 64 queries) or two (up to 128, 64 of them in the first; every tile is fetched once and multicast). Warpgroups:
// 0 fetches; 1 computes S = Q K' and its softmax; 2 and 3 accumulate 256 columns of O each.
//
// Shared memory: a tile of 64 tokens lies in five regions of 64 rotary or 128 other columns: the unit in which it
// arrives, so that the scores start on the first, and in which its memory is passed back. Four regions have three slots
// each and the last one two, 200 KiB. Within a region [8-token group][64-column chunk][8 tokens][128 bytes, swizzled]:
// K (k contiguous) and V (n contiguous) are the same bytes. P takes the place of the rotary columns once the scores are
// there. A segment's queries come through the slots, too, and stay in the registers of warpgroup 1 as the operand of
// wgmma, except the rotary columns and those that meet the last region, 24 KiB.
//
// Registers: 32 + 160 + 2 x 160 of 512. Sums of wgmma begin at the 25th and have two more above: the 128 of O need 154,
// and beside the 32 of S there is room for 96 of Q.
//
// Cycles of a multiprocessor for a tile and 64 queries: tensor cores 2,176, of which S 1,152 and O 1,024. Shared
// memory, at 128 bytes a cycle, 2,176: 576 to write the tile, 576 to read it as K and 512 as V, 192 for Q's part of 24
// KiB, 64 to write P and 256 to read it (a warpgroup's two products of 128 columns each read it all). Softmax: about
// 750, in which only O can use the tensor cores. So three of O's four products of a tile, 768 cycles, are held back
// until the scores of the next tile are nearly done, and run under their softmax. The fourth, of the last region, is
// computed at once where all tiles come from memory: a slot that waited for its turn, too, would come back too late for
// a region that has only two. Roofline: memory, 1152 bytes a token; for 128 queries the tensor cores about as much.
//
// Programmatic dependent launch: the schedule, the page table and all tokens but a row's newest are read before the
// previous kernel is waited for, so they must be older than any that may still run then (docs/architecture.md, Launches
// that overlap).
#pragma once
#include "helix/mla_accumulate.cuh"
#include "helix/mla_fetch.cuh"
#include "helix/mla_softmax.cuh"

namespace helix {

template <class C> HELIX_DEVICE void mla_partial(const MlaArguments& a, const MlaMaps& maps) {
  const u32 base = shared_address(dynamic_shared());
  MlaStart<C> start;  // on its way while barriers are made
  if (threadIdx.x < 32) start.load(a, worker_index<C>());
  if (threadIdx.x == 64) {
    prefetch_map(maps.q);
    prefetch_map(maps.kv);
    prefetch_map(maps.rotary);
  }
  if (threadIdx.x == 96) {
    barrier_init(base + M::q_empty, 4);
    for (u32 slot = 0; slot < Stage::kSlots; ++slot) {
      const Stage stage = {slot, 0, slot, 0};
      barrier_init(base + M::p_full(stage), 128);
      barrier_init(base + M::turn(stage), 4);
      for (int region = 0; region < kRegions; ++region) {
        barrier_init(base + M::full(stage, region), 1);
        // The warpgroup whose columns these are, or both for P.
        barrier_init(base + M::empty(stage, region), (region == kRotary ? 256 : 128) * C::cluster);
      }
    }
    barrier_init_visible();
  }
  if constexpr (C::cluster > 1) cluster_barrier();
  else __syncthreads();
  const int group = int(threadIdx.x) / 128;
  if (group == 0) {
    registers_shrink<32>();
    if (threadIdx.x < 32) mla_fetch<C>(a, maps, base, start);
    else if (threadIdx.x < 64) mla_fetch_first_queries<C>(a, maps.q, base);
  } else if (group == 1) {
    registers_grow<160>();
    mla_softmax<C>(a, base);
  } else if (group == 2) {
    registers_grow<160>();
    mla_accumulate<C, 0>(a, base);
  } else {
    registers_grow<160>();
    mla_accumulate<C, 1>(a, base);
  }
}

}  // namespace helix
