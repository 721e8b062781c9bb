// Schedule: which tokens each worker (a thread block, or several that read the same tiles) of the partial kernel reads.
//
//   lengths [B, row_tokens] -> segments [2 W + B]: worker w's first is [w], its others start at [.more];
//   split rows, for the merge
//
// A row is a run of 64-token tiles, as far as its last query token sees. Workers take tiles in order, near the average
// of what is left, but a worker keeps whole rows, and less so equal pieces of a long row, where it has not much more
// than the average then: every cut is a partial that must be written and merged.
//
// Who takes what depends on what is left, so one warp decides, worker by worker: a short step each, once a step of the
// model. But workers that get one piece of the same row each are found 32 at a time: lane i looks whether worker + i
// would take piece i, if those before it took theirs.
#pragma once
#include "helix/warp.cuh"

namespace helix {

constexpr int kTileTokens = 64;

struct alignas(16) Segment {
  int row, length;            // of the row, in tokens
  int first_tile, last_tile;  // [first, last) of its tiles
  int partial;                // where its partial goes, if the row is split
  int whole;                  // 1: the segment is the whole row, and writes the result itself
  int count, more;            // in a worker's first: how many it has, and where the others are
};

struct alignas(16) SplitRow { int row, first, count, unused; };  // partials [first, first + count)

struct Schedule {
  Segment* segments;
  SplitRow* split;    // [W]
  int* split_count;   // [1]
};

// a / b for 0 <= a < 2^24 and 0 < b, at a fraction of an integer division's time; exact below 2^20, else nearly so.
HELIX_DEVICE int quotient(int a, int b) {
  const int q = int(__fdividef(float(a), float(b))), rest = a - q * b;
  return rest < 0 ? q - 1 : rest >= b ? q + 1 : q;
}

HELIX_DEVICE int tiles_of(int length) { return (length + kTileTokens - 1) / kTileTokens; }

// How many lanes of the warp there are before the first for which `holds` does not.
HELIX_DEVICE int lanes_before_other(bool holds) {
  const u32 others = ~__ballot_sync(0xffffffffu, holds);
  return others ? __ffs(int(others)) - 1 : kWarp;
}

// A row's largest bound: bounds rise from one query token to the next.
template <int kRowTokens> HELIX_DEVICE int longest(const int* lengths, int row) {
  return lengths[row * kRowTokens + kRowTokens - 1];
}

template <int kRowTokens>
HELIX_DEVICE void make_schedule(Schedule out, const int* lengths, int rows, int workers) {
  constexpr int kCached = 2048;
  __shared__ int lanes[kWarp], cached[kCached];
  int mine = 0;
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
    const int length = longest<kRowTokens>(lengths, row);
    mine += tiles_of(length);
    if (row < kCached) cached[row] = length;
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, distance);
  if (threadIdx.x % kWarp == 0) lanes[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const int lane = threadIdx.x;
  int left = 0;
  for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) left += lanes[warp];

  const int average = (left + workers - 1) / workers;
  // Measured: cutting a row that could stay whole costs about the time of six tiles, one that is cut anyway, of one.
  const int most_whole = average + min(average / 16, 6), most_cut = average + min(average / 48, 1);
  int row = 0, at = 0, others = workers, partial = 0, splits = 0, row_first_partial = 0;
  const auto length_of = [&](int row) {
    return row >= rows ? 0 : row < kCached ? cached[row] : longest<kRowTokens>(lengths, row);
  };
  int length = length_of(0);
  // `take` tiles of the row, in `pieces` segments, are dealt.
  const auto advance = [&](int take, int pieces, bool whole) {
    if (!whole && at == 0) row_first_partial = partial;
    if (!whole) partial += pieces;
    left -= take, at += take;
    if (at < tiles_of(length)) return;
    if (!whole && lane == 0) out.split[splits] = {row, row_first_partial, partial - row_first_partial, 0};
    if (!whole) ++splits;
    at = 0, length = length_of(++row);
  };

  int worker = 0;
  while (worker < workers && row < rows) {
    const int workers_left = workers - worker, tiles = tiles_of(length), rest = tiles - at;
    const int share = quotient(left + workers_left - 1, workers_left);

    // A worker each: equal pieces of the row while they are no less than its share, or its share while that is no less
    // than an equal piece of what is left of the row.
    int size, larger, before, piece;
    const auto cut = [&](int all, int pieces) {  // the larger pieces first; each lane has one
      size = quotient(all, pieces), larger = all - size * pieces;
      before = size * lane + min(lane, larger), piece = size + (lane < larger);
    };
    const int most = at == 0 ? most_whole : most_cut, then_left = workers_left - lane;
    const int pieces = rest > most ? quotient(rest + most_cut - 1, most_cut) : 1;
    cut(rest, pieces);
    int taking = lanes_before_other(lane < pieces && then_left > 1 &&
                                    quotient(left - before + then_left - 1, then_left) <= piece);
    if (taking == 0) {
      cut(left, workers_left);
      const int then_rest = rest - before, then_pieces = quotient(max(then_rest, 1) + most_cut - 1, most_cut);
      taking = lanes_before_other(then_rest > piece && quotient(then_rest + then_pieces - 1, then_pieces) <= piece);
    }
    if (taking > 0) {
      const bool whole = size == tiles;
      if (lane < taking)
        out.segments[worker + lane] = {
            row, length, at + before, at + before + piece, whole ? 0 : partial + lane, whole ? 1 : 0, 1, others};
      advance(size * taking + min(taking, larger), taking, whole);
      worker += taking;
      continue;
    }

    // One worker: pieces of several rows.
    Segment first = {0, 0, 0, 0, 0, 0, 0, others};
    int load = 0;
    while (row < rows) {
      const int tiles = tiles_of(length), rest = tiles - at;
      int take = rest;
      if (load + rest > (at == 0 ? most_whole : most_cut) && workers_left > 1) {
        const int room = share - load;
        if (load > 0 && room < share / 8 + 1) break;
        const int pieces = quotient(rest + most_cut - 1, most_cut), piece = quotient(rest + pieces - 1, pieces);
        take = load == 0 && piece > room ? piece : room;  // the former only after rows without tokens
        if (take > rest) take = rest;
      }
      if (take == 0 && load > 0 && tiles > 0) break;
      const bool whole = take == tiles, ends = at + take == tiles;
      const Segment segment = {row, length, at, at + take, whole ? 0 : partial, whole ? 1 : 0, 0, 0};
      if (first.count++ == 0) {
        first = segment, first.count = 1, first.more = others;
      } else {
        if (lane == 0) out.segments[others] = segment;
        ++others;
      }
      load += take;
      advance(take, 1, whole);
      if (!ends || (load >= share && workers_left > 1)) break;
    }
    if (lane == 0) out.segments[worker] = first;
    ++worker;
  }
  for (worker += lane; worker < workers; worker += kWarp) out.segments[worker] = {0, 0, 0, 0, 0, 0, 0, others};
  if (lane == 0) *out.split_count = splits;
}

}  // namespace helix
