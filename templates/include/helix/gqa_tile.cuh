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
  static_assert(C::head_dim == 64 || C::head_dim == 128, "a token is a half, one or two lines of 128 bytes");
  static_assert(C::group >= 1 && C::query_tokens >= 1 && kQueries<C> <= 16 && C::tile == (C::fp8 ? 128 : 64));
  static_assert(C::block % 16 == 0 && (C::block % C::tile == 0 || C::tile % C::block == 0), "boxes fill a tile");
  static constexpr int eights = kQueries<C> <= 8 ? 1 : 2, columns = eights * 8;  // queries, padded
  static constexpr int page_rows = C::block < C::tile ? C::block : C::tile;  // tokens a box
  static constexpr int boxes = C::tile / page_rows;
  static constexpr int token_bytes = C::head_dim * (C::fp8 ? 1 : 2);
  static constexpr int line_tokens = token_bytes < 128 ? 128 / token_bytes : 1;
  static constexpr int plane_bytes = page_rows * 128;  // 64 columns of a box in bf16: one swizzled plane
  static constexpr int box_bytes = page_rows * token_bytes;
  static constexpr int matrix_bytes = C::tile * token_bytes;
  static constexpr int slices = 4, slice_tokens = C::tile / slices;
  static constexpr int warps = slices * eights;  // that compute: each a slice of the tile's tokens, for eight queries
  static constexpr int threads = warps * kWarp;

  // Where a matrix of a stage has the first token of a slice.
  HELIX_DEVICE static int offset_of(int slice) {
    const int token = slice * slice_tokens;
    if constexpr (C::fp8) return token * token_bytes;
    static_assert(C::fp8 || page_rows % slice_tokens == 0, "a slice's tokens lie in one page");
    return token / page_rows * box_bytes + token % page_rows * 128;
  }
};

// The scales of FP8, K's and V's, of each token in a stage; `at`: from a slice's first K token on.
template <class C, bool = C::fp8> struct GqaScales {
  HELIX_DEVICE const u8* at(u32, int) const { return nullptr; }
};
template <class C> struct GqaScales<C, true> {
  alignas(16) u8 of[C::stages][2][C::tile];
  HELIX_DEVICE const u8* at(u32 stage, int slice) const { return of[stage][0] + slice * GqaTile<C>::slice_tokens; }
};

template <class C> struct GqaShared {
  using Tile = GqaTile<C>;
  alignas(1024) u8 stage[C::stages][2][Tile::matrix_bytes];  // K, V
  float largest[Tile::columns][Tile::slices], sum[Tile::columns][Tile::slices];
  MergePlan merge[2];
  MergeShared<Tile::threads> merge_space;
  u64 full[C::stages], empty[C::stages];
  GqaScales<C> scales;

  static_assert(Tile::slices * Tile::columns * C::head_dim * 4 <= 2 * Tile::matrix_bytes, "a stage holds all o");
  // Where a stage keeps o[dim .. dim + 3] of a slice's column, `dim` a multiple of 4 or else one float. The swap of
  // eights spreads the columns, which lanes write side by side, over the banks.
  HELIX_DEVICE float* o(u32 in_stage, int slice, int column, int dim) {
    float* all = reinterpret_cast<float*>(stage[in_stage][0]);
    return all + (slice * Tile::columns + column) * C::head_dim + (dim ^ column / 2 % 4 * 8);
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
  const u8* k_scale;  // null unless FP8
  const u8* v_scale;
};

// The largest score of no token where differences of largest scores are taken, whose sum of weights is then 0.
constexpr float kLowest = -3.0e38f;

// Of a word with 16 bits of token `token` and 16 of the next, those of tokens below `valid`.
HELIX_DEVICE u32 valid_bits(int token, int valid) {
  return token + 1 < valid ? 0xffffffffu : token < valid ? 0xffffu : 0;
}

// Which tokens the queries of this lane may attend: columns lane % 4 * 2 + {0, 1} of the warp's eight.
template <class C> struct GqaBounds {
  int behind[2];  // tokens at the row's end that are not for this query

  HELIX_DEVICE void start(const GqaArguments& args, int row, int length, int eight, int lane) {
    if constexpr (C::query_tokens == 1) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int of_share = min((eight * 8 + lane % 4 * 2 + i) / C::share_heads, C::share_tokens - 1);
      int token = first_token_of_share<C>() + of_share;
      if constexpr (kUneven<C>) token = min(token, C::query_tokens - 1);
      behind[i] = length - args.lengths[row * C::query_tokens + token];
    }
  }
  // Token `token` of some of which `valid` are in the row.
  HELIX_DEVICE bool admit(int i, int token, int valid) const {
    if constexpr (C::query_tokens == 1) return token < valid;
    return token < valid - behind[i];
  }
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
    do length = row_length<C>(lengths, ++row);
    while (length == 0);
    tiles = tiles_of<C>(length);
    return true;
  }
};

}  // namespace helix
