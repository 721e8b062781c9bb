// FFN of few tokens: a mixture of experts, with or without shared experts, or one dense gated MLP.
//
//   gate_up: activated[n] = factor * silu(x[n] Wg^T) * (x[n] Wu^T) of every expert e that token n chose, and of the
//            always-active one (the shared experts of a mixture, or a dense MLP), whose factor is 1
//   down:    out[n] = the sum over them of activated[n, e] Wd[e]^T
//
//   x [N, D], experts' gate and up [L, I, D] and down [L, D, I], the always-active one's [S, D], [S, D] and [D, S],
//   logits [N, E] of the router, activated [N, top_k * I + S], out [N, D]
//
// L experts of E are this rank's; another rank adds the rest. Each block computes the routing (routing.cuh). An expert's
// weights are read once for all tokens: all tokens are multiplied, since a product has room for 8, and only the results
// of those that chose the expert are kept. A token that is NaN spoils none but itself. Nothing is added by several
// blocks: the same inputs give the same bits.
// A tile of gate_up is 8 rows of gate over the same 8 of up, so that both meet in one thread. The always-active tiles
// come first, as their weights can be fetched before the router has finished; down knows the routing before gate_up has
// finished. Shared memory: the sums of the warps (skinny.cuh), and the routing.
// Roofline: memory, 3 * D * (I * active experts + S) * 2 bytes.
#pragma once
#include "helix/routing.cuh"
#include "helix/skinny.cuh"

namespace helix {

// Dense: nothing to route.
template <class C> struct NoRouting {
  static constexpr int count = 0;
};
template <class C, bool is_mixture> struct RoutingOf { using Type = NoRouting<C>; };
template <class C> struct RoutingOf<C, true> { using Type = Routing<C>; };
template <class C> using RoutingFor = typename RoutingOf<C, (C::experts > 0)>::Type;

template <class C> constexpr int kActivated = C::top_k * C::expert_columns + C::always_columns;  // of one token

struct GateUpArguments {
  bfloat16* activated;
  const bfloat16 *x, *gate, *up, *always_gate, *always_up;
  const float *logits, *bias;
  int tokens, first_expert;
};

template <class C> struct GateUp {
  static constexpr int kColumns = kTileRows / 2;  // of a tile, gate and up each
  static constexpr int kAlways = C::always_columns / kColumns;  // tiles
  static constexpr int kEach = C::experts ? C::expert_columns / kColumns : 1;
  static_assert(C::always_columns % kColumns == 0 && C::expert_columns % kColumns == 0, "whole tiles");
  const GateUpArguments& a;
  const RoutingFor<C>& routing;

  HELIX_DEVICE const bfloat16* x() const { return a.x; }
  HELIX_DEVICE int tiles() const { return kAlways + routing.count * kEach; }
  HELIX_DEVICE int units() const { return (C::hidden + kUnitColumns - 1) / kUnitColumns; }

  HELIX_DEVICE Unit<C::eights> unit(int tile, int index) const {
    const int lane = int(threadIdx.x) % kWarp, column = index * kUnitColumns + lane_column();
    Unit<C::eights> unit;
    if (tile < kAlways) {
      place(unit, a.always_gate, a.always_up, tile * kColumns + lane / 4, column);
    } else if constexpr (C::experts > 0) {
      const i64 expert = i64(routing.active[(tile - kAlways) / kEach]) * C::expert_columns * C::hidden;
      const int row = (tile - kAlways) % kEach * kColumns + lane / 4;
      place(unit, a.gate + expert, a.up + expert, row, column);
    }
    unit.columns = C::hidden - column;
#pragma unroll
    for (int t = 0; t < C::eights; ++t) {
      const int token = t * kEight + lane / 4;
      unit.x[t] = token < a.tokens ? token * C::hidden + column : -1;
    }
    return unit;
  }

  // Row `row` of each matrix.
  static HELIX_DEVICE void place(Unit<C::eights>& unit, const bfloat16* gate, const bfloat16* up, int row, int column) {
    const i64 at = i64(row) * C::hidden + column;
    unit.low = gate + at;
    unit.high = up + at;
  }

  template <class Total> HELIX_DEVICE void store(int tile, int thread, const Total& total) const {
    for (int i = thread; i < a.tokens * kColumns; i += C::team * kWarp) {
      const int token = i / kColumns, row = i % kColumns;
      int column = C::top_k * C::expert_columns + tile * kColumns + row;
      float factor = 1.0f;
      if constexpr (C::experts > 0) {
        if (tile >= kAlways) {
          const int slot = routing.slots[routing.active[(tile - kAlways) / kEach]][token];
          if (slot == RoutingFor<C>::kNone) continue;
          column = slot * C::expert_columns + (tile - kAlways) % kEach * kColumns + row;
          factor = routing.factors[token][slot];
        }
      }
      const float gate = total(token, row), up = total(token, row + kColumns);
      a.activated[i64(token) * kActivated<C> + column] =
          from_float<bfloat16>(factor * up * (gate / (1.0f + expf(-gate))));
    }
  }
};

struct DownArguments {
  bfloat16* out;
  const bfloat16 *activated, *down, *always_down;
  const float *logits, *bias;
  int tokens, first_expert;
};

template <class C> struct Down {
  static constexpr int kAlways = (C::always_columns + kUnitColumns - 1) / kUnitColumns;  // units of a tile
  static constexpr int kEach = C::experts ? (C::expert_columns + kUnitColumns - 1) / kUnitColumns : 1;
  const DownArguments& a;
  const RoutingFor<C>& routing;

  HELIX_DEVICE const bfloat16* x() const { return a.activated; }
  HELIX_DEVICE int tiles() const { return (C::hidden + kTileRows - 1) / kTileRows; }
  HELIX_DEVICE int units() const { return kAlways + routing.count * kEach; }

  HELIX_DEVICE Unit<C::eights> unit(int tile, int index) const {
    const int lane = int(threadIdx.x) % kWarp, row = tile * kTileRows + lane / 4;
    Unit<C::eights> unit;
    if (index < kAlways) {
      const int column = index * kUnitColumns + lane_column();
      place(unit, a.always_down, row, column, C::always_columns);
#pragma unroll
      for (int t = 0; t < C::eights; ++t) {
        const int token = t * kEight + lane / 4;
        unit.x[t] = token < a.tokens ? token * kActivated<C> + C::top_k * C::expert_columns + column : -1;
      }
    } else if constexpr (C::experts > 0) {
      const int expert = routing.active[(index - kAlways) / kEach];
      const int column = (index - kAlways) % kEach * kUnitColumns + lane_column();
      place(unit, a.down + i64(expert) * C::hidden * C::expert_columns, row, column, C::expert_columns);
#pragma unroll
      for (int t = 0; t < C::eights; ++t) {
        const int token = t * kEight + lane / 4;
        const int slot = token < a.tokens ? routing.slots[expert][token] : RoutingFor<C>::kNone;
        unit.x[t] = slot != RoutingFor<C>::kNone ? token * kActivated<C> + slot * C::expert_columns + column : -1;
      }
    }
    return unit;
  }

  // From `column` on, rows `row` and `row + 8` of a matrix [D, columns]; beyond its end, whose results are not stored,
  // the last one.
  static HELIX_DEVICE void place(Unit<C::eights>& unit, const bfloat16* weights, int row, int column, int columns) {
    unit.low = weights + i64(min(row, C::hidden - 1)) * columns + column;
    unit.high = weights + i64(min(row + 8, C::hidden - 1)) * columns + column;
    unit.columns = columns - column;
  }

  template <class Total> HELIX_DEVICE void store(int tile, int thread, const Total& total) const {
    for (int i = thread; i < a.tokens * kTileRows; i += C::team * kWarp) {
      const int token = i / kTileRows, row = i % kTileRows;
      if (tile * kTileRows + row < C::hidden)
        a.out[i64(token) * C::hidden + tile * kTileRows + row] = from_float<bfloat16>(total(token, row));
    }
  }
};

template <class C> HELIX_DEVICE void gate_up(const GateUpArguments& a) {
  __shared__ Sums<C> sums;
  __shared__ RoutingFor<C> routing;
  const GateUp<C> work = {a, routing};
  Skinny<C, GateUp<C>> skinny(work);
  const bool early = skinny.tile < GateUp<C>::kAlways;  // the first tile is there whatever the routing
  if (early) skinny.fetch(skinny.index < work.units());
  if constexpr (C::experts > 0)
    if (a.bias && threadIdx.x * 32 < C::experts) prefetch_line(a.bias + threadIdx.x * 32);
  wait_for_previous_kernels();
  let_next_kernel_start();
  if constexpr (C::experts > 0) routing.make(a.logits, a.bias, a.tokens, a.first_expert);
  if (!early) skinny.fetch();
  skinny.run(sums);
}

template <class C> HELIX_DEVICE void down(const DownArguments& a) {
  __shared__ Sums<C> sums;
  __shared__ RoutingFor<C> routing;
  const Down<C> work = {a, routing};
  Skinny<C, Down<C>> skinny(work);
  const bool early = skinny.index < Down<C>::kAlways;  // as in gate_up
  if (early) skinny.fetch(skinny.tile < work.tiles());
  if constexpr (C::experts > 0) routing.make(a.logits, a.bias, a.tokens, a.first_expert);
  if (!early) skinny.fetch();
  wait_for_previous_kernels();
  let_next_kernel_start();
  skinny.run(sums);
}

}  // namespace helix
