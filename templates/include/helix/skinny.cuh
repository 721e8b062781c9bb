// Skinny: tiles of 16 rows of a weight matrix times a few columns of activations, at the speed of the memory.
//
//   sums[16 rows][tokens] = W[16 rows][columns] x[tokens][columns]^T, bfloat16 with float32 sums, tokens <= 8 * eights
//
// Weights are read once, from global memory straight into the A operand of m16n8k16: of 32 columns, lane l takes columns
// l % 4 * 8 + {0..7} of rows l / 4 and l / 4 + 8, one load of 16 bytes each, which serve two products. x takes the same
// columns in the same order, so the sum is over the same pairs: a product does not care in which order columns come.
// Tokens are the 8 columns of a product, so up to 8 of them cost what one costs.
//
// A tile belongs to a team of C::team warps, which share its columns: warp m takes the units (kUnitColumns columns) m,
// m + team, ...; the sums of the warps are added in shared memory in the order of the warps. The same inputs give the
// same bits. A warp loads its next unit before it multiplies this one, across tiles; the first before the kernel waits
// for those before it, since weights are nobody's result.
#pragma once
#include "helix/mma.cuh"
#include "helix/warp.cuh"

namespace helix {

constexpr int kStepColumns = 32, kSteps = 4, kUnitColumns = kSteps * kStepColumns;
constexpr int kTileRows = 16, kEight = 8;
constexpr int kTokenPitch = kTileRows + 4;  // floats; of a warp's stores and loads of sums none share a bank

// One lane's part of 16 rows x kUnitColumns columns.
struct Slab { Vector16 low[kSteps], high[kSteps]; };

// What one lane multiplies: its rows of the tile and its token of each eight, from its own first column of the unit on.
template <int eights> struct Unit {
  const bfloat16 *low, *high;
  int x[eights];  // from Work's x on; negative: no such token, which counts as zeros
  int columns;                // until the rows end; 0 or less: there is nothing
};

HELIX_DEVICE Vector16 zeros() { return {{0, 0, 0, 0}}; }
HELIX_DEVICE int lane_column() { return int(threadIdx.x) % 4 * 8; }

template <int eights> HELIX_DEVICE Slab load_slab(const Unit<eights>& unit) {
  Slab slab;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int at = step * kStepColumns;
    const bool inside = at < unit.columns;
    slab.low[step] = inside ? load_streamed(unit.low + at) : zeros();
    slab.high[step] = inside ? load_streamed(unit.high + at) : zeros();
  }
  return slab;
}

template <int eights>
HELIX_DEVICE void load_tokens(Vector16 (&to)[kSteps][eights], const bfloat16* x, const Unit<eights>& unit) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int at = step * kStepColumns;
#pragma unroll
    for (int t = 0; t < eights; ++t)
      to[step][t] = at < unit.columns && unit.x[t] >= 0 ? load_global(x + unit.x[t] + at) : zeros();
  }
}

template <int eights>
HELIX_DEVICE void multiply(float (&sums)[eights][4], const Slab& slab, const Vector16 (&x)[kSteps][eights]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int word = 0; word < 4; word += 2) {
      const u32 *low = slab.low[step].words, *high = slab.high[step].words;
      const FragmentA a = {{low[word], high[word], low[word + 1], high[word + 1]}};
#pragma unroll
      for (int t = 0; t < eights; ++t)
        multiply_add(sums[t], a, FragmentB{{x[step][t].words[word], x[step][t].words[word + 1]}});
    }
}

// The sums of every warp of the block; two of them, so that a tile's are read while the next one's are written.
template <class C> struct Sums {
  static constexpr int kTokens = C::eights * kEight;
  float of[2][C::threads / kWarp][kTokens * kTokenPitch];
};

// Work: what is multiplied, with
//   int tiles() and int units(), the units of a tile
//   const bfloat16* x(), and Unit<C::eights> unit(int tile, int unit), of this lane
//   void store(int tile, const Total&), by all threads of a team, where Total(token, row) is a sum of the tile
template <class C, class Work> struct Skinny {
  static constexpr int kWarps = C::threads / kWarp, kTeams = kWarps / C::team;
  const Work& work;
  Unit<C::eights> unit;     // the next
  Slab slab;                // its weights
  const int block, blocks;  // of those that share the work
  int tile, index;          // the next unit's place

  HELIX_DEVICE Skinny(const Work& work, int block, int blocks)
      : work(work), block(block), blocks(blocks), tile(block * kTeams + team()), index(member()) {}
  HELIX_DEVICE explicit Skinny(const Work& work) : Skinny(work, int(blockIdx.x), int(gridDim.x)) {}

  static HELIX_DEVICE int team() { return int(threadIdx.x) / kWarp / C::team; }
  static HELIX_DEVICE int member() { return int(threadIdx.x) / kWarp % C::team; }

  // The weights of this warp's next unit, if there is one, are on their way after this.
  HELIX_DEVICE void fetch(bool exists) {
    if (exists) {
      unit = work.unit(tile, index);
    } else {
      unit.columns = 0;
    }
    slab = load_slab(unit);
  }
  HELIX_DEVICE void fetch() { fetch(tile < work.tiles() && index < work.units()); }

  // After the first fetch(), before the wait: the next unit of the tile, if there is one, to the L2.
  HELIX_DEVICE void prefetch() const {
    if (tile >= work.tiles() || index + C::team >= work.units()) return;
    const Unit<C::eights> next = work.unit(tile, index + C::team);
    const int quarter = int(threadIdx.x) % 4;  // four lanes have two rows of two lines each
    const int column = quarter % 2 * (kUnitColumns / 2) - lane_column();
    if (column < next.columns) prefetch_line((quarter < 2 ? next.low : next.high) + column);
  }

  // All tiles of this block, after the first fetch().
  HELIX_DEVICE void run(Sums<C>& shared) {
    const int rounds = (work.units() + C::team - 1) / C::team, stride = blocks * kTeams;
    int half = 0;
    for (int first = block * kTeams; first < work.tiles(); first += stride, half ^= 1) {
      const int mine = first + team();
      float sums[C::eights][4] = {};
      for (int round = 0; round < rounds; ++round) {
        const Slab now = slab;
        Vector16 x[kSteps][C::eights];
        load_tokens(x, work.x(), unit);
        index += C::team;
        if (round == rounds - 1) tile += stride, index = member();
        fetch();
        multiply(sums, now, x);
      }
      put(shared.of[half][threadIdx.x / kWarp], sums);
      __syncthreads();
      const auto& of = shared.of[half];
      const auto total = [&](int token, int row) {
        float sum = 0.0f;
#pragma unroll
        for (int m = 0; m < C::team; ++m) sum += of[team() * C::team + m][token * kTokenPitch + row];
        return sum;
      };
      if (mine < work.tiles()) work.store(mine, int(threadIdx.x) % (C::team * kWarp), total);
    }
  }

  static HELIX_DEVICE void put(float* to, const float (&sums)[C::eights][4]) {
    const int lane = int(threadIdx.x) % kWarp, row = lane / 4, token = lane % 4 * 2;
#pragma unroll
    for (int t = 0; t < C::eights; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(t * kEight + token + i % 2) * kTokenPitch + row + i / 2 * 8] = sums[t][i];
  }
};

}  // namespace helix
