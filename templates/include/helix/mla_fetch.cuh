// The MLA partial's fetching warp (see mla_partial.cuh).
#pragma once
#include "helix/mla_layout.cuh"

namespace helix {

// This block's queries. The rotary region's barrier counts all that have a place of their own.
template <class C>
HELIX_DEVICE void mla_fetch_queries(const TensorMap* map, u32 base, const Stage& stage, int row, u32 q_parity) {
#pragma unroll
  for (int region = 0; region <= kRotary; ++region) {
    const bool held = region < kRotary;
    const int first = held ? first_chunk(region) : kHeldChunks, end = held ? first + chunks_in(region) : 9;
    const u32 full = base + M::full(stage, region), to = base + (held ? M::region(stage, region) : M::q);
    barrier_wait(base + M::empty(stage, region), stage.parity ^ 1);
    if (!held) barrier_wait(base + M::q_empty, q_parity);
    barrier_expect(full, u32(end - first) * M::kChunk);
#pragma unroll
    for (int chunk = first; chunk < end; ++chunk)
      copy_5d(to + u32(chunk - first) * M::kChunk, map, full, 0, 0, chunk, head_half<C>() * 8, row, kEvictLast);
  }
}

// One warp: fetches Q and KV, region by region, always as far ahead as the regions passed back allow. The first tile
// does not wait for the previous kernel, which may write queries and new tokens alone.
template <class C> HELIX_DEVICE void mla_fetch(const MlaArguments& a, const MlaMaps& maps, u32 base) {
  constexpr int kPagesPerTile = kTileTokens / C::block;
  const int lane = int(threadIdx.x) % 32;
  const bool leader = elect_one();
  Stage stage;
  u32 q_parity = 1;
  Segments<C> segments(a.segments);
  if (segments.left == 0) return;
  do {
    const Segment segment = segments.current();
    const bool any = segment.first_tile < segment.last_tile;
    const int first_page = segment.first_tile * kPagesPerTile, last = (segment.length - 1) / C::block - first_page;
    const int* pages = a.page_table + i64(segment.row / C::shares) * a.max_pages + first_page;
    int current = any ? pages[min(lane, last)] : 0;
    int next = any ? pages[min(32 + lane, last)] : 0;
    const bool starts = segments.at == worker_index<C>();  // has not waited yet
    const bool early =
        starts && (segment.first_tile + 1) * kTileTokens <= segment.length - C::row_tokens * C::shares;
    if (starts && !early) wait_for_previous_kernels();
    if (any) stage.pass_queries();
    for (int tile = segment.first_tile; tile < segment.last_tile; ++tile) {
      const int at = (tile - segment.first_tile) * kPagesPerTile;
      if (at > 0 && at % 32 == 0) {
        current = next;
        next = pages[min(at + 32 + lane, last)];
      }
      int group[2];  // 8-token group of the cache in which each half of the tile starts
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int page = __shfl_sync(0xffffffffu, current, at % 32 + half * (kPagesPerTile - 1));
        group[half] = page * (C::block / 8) + (C::block == 64 ? half * 4 : 0);
      }
      const int halves = segment.length - tile * kTileTokens > 32 ? 2 : 1;
#pragma unroll
      for (int region = 0; region < kRegions; ++region) {
        const u32 bytes = 32 * 128 * chunks_in(region), full = base + M::full(stage, region);
        const u32 empty = base + M::empty(stage, region);
        if (leader) {  // alone: a lane that looked later could miss the phase, gone by before the leader comes back
          barrier_wait(empty, stage.parity_of(region) ^ 1);
          const TensorMap* map = region == kRotary ? maps.rotary : maps.kv;
          barrier_expect(full, halves * bytes);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (half >= halves || (C::cluster == 2 && half != head_half<C>())) continue;
            const u32 to = base + M::region(stage, region) + half * bytes;
            const int chunk = first_chunk(region);
            if constexpr (C::cluster == 2) copy_4d_multicast(to, map, full, 0, 0, chunk, group[half], kEvictFirst, 3);
            else copy_4d(to, map, full, 0, 0, chunk, group[half], kEvictFirst);
          }
        }
      }
      __syncwarp();
      if (tile == segment.first_tile) {  // KV first: it is what takes long
        if (early) wait_for_previous_kernels();
        if (leader) mla_fetch_queries<C>(maps.q, base, stage.before(), segment.row, q_parity);
        q_parity ^= 1;
        __syncwarp();
      }
      stage.pass_tile();
    }
  } while (segments.next());
  let_next_kernel_start();
  if constexpr (C::cluster == 2) {  // a block must not leave while its peer still signals it
    for (u32 pending = 0; pending < Stage::kSlots; ++pending) {
      for (int region = 0; region < kRegions; ++region)
        if (region != kLast || pending < Stage::kLastSlots)
          barrier_wait(base + M::empty(stage, region), stage.parity_of(region) ^ 1);
      stage.pass_tile();
    }
  }
}

}  // namespace helix
