// Combine: the exact merge of partials over disjoint parts of the KV, weighted by exp(lse - max lse).
//
//   o [N, rows, P] of type Part, lse [N, rows] float32 natural log  ->  o [rows, P] of type Element, lse [rows]
//   (rows = B * H). Used for the splits of one rank (Part = float32) and for the cp ranks after the exchange.
//
// One thread C::columns columns of a row, 16 bytes of each part where the dims allow, and no word between threads: each
// reads all LSEs of its row. The loads of C::batch parts, LSEs and columns, are on their way before the first is used;
// more parts come in turn. Parts with lse = -inf count as zeros whatever their memory holds, which may be NaN. All parts
// empty: o = 0, lse = -inf. Shared memory: none.
// Roofline: memory, N * rows * (P elements + 4 bytes) read and one such part written; for few rows latency, which is one
// load's where C::batch >= N.
#pragma once
#include "helix/chunk.cuh"
#include "helix/sm90.cuh"

namespace helix {

// What `parts` parts merge to, in float32: o = sum of exp(lse - largest) * part, sum = the same without the part.
template <int columns> struct Combined {
  float o[columns] = {};
  float largest = minus_infinity(), sum = 0.0f;

  template <class Part, int batch>
  HELIX_DEVICE void add(const Chunk<Part, columns> (&chunks)[batch], const float (&lses)[batch]) {
    float most = largest;
#pragma unroll
    for (int i = 0; i < batch; ++i) most = fmaxf(most, lses[i]);
    const float base = is_minus_infinity(most) ? 0.0f : most;  // -inf - -inf is NaN
    const float rescale = expf(largest - base);
    largest = most, sum *= rescale;
#pragma unroll
    for (int j = 0; j < columns; ++j) o[j] *= rescale;
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const float weight = expf(lses[i] - base);
      const bool empty = is_minus_infinity(lses[i]);
      sum += weight;
#pragma unroll
      for (int j = 0; j < columns; ++j) o[j] += weight * (empty ? 0.0f : to_float(chunks[i].items[j]));
    }
  }

  HELIX_DEVICE bool empty() const { return is_minus_infinity(largest) && sum == 0.0f; }
  HELIX_DEVICE float lse() const { return empty() ? minus_infinity() : largest + logf(sum); }
};

template <class C>
HELIX_DEVICE void combine(typename C::Element* o_out, float* lse_out, const typename C::Part* o, const float* lse,
                          int parts, int rows) {
  constexpr int vectors = C::partial_dim / C::columns;  // of a row
  static_assert(C::partial_dim % C::columns == 0, "columns divide a row");
  let_next_kernel_start();
  wait_for_previous_kernels();
  const i64 at = i64(blockIdx.x) * C::threads + threadIdx.x, row = at / vectors;
  if (row >= rows) return;
  const i64 size = i64(rows) * C::partial_dim;  // of a part
  o += at * C::columns, lse += row;

  Combined<C::columns> merged;
  for (int first = 0; first < parts; first += C::batch) {
    Chunk<typename C::Part, C::columns> chunks[C::batch];
    float lses[C::batch];
#pragma unroll
    for (int i = 0; i < C::batch; ++i) {
      chunks[i] = {};
      if (first + i < parts) chunks[i].load_early(o + (first + i) * size);
    }
#pragma unroll
    for (int i = 0; i < C::batch; ++i) {
      u32 word = bits_of(minus_infinity());
      if (first + i < parts) load_words<1>(&word, reinterpret_cast<const u32*>(lse + i64(first + i) * rows));
      lses[i] = __int_as_float(int(word));
    }
    merged.add(chunks, lses);
  }

  const float inverse = merged.empty() ? 0.0f : 1.0f / merged.sum;
  Chunk<typename C::Element, C::columns> out;
#pragma unroll
  for (int j = 0; j < C::columns; ++j) out.items[j] = from_float<typename C::Element>(merged.o[j] * inverse);
  out.store(o_out + at * C::columns);
  if (at % vectors == 0) lse_out[row] = merged.lse();
}

}  // namespace helix
