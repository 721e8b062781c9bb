// The FP8 MLA partial's fetching warp (see mla_fp8_partial.cuh).
#pragma once
#include "helix/mla_fp8_layout.cuh"

namespace helix {

// The page of each half of a tile, out of a window of 64 pages that a warp holds.
template <class C> struct PageWindow {
  static constexpr int kPagesPerTile = kTileTokens / C::block;
  const int* pages;
  int first_page, last_page, current, next;

  HELIX_DEVICE PageWindow(const MlaArguments& a, const Segment& segment) {
    pages = a.page_table + i64(segment.row / C::shares) * a.max_pages;
    first_page = segment.first_tile * kPagesPerTile, last_page = (segment.length - 1) / C::block;
    const bool any = segment.first_tile < segment.last_tile;
    current = any ? load(0) : 0, next = any ? load(32) : 0;
  }
  HELIX_DEVICE int load(int at) const {
    return pages[min(first_page + at + int(threadIdx.x) % 32, last_page)];
  }
  // 8-token groups of the cache; tiles are asked for in order.
  HELIX_DEVICE void groups(int (&group)[2], int tile) {
    const int at = tile * kPagesPerTile - first_page;
    if (at > 0 && at % 32 == 0) current = next, next = load(at + 32);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int page = __shfl_sync(0xffffffffu, current, at % 32 + half * (kPagesPerTile - 1));
      group[half] = page * (C::block / 8) + (C::block == 64 ? half * 4 : 0);
    }
  }
};

// One half of a tile, 32 tokens from 8-token group `group` on: elements to every block of the cluster, scales here.
template <class C>
HELIX_DEVICE void mla_fp8_copy(const MlaMaps& maps, const u8* scales, u32 base, u32 stage, int half, int group) {
  using M8 = MlaFp8Shared<C>;
  const u32 full = base + M8::full(stage), tile = base + M8::tile(stage);
  copy_bulk(base + M8::scale_bytes(stage) + half * 32, scales + i64(group) * 8, 32, full, kEvictFirst);
  const u32 latent = tile + half * (M8::kLatent / 2), rotary = tile + M8::kLatent + half * 2048;
  if constexpr (C::cluster == 2) {
    if (half != head_half<C>()) return;
    copy_4d_multicast(latent, maps.kv, full, 0, 0, 0, group, kEvictFirst, 3);
    copy_4d_multicast(rotary, maps.rotary, full, 0, 0, 0, group, kEvictFirst, 3);
  } else {
    copy_4d(latent, maps.kv, full, 0, 0, 0, group, kEvictFirst);
    copy_4d(rotary, maps.rotary, full, 0, 0, 0, group, kEvictFirst);
  }
}

// Tiles that are asked for before the previous kernel is done, which writes queries and new tokens alone. What that
// kernel itself and then Q still wait for comes behind them, and with many queries that is much. Measured for 16
// queries, and for 64.
template <class C> constexpr int kEarlyTiles = C::columns == 16 ? 4 : 1;

// One warp: fetches Q and KV, as far ahead as the tiles passed back allow.
template <class C>
HELIX_DEVICE void mla_fp8_fetch(const MlaArguments& a, const u8* scales, const MlaMaps& maps, u32 base) {
  using M8 = MlaFp8Shared<C>;
  const bool leader = elect_one();
  RingStage<C> stage;
  u32 q_parity = 1;
  bool begun = false;
  Segments<C> segments(a.segments);
  if (segments.left == 0) return;
  do {
    const Segment segment = segments.current();
    PageWindow<C> window(a, segment);
    const int q_tile = begun ? segment.first_tile : min(segment.first_tile + kEarlyTiles<C>, segment.last_tile) - 1;
    begun = true;
    for (int tile = segment.first_tile; tile < segment.last_tile; ++tile) {
      int group[2];
      window.groups(group, tile);
      if ((tile + 1) * kTileTokens > segment.length - C::row_tokens * C::shares) wait_for_previous_kernels();
      const int halves = segment.length - tile * kTileTokens > 32 ? 2 : 1;
      barrier_wait(base + M8::empty(stage.index), stage.parity ^ 1);
      __syncwarp();  // a lane that looked later could miss the phase, gone by before the leader comes back
      if (leader) {
        barrier_expect(base + M8::full(stage.index), halves * 32 * (576 + 1));
        mla_fp8_copy<C>(maps, scales, base, stage.index, 0, group[0]);
        if (halves == 2) mla_fp8_copy<C>(maps, scales, base, stage.index, 1, group[1]);
      }
      __syncwarp();
      stage.advance();
      if (tile == q_tile) {
        wait_for_previous_kernels();
        barrier_wait(base + M8::q_empty, q_parity);
        __syncwarp();
        if (leader) {
          barrier_expect(base + M8::q_full, M8::kQ);
          copy_5d(base + M8::q, maps.q, base + M8::q_full, 0, 0, 0, head_half<C>() * 8, int(mla_place<C>(segment.row)),
                  kEvictLast);
        }
        q_parity ^= 1;
        __syncwarp();
      }
    }
  } while (segments.next());
  wait_for_previous_kernels();
  let_next_kernel_start();
  if constexpr (C::cluster == 2) {  // a block must not leave while its peer still signals it
    for (int pending = 0; pending < C::stages; ++pending) {
      barrier_wait(base + M8::empty(stage.index), stage.parity ^ 1);
      stage.advance();
    }
  }
}

}  // namespace helix
