// Schedule: which tokens each worker (a thread block, or several that read the same tiles) of the partial kernel reads.
//
//   lengths [B, row_tokens] -> segments [2 W + B]: worker w's first is [w], its others start at [.more];
//   split rows, for the merge
//
// A row is a run of 64-token tiles, as far as its last query token sees. Workers take tiles in order, near the average
// of what is left, but a worker keeps whole rows, and less so equal pieces of a long row, where it has not much more
// than the average then: every cut is a partial that must be written and merged. One thread decides; it is W + B short
// steps, once a step of the model.
#pragma once
#include "helix/element.cuh"

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

// A row's largest bound: bounds rise from one query token to the next.
template <int kRowTokens> HELIX_DEVICE int longest(const int* lengths, int row) {
  return lengths[row * kRowTokens + kRowTokens - 1];
}

template <int kRowTokens>
HELIX_DEVICE void make_schedule(Schedule out, const int* lengths, int rows, int workers) {
  constexpr int kCached = 2048;
  __shared__ int lanes[32], cached[kCached];
  int mine = 0;
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
    const int length = longest<kRowTokens>(lengths, row);
    mine += tiles_of(length);
    if (row < kCached) cached[row] = length;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, distance);
  if (threadIdx.x % 32 == 0) lanes[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  int left = 0;
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) left += lanes[warp];

  const int average = (left + workers - 1) / workers;
  // Measured: cutting a row that could stay whole costs about the time of six tiles, one that is cut anyway, of one.
  const int most_whole = average + min(average / 16, 6), most_cut = average + min(average / 48, 1);
  int row = 0, at = 0, others = workers, partial = 0, splits = 0, row_first_partial = 0;
  int length = rows > 0 ? cached[0] : 0;
  for (int worker = 0; worker < workers; ++worker) {
    Segment first = {0, 0, 0, 0, 0, 0, 0, others};
    const int workers_left = workers - worker, share = quotient(left + workers_left - 1, workers_left);
    int load = 0;
    while (row < rows) {
      const int tiles = tiles_of(length), rest = tiles - at;
      int take = rest;
      if (load + rest > (at == 0 ? most_whole : most_cut) && workers_left > 1) {
        const int room = share - load;
        if (load > 0 && room < share / 8 + 1) break;
        const int pieces = quotient(rest + most_cut - 1, most_cut), piece = quotient(rest + pieces - 1, pieces);
        take = load == 0 && piece > room ? piece : room;
        if (take > rest) take = rest;
      }
      if (take == 0 && load > 0 && tiles > 0) break;
      const bool whole = take == tiles;
      if (!whole && at == 0) row_first_partial = partial;
      const Segment segment = {row, length, at, at + take, whole ? 0 : partial, whole ? 1 : 0, 0, 0};
      if (first.count++ == 0) {
        first = segment, first.count = 1, first.more = others;
      } else {
        out.segments[others++] = segment;
      }
      if (!whole) ++partial;
      load += take, left -= take, at += take;
      if (at < tiles) break;
      if (!whole) out.split[splits++] = {row, row_first_partial, partial - row_first_partial, 0};
      ++row, at = 0;
      if (row < rows) length = row < kCached ? cached[row] : longest<kRowTokens>(lengths, row);
      if (load >= share && workers_left > 1) break;
    }
    out.segments[worker] = first;
  }
  *out.split_count = splits;
}

}  // namespace helix
