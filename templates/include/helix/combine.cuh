// Combine: the exact merge of partials over disjoint parts of the KV, weighted by exp(lse - max lse).
//
//   o [N, rows, P] of type Part, lse [N, rows] float32 natural log  ->  o [rows, P] of type Element, lse [rows]
//   (rows = B * H). Used for the splits of one rank (Part = float32) and for the cp ranks after the exchange.
//
// One warp a row; each lane holds every 32nd column. Parts with lse = -inf are skipped, not multiplied by zero: their
// memory may hold NaN. All parts empty: o = 0, lse = -inf. Shared memory: none.
// Roofline: memory, N * rows * P elements read once.
#pragma once
#include "helix/warp.cuh"

namespace helix {

template <class C>
HELIX_DEVICE void combine(typename C::Element* o_out, float* lse_out, const typename C::Part* o, const float* lse,
                          int parts, int rows) {
  constexpr int kColumns = (C::partial_dim + kWarp - 1) / kWarp;
  const int lane = threadIdx.x % kWarp;
  const i64 row = i64(blockIdx.x) * (C::threads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;

  float largest = minus_infinity();
  for (int part = 0; part < parts; ++part) largest = fmaxf(largest, lse[i64(part) * rows + row]);

  float sum = 0.0f, merged[kColumns] = {};
  for (int part = 0; part < parts; ++part) {
    const float part_lse = lse[i64(part) * rows + row];
    if (is_minus_infinity(part_lse)) continue;
    const float weight = expf(part_lse - largest);
    const typename C::Part* source = o + (i64(part) * rows + row) * C::partial_dim;
    sum += weight;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int column = lane + n * kWarp;
      if (column < C::partial_dim) merged[n] += weight * to_float(source[column]);
    }
  }

  const bool empty = is_minus_infinity(largest) && sum == 0.0f;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const int column = lane + n * kWarp;
    if (column < C::partial_dim)
      o_out[row * C::partial_dim + column] = from_float<typename C::Element>(empty ? 0.0f : merged[n] / sum);
  }
  if (lane == 0) lse_out[row] = empty ? minus_infinity() : largest + logf(sum);
}

}  // namespace helix
