// What the warpgroups of the MLA partial share (see mla_partial.cuh): arguments, shared memory, positions.
#pragma once
#include "helix/mla_schedule.cuh"
#include "helix/sm90.cuh"

namespace helix {

// What a launch is given; kv pages come through MlaMaps.
struct MlaArguments {
  bfloat16* o;
  float* lse;
  bfloat16* part_o;
  float* part_lse;
  const int* page_table;
  const Segment* segments;
  int max_pages;
  const int* lengths;  // [rows, row_tokens]
};

// Regions in the order in which they are fetched and used: a half of each side's columns, the others, the rotary ones.
constexpr int kRegions = 5, kRotary = 4;
constexpr __device__ int region_of(int side, int half) { return side + 2 * half; }
constexpr __device__ int first_chunk(int region) { return region == kRotary ? 8 : region % 2 * 4 + region / 2 * 2; }
constexpr __device__ int chunks_in(int region) { return region == kRotary ? 1 : 2; }
constexpr __device__ u32 region_offset(int region) { return u32(region) * 16384u; }

constexpr u32 kHalfOffset = region_offset(region_of(0, 1)) - region_offset(region_of(0, 0));  // to a side's other half

constexpr int kStages = 3;

struct MlaShared {
  static constexpr u32 kTile = 64 * 1152, kChunk = 64 * 128;  // bytes
  static constexpr u32 tiles = 0, q = tiles + kStages * kTile, rescale = q + kChunk, inverse = rescale + kStages * 256;
  static constexpr u32 full_barriers = inverse + kStages * 256, empty_barriers = full_barriers + 8 * kStages * kRegions;
  static constexpr u32 p_full_barriers = empty_barriers + 8 * kStages * kRegions, q_empty = p_full_barriers + 8 * kStages;
  static constexpr u32 bytes = q_empty + 8;
  static_assert(bytes <= 232448, "shared memory of one block");
  HELIX_DEVICE static u32 region(u32 stage, int region) { return tiles + stage * kTile + region_offset(region); }
  HELIX_DEVICE static u32 p(u32 stage) { return region(stage, kRotary); }  // once the scores have been computed
  HELIX_DEVICE static u32 full(u32 stage, int region) { return full_barriers + 8 * (stage * kRegions + region); }
  HELIX_DEVICE static u32 empty(u32 stage, int region) { return empty_barriers + 8 * (stage * kRegions + region); }
  HELIX_DEVICE static u32 p_full(u32 stage) { return p_full_barriers + 8 * stage; }
  HELIX_DEVICE static u32 row_rescale(u32 stage, u32 row) { return rescale + 256 * stage + 4 * row; }
  HELIX_DEVICE static u32 row_inverse(u32 stage, u32 row) { return inverse + 256 * stage + 4 * row; }
};
using M = MlaShared;

// Which tile of the ring a role is at.
struct Stage {
  u32 index = 0, parity = 0;
  HELIX_DEVICE void advance() {
    if (++index == kStages) index = 0, parity ^= 1;
  }
};

template <class C> HELIX_DEVICE int head_half() { return C::cluster == 2 ? int(cluster_rank()) : 0; }
template <class C> HELIX_DEVICE int queries_here() {
  return C::queries < 64 ? C::queries : C::queries % 64 == 0 || head_half<C>() == 0 ? 64 : C::queries % 64;
}
template <class C> HELIX_DEVICE int worker_index() { return int(blockIdx.x) / C::cluster; }

// The segments of this block's worker, in order.
template <class C> struct Segments {
  const Segment* all;
  int at, others, left;
  HELIX_DEVICE explicit Segments(const Segment* segments) : all(segments), at(worker_index<C>()) {
    others = all[at].more;
    left = all[at].count;
  }
  HELIX_DEVICE const Segment& current() const { return all[at]; }
  HELIX_DEVICE bool next() {
    at = others++;
    return --left > 0;
  }
};

struct MlaMaps { const TensorMap *q, *kv, *rotary; };

// Signals the blocks that fetch into this block's memory, for which a warp has no more use for what `empty` guards.
template <class C> HELIX_DEVICE void mla_release(u32 empty) {
  const u32 lane = threadIdx.x % 32;
  if constexpr (C::cluster == 2) {
    if (lane < 2) barrier_arrive_cluster(empty, lane);
  } else {
    if (lane == 0) barrier_arrive(empty);
  }
}

// The bound of query token `token` of a segment's row; 0 for queries that only fill up a matrix.
template <class C> HELIX_DEVICE int mla_bound(const MlaArguments& a, const Segment& segment, int token) {
  if constexpr (C::row_tokens == 1) return segment.length;
  else return token < C::row_tokens ? a.lengths[segment.row * C::row_tokens + token] : 0;
}

// Offset of byte `column` in row `row` of a [rows][128 bytes] tile with the 128-byte swizzle.
HELIX_DEVICE u32 swizzled(u32 row, u32 column) { return row * 128 + (column ^ (row % 8 * 16)); }

}  // namespace helix
