// Linear: y[n, b] = x[n, b] W[b]^T for few rows n and a batch b of matrices (heads; 1 for a plain projection).
//
//   x [N, B, columns], W [B, rows, columns], y [N, B, rows], bfloat16; x and y by strides, W contiguous in its columns
//
// Shared memory: the sums of the warps (skinny.cuh). Roofline: memory, B * rows * columns * 2 bytes of weights.
#pragma once
#include "helix/skinny.cuh"

namespace helix {

struct LinearArguments {
  bfloat16* y;
  const bfloat16 *x, *weights;
  int tokens, rows, columns, matrices;
  int x_token, x_matrix, y_token, y_matrix;  // strides in elements
  i64 w_matrix;
};

template <class C> struct LinearWork {
  const LinearArguments& a;
  const int row_tiles;

  HELIX_DEVICE explicit LinearWork(const LinearArguments& a) : a(a), row_tiles((a.rows + kTileRows - 1) / kTileRows) {}

  HELIX_DEVICE const bfloat16* x() const { return a.x; }
  HELIX_DEVICE int tiles() const { return row_tiles * a.matrices; }
  HELIX_DEVICE int units() const { return (a.columns + kUnitColumns - 1) / kUnitColumns; }

  HELIX_DEVICE Unit<C::eights> unit(int tile, int index) const {
    const int lane = int(threadIdx.x) % kWarp, matrix = tile / row_tiles, column = index * kUnitColumns + lane_column();
    const int low = tile % row_tiles * kTileRows + lane / 4, last = a.rows - 1;  // rows beyond the last are not stored
    const bfloat16* weights = a.weights + matrix * a.w_matrix + column;
    Unit<C::eights> unit;
    unit.low = weights + i64(min(low, last)) * a.columns;
    unit.high = weights + i64(min(low + 8, last)) * a.columns;
    unit.columns = a.columns - column;
#pragma unroll
    for (int t = 0; t < C::eights; ++t) {
      const int token = t * kEight + lane / 4;
      unit.x[t] = token < a.tokens ? token * a.x_token + matrix * a.x_matrix + column : -1;
    }
    return unit;
  }

  template <class Total> HELIX_DEVICE void store(int tile, int thread, const Total& total) const {
    const int matrix = tile / row_tiles, first = tile % row_tiles * kTileRows;
    for (int i = thread; i < a.tokens * kTileRows; i += C::team * kWarp) {
      const int token = i / kTileRows, row = i % kTileRows;
      if (first + row < a.rows)
        a.y[i64(token) * a.y_token + i64(matrix) * a.y_matrix + first + row] =
            from_float<bfloat16>(total(token, row));
    }
  }
};

// By thread block `block` of `blocks`.
template <class C> HELIX_DEVICE void linear(const LinearArguments& a, int block, int blocks) {
  __shared__ Sums<C> sums;
  const LinearWork<C> work(a);
  Skinny<C, LinearWork<C>> skinny(work, block, blocks);
  skinny.fetch();
  skinny.prefetch();
  let_next_kernel_start();
  wait_for_previous_kernels();
  skinny.run(sums);
}

}  // namespace helix
