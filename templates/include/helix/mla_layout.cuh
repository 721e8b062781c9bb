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

// Regions in the order in which a tile's are fetched and its scores use them: half of each side's columns, the other
// half of side 0, the rotary columns, the other half of side 1.
constexpr int kRegions = 5, kRotary = 3, kLast = 4;
constexpr __device__ int region_of(int side, int half) { return half == 0 ? side : 2 + 2 * side; }
constexpr __device__ int chunks_in(int region) { return region == kRotary ? 1 : 2; }  // of 64 columns
constexpr __device__ int first_chunk(int region) {
  return region == kRotary ? 8 : region == kLast ? 6 : region % 2 * 4 + region / 2 * 2;
}

// A segment's queries come before its tiles, in the slots of all regions but the last; but the chunks that do not meet
// a region before kRotary, from this one on, have a place of their own.
constexpr int kHeldChunks = 2 * kRotary;

// Where a role is in the rings of slots.
struct Stage {
  static constexpr u32 kSlots = 3, kLastSlots = 2;  // of a region, and of the last one
  u32 slot = 0, parity = 0, last_slot = 0, last_parity = 0;
  HELIX_DEVICE u32 slot_of(int region) const { return region == kLast ? last_slot : slot; }
  HELIX_DEVICE u32 parity_of(int region) const { return region == kLast ? last_parity : parity; }
  HELIX_DEVICE void pass_queries() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
  HELIX_DEVICE void pass_tile() {
    pass_queries();
    last_parity ^= last_slot;
    last_slot ^= 1;
  }
  // Where the queries are, at the segment's first tile.
  HELIX_DEVICE Stage before() const { return slot == 0 ? Stage{kSlots - 1, parity ^ 1} : Stage{slot - 1, parity}; }
};

struct MlaShared {
  static constexpr u32 kChunk = 64 * 128, kRegion = 2 * kChunk, kRing = Stage::kSlots * kRegion;  // bytes
  static constexpr u32 rotary = kRotary * kRing, last = rotary + Stage::kSlots * kChunk;
  static constexpr u32 q = last + Stage::kLastSlots * kRegion, rescale = q + (9 - kHeldChunks) * kChunk;
  static constexpr u32 inverse = rescale + Stage::kSlots * 256, full_barriers = inverse + Stage::kSlots * 256;
  static constexpr u32 kBarriers = 8 * Stage::kSlots * kRegions, empty_barriers = full_barriers + kBarriers;
  static constexpr u32 p_full_barriers = empty_barriers + kBarriers;
  static constexpr u32 turn_barriers = p_full_barriers + 8 * Stage::kSlots, q_empty = turn_barriers + 8 * Stage::kSlots;
  static constexpr u32 bytes = q_empty + 8;
  static_assert(bytes <= 232448, "shared memory of one block");
  HELIX_DEVICE static u32 region(const Stage& stage, int region) {
    if (region == kRotary) return rotary + stage.slot * kChunk;
    return region == kLast ? last + stage.last_slot * kRegion : u32(region) * kRing + stage.slot * kRegion;
  }
  HELIX_DEVICE static u32 barrier(const Stage& stage, int region) {
    return 8 * (u32(region) * Stage::kSlots + stage.slot_of(region));
  }
  HELIX_DEVICE static u32 full(const Stage& stage, int region) { return full_barriers + barrier(stage, region); }
  HELIX_DEVICE static u32 empty(const Stage& stage, int region) { return empty_barriers + barrier(stage, region); }
  // P takes the place of the rotary columns.
  HELIX_DEVICE static u32 p(const Stage& stage) { return region(stage, kRotary); }
  HELIX_DEVICE static u32 p_full(const Stage& stage) { return p_full_barriers + 8 * stage.slot; }
  // Of the products held back.
  HELIX_DEVICE static u32 turn(const Stage& stage) { return turn_barriers + 8 * stage.slot; }
  HELIX_DEVICE static u32 row_rescale(const Stage& stage, u32 row) { return rescale + 256 * stage.slot + 4 * row; }
  HELIX_DEVICE static u32 row_inverse(const Stage& stage, u32 row) { return inverse + 256 * stage.slot + 4 * row; }
};
using M = MlaShared;

template <class C> HELIX_DEVICE int head_half() { return C::cluster == 2 ? int(cluster_rank()) : 0; }
template <class C> HELIX_DEVICE int queries_here() {
  return C::queries < 64 ? C::queries : C::queries % 64 == 0 || head_half<C>() == 0 ? 64 : C::queries % 64;
}
template <class C> HELIX_DEVICE int worker_index() { return int(blockIdx.x) / (C::cluster * C::team); }

// Where the queries of this cluster are, of row (or partial) `row`, counted in clusters' queries.
template <class C> HELIX_DEVICE i64 mla_place(int row) {
  return i64(row) * C::team + int(blockIdx.x) / C::cluster % C::team;
}

// The segments of this block's worker, in order.
template <class C> struct Segments {
  const Segment* all;
  int at, others, left;
  HELIX_DEVICE explicit Segments(const Segment* segments) : Segments(segments, segments[worker_index<C>()]) {}
  HELIX_DEVICE Segments(const Segment* segments, const Segment& first)
      : all(segments), at(worker_index<C>()), others(first.more), left(first.count) {}
  HELIX_DEVICE const Segment& current() const { return all[at]; }
  HELIX_DEVICE bool next() {
    at = others++;
    return --left > 0;
  }
};

struct MlaMaps { const TensorMap *q, *kv, *rotary; };

// Signals the blocks that fetch into this block's memory that a lane has no more use for what `empty` guards.
template <class C> HELIX_DEVICE void mla_release(u32 empty) {
  if constexpr (C::cluster == 1) barrier_arrive(empty);
  else
    for (u32 rank = 0; rank < C::cluster; ++rank) barrier_arrive_cluster(empty, rank);
}

// The bound of this cluster's query token `token` of a segment's row; 0 for queries that only fill up a matrix.
template <class C> HELIX_DEVICE int mla_bound(const MlaArguments& a, const Segment& segment, int token) {
  if constexpr (C::row_tokens == 1) return segment.length;
  else return token < C::cluster_tokens ? a.lengths[mla_place<C>(segment.row) * C::cluster_tokens + token] : 0;
}

// Offset of byte `column` in row `row` of a [rows][128 bytes] tile with the 128-byte swizzle.
HELIX_DEVICE u32 swizzled(u32 row, u32 column) { return row * 128 + (column ^ (row % 8 * 16)); }

}  // namespace helix
