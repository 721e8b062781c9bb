// GQA partial: its tiles, its shared memory, its arguments and the walk through a thread block's share.
#pragma once
#include "helix/gqa_merge.cuh"

namespace helix {

// What a launch does while the kernel before it still runs (programmatic dependent launch).
enum class Overlap {
  nothing,     // also right after the schedule kernel
  schedule,    // reads its schedule, which is older than the kernel before
  old_tokens,  // also copies K and V of all but the last tokens of each row: only those may be the kernel before's work
};

template <class C> struct GqaTile {
  static_assert(C::head_dim == 64 || C::head_dim == 128, "one or two swizzled planes");
  static_assert(C::group >= 1 && C::group <= 16 && C::tile == 64);
  static_assert(C::block % 16 == 0 && (C::block % C::tile == 0 || C::tile % C::block == 0), "boxes fill a tile");
  static constexpr int columns = C::group <= 8 ? 8 : 16;                     // query heads, padded
  static constexpr int page_rows = C::block < C::tile ? C::block : C::tile;  // tokens a box
  static constexpr int boxes = C::tile / page_rows;
  static constexpr int plane_bytes = page_rows * 128;  // 64 columns of a box: one swizzled plane
  static constexpr int box_bytes = page_rows * C::head_dim * 2;
  static constexpr int matrix_bytes = C::tile * C::head_dim * 2;
  static constexpr int warps = C::tile / 16;  // that compute
  static constexpr int threads = warps * kWarp;
};

template <class C> struct GqaShared {
  using Tile = GqaTile<C>;
  alignas(1024) u8 stage[C::stages][2][Tile::matrix_bytes];  // K, V
  float largest[Tile::columns][Tile::warps], sum[Tile::columns][Tile::warps];
  MergePlan merge[2];
  MergeShared<Tile::threads> merge_space;
  u64 full[C::stages], empty[C::stages];

  static_assert(Tile::warps * Tile::columns * C::head_dim * 4 <= 2 * Tile::matrix_bytes, "a stage holds all o");
  // Where a stage keeps o[dim .. dim + 3] of a warp's column, `dim` a multiple of 4 or else one float. The swap of
  // eights spreads the columns, which lanes write side by side, over the banks.
  HELIX_DEVICE float* o(u32 in_stage, int warp, int column, int dim) {
    float* all = reinterpret_cast<float*>(stage[in_stage][0]);
    return all + (warp * Tile::columns + column) * C::head_dim + (dim ^ column / 2 % 4 * 8);
  }
};

struct GqaArguments {
  bfloat16* o;
  float* lse;
  const bfloat16* q;
  const int* page_table;
  const int* lengths;
  const int* schedule;
  MergeSpace space;
  int rows, max_pages;
};

// The place of a block in its share.
struct GqaCursor {
  int row, kv_head, tile, tiles, length, left;  // `left` tiles of the share from here on

  HELIX_DEVICE explicit GqaCursor(const BlockPlan& plan)
      : row(plan.row),
        kv_head(plan.kv_head),
        tile(plan.tile),
        tiles(plan.tiles),
        length(plan.length),
        left(plan.count) {}
  HELIX_DEVICE int last() const { return min(tiles, tile + left); }

  // Past this unit's tiles; false if they were the share's last.
  template <class C> HELIX_DEVICE bool next_unit(const int* lengths) {
    left -= last() - tile;
    if (left == 0) return false;
    tile = 0;
    if (++kv_head < C::kv_heads) return true;
    kv_head = 0;
    do length = lengths[++row];
    while (length == 0);
    tiles = tiles_of<C>(length);
    return true;
  }
};

}  // namespace helix
