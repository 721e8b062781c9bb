// The MLA partial's fetching warps (see mla_partial.cuh).
#pragma once
#include "helix/mla_layout.cuh"

namespace helix {

// Tokens that a copy brings: as many as are one after the other, or as a block of a cluster has to fetch of a tile.
template <class C> constexpr int copy_tokens = C::block == kTileTokens && C::cluster == 1 ? 64 : 32;

// Queries that a copy brings, in eights: what lies behind them is computed with and never looked at.
template <class C> constexpr u32 query_groups = C::queries < 64 ? C::queries / 8 : 8;

// A lane's of 32 pages of a segment's row, from page `first` on.
template <class C> HELIX_DEVICE int mla_page(const MlaArguments& a, const Segment& segment, int first) {
  const u32 last = (opaque(segment.length) - 1) / C::block, at = u32(first) + opaque(threadIdx.x) % 32;
  return a.page_table[opaque(segment.row) / C::shares * u32(a.max_pages) + min(at, last)];
}

// What a fetching warp begins with: a segment, and a lane's page of its first 32, if it has tiles.
template <class C> struct MlaStart {
  static constexpr int kPagesPerTile = kTileTokens / C::block;
  Segment segment;
  int page;
  HELIX_DEVICE void load(const MlaArguments& a, int at) {
    const Vector16* from = reinterpret_cast<const Vector16*>(a.segments + at);
    const Vector16 low = load_global(from), high = load_global(from + 1);
    segment = {int(low.words[0]), int(low.words[1]), int(low.words[2]), int(low.words[3]),
               int(high.words[0]), int(high.words[1]), int(high.words[2]), int(high.words[3])};
    page = segment.first_tile < segment.last_tile ? mla_page<C>(a, segment, segment.first_tile * kPagesPerTile) : 0;
  }
};

// This block's queries of a row, the `number`th in this launch. The rotary region's barrier counts all that have a place
// of their own.
template <class C>
HELIX_DEVICE void mla_fetch_queries(const TensorMap* map, u32 base, const Stage& stage, int row, u32 number) {
#pragma unroll
  for (int region = 0; region <= kRotary; ++region) {
    const bool held = region < kRotary;
    const int first = held ? first_chunk(region) : kHeldChunks, end = held ? first + chunks_in(region) : 9;
    const u32 full = base + M::full(stage, region), to = base + (held ? M::region(stage, region) : M::q);
    barrier_wait(base + M::empty(stage, region), stage.parity ^ 1);
    if (!held) barrier_wait(base + M::q_empty, ~number & 1);
    barrier_expect(full, u32(end - first) * (query_groups<C> * 1024));
    const int place = int(mla_place<C>(int(opaque(row))));  // not to be held in a register all the time
#pragma unroll
    for (int chunk = first; chunk < end; ++chunk)
      copy_5d(to + u32(chunk - first) * M::kChunk, map, full, 0, 0, chunk, head_half<C>() * 8, place, kEvictLast);
  }
}

// One warp: the first queries, as soon as the previous kernel is done.
template <class C> HELIX_DEVICE void mla_fetch_first_queries(const MlaArguments& a, const TensorMap* map, u32 base) {
  Segments<C> segments(a.segments);
  if (segments.left == 0 || !elect_one()) return;
  do {
    const Segment& segment = segments.current();
    if (segment.first_tile == segment.last_tile) continue;
    wait_for_previous_kernels();
    return mla_fetch_queries<C>(map, base, Stage{}, segment.row, 0);
  } while (segments.next());
}

// Another: KV and all other queries, region by region, always as far ahead as the regions passed back allow. Old tokens
// do not wait for the previous kernel, which may write queries and new tokens alone.
template <class C>
HELIX_DEVICE void mla_fetch(const MlaArguments& a, const MlaMaps& maps, u32 base, MlaStart<C>& start) {
  constexpr int kPagesPerTile = kTileTokens / C::block, kTokens = copy_tokens<C>;
  constexpr int kCopies = kTileTokens / kTokens / C::cluster;  // of a tile's region, by this block
  const bool leader = elect_one();
  Stage stage;
  u32 fetched = 0;  // queries, those of the other warp included
  const Segment& segment = start.segment;
  Segments<C> segments(a.segments, segment);
  if (segments.left == 0) return;
  const auto pass_segment = [&] {
    if (!segments.next()) return false;
    start.load(a, segments.at);
    return true;
  };
  do {
    if (segment.first_tile == segment.last_tile) continue;
    int current = 0, next = start.page;
    stage.pass_queries();
    for (int tile = segment.first_tile; tile < segment.last_tile; ++tile) {
      if ((tile + 1) * kTileTokens > segment.length - C::row_tokens * C::shares) wait_for_previous_kernels();
      const int first_page = (tile - segment.first_tile) * kPagesPerTile;  // of the segment's
      if (first_page % 32 == 0) {
        current = next;
        next = mla_page<C>(a, segment, tile * kPagesPerTile + 32);
      }
      int group[kCopies];  // 8-token group of the cache in which each starts
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int half = C::cluster == 2 ? head_half<C>() : i;
        const int page = __shfl_sync(0xffffffffu, current, first_page % 32 + half * (kPagesPerTile - 1));
        group[i] = page * (C::block / 8) + (C::block == 64 ? half * 4 : 0);
      }
      const int copies = kTokens == kTileTokens || segment.length - tile * kTileTokens <= kTokens ? 1 : 2;
#pragma unroll
      for (int region = 0; region < kRegions; ++region) {
        const u32 bytes = kTokens * 128 * chunks_in(region), full = base + M::full(stage, region);
        const u32 empty = base + M::empty(stage, region);
        if (leader) {  // alone: a lane that looked later could miss the phase, gone by before the leader comes back
          barrier_wait(empty, stage.parity_of(region) ^ 1);
          const TensorMap* map = region == kRotary ? maps.rotary : maps.kv;
          barrier_expect(full, copies * bytes);
#pragma unroll
          for (int i = 0; i < kCopies; ++i) {
            const int half = C::cluster == 2 ? head_half<C>() : i, chunk = first_chunk(region);
            if (half >= copies) continue;
            const u32 to = base + M::region(stage, region) + half * bytes;
            if constexpr (C::cluster == 2) copy_4d_multicast(to, map, full, 0, 0, chunk, group[i], kEvictFirst, 3);
            else copy_4d(to, map, full, 0, 0, chunk, group[i], kEvictFirst);
          }
        }
      }
      __syncwarp();
      if (tile == segment.first_tile) {  // KV first: it is what takes long
        if (fetched > 0) {
          wait_for_previous_kernels();
          if (leader) mla_fetch_queries<C>(maps.q, base, stage.before(), segment.row, fetched);
          __syncwarp();
        }
        ++fetched;
      }
      stage.pass_tile();
    }
  } while (pass_segment());
  wait_for_previous_kernels();
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
