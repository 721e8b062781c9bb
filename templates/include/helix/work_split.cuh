// Work split: which tiles of which rows and KV heads a thread block attends to, from the lengths alone.
//
// A unit is one (row, KV head); it has ceil(length / tile) tiles of C::tile tokens. All W tiles (W < 2^31) stand in one
// line, ordered by row, KV head and token, and each block takes an even share of the line: shares differ by one tile at
// most, whatever the lengths are, and the host reads none of them. A unit cut by a block's border has several parts,
// one a block; a block has at most two: its first unit's (slot 0) and its last one's (slot 1).
#pragma once
#include "helix/warp.cuh"

namespace helix {

// The local tokens of a row: what the last of its query tokens attends.
template <class C> HELIX_DEVICE int row_length(const int* lengths, int row) {
  return lengths[row * C::query_tokens + C::query_tokens - 1];
}

template <class C> HELIX_DEVICE int tiles_of(int length) { return (length + C::tile - 1) / C::tile; }

// W. Called by whole warps.
template <class C> HELIX_DEVICE int count_tiles(const int* lengths, int rows, int lane) {
  int tiles = 0;
  for (int row = lane; row < rows; row += kWarp) tiles += tiles_of<C>(row_length<C>(lengths, row));
  return __reduce_add_sync(0xffffffffu, tiles) * C::kv_heads;
}

// A place in the line of tiles.
struct Place {
  int row, kv_head, tile, tiles;  // `tiles` of that row
  int unit_begin;                 // the unit's first tile in the line

  HELIX_DEVICE int unit_end() const { return unit_begin + tiles; }
};

// The place of tile `at` < W. Called by whole warps.
template <class C> HELIX_DEVICE Place find_place(const int* lengths, int rows, int at, int lane) {
  int before = 0;
  for (int first = 0; first < rows; first += kWarp) {
    const int tiles = first + lane < rows ? tiles_of<C>(row_length<C>(lengths, first + lane)) : 0;
    const int through = before + inclusive_scan(tiles, lane) * C::kv_heads;
    const u32 beyond = __ballot_sync(0xffffffffu, at < through);
    if (beyond) {
      const int source = __ffs(beyond) - 1;
      const int of_row = __shfl_sync(0xffffffffu, tiles, source);
      const int row_begin = __shfl_sync(0xffffffffu, through, source) - of_row * C::kv_heads;
      const int kv_head = (at - row_begin) / of_row, unit_begin = row_begin + kv_head * of_row;
      return {first + source, kv_head, at - unit_begin, of_row, unit_begin};
    }
    before = __shfl_sync(0xffffffffu, through, kWarp - 1);
  }
  __trap();  // `at` was not below W
}

// The shares of all blocks: the first tiles % blocks ones have one tile more.
struct Shares {
  int base, longer;

  HELIX_DEVICE Shares(int tiles, int blocks) : base(tiles / blocks), longer(tiles % blocks) {}
  HELIX_DEVICE int begin(int block) const { return block * base + min(block, longer); }

  // The block whose share holds tile `at`.
  HELIX_DEVICE int holder(int at) const {
    const int in_longer = longer * (base + 1);
    return at < in_longer ? at / (base + 1) : longer + (at - in_longer) / base;
  }
};

// The blocks [first, first + count) that hold parts of a unit, and where each leaves its part: two slots a block. Only
// the first block can have begun with another unit.
struct Parts {
  int first, count;
  bool first_is_later_slot;

  HELIX_DEVICE Parts(const Shares& shares, const Place& unit)
      : first(shares.holder(unit.unit_begin)),
        count(shares.holder(unit.unit_end() - 1) - first + 1),
        first_is_later_slot(shares.begin(first) < unit.unit_begin) {}

  HELIX_DEVICE int slot(int part) const { return 2 * (first + part) + (part == 0 && first_is_later_slot ? 1 : 0); }
};

}  // namespace helix
