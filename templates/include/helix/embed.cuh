// Embed: x[n] = table[tokens[n] - first] where that is one of this rank's rows, else zeros.
//
//   tokens [N], table [rows, D] of the vocabulary from token `first` on  ->  x [N, D], a summand over the ranks
//
// One thread block a token. Shared memory: none. Roofline: one launch.
#pragma once
#include "helix/sm90.cuh"

namespace helix {

template <class C>
HELIX_DEVICE void embed(typename C::Element* x, const i64* tokens, const typename C::Element* table, int first, int rows) {
  constexpr int vectors = C::hidden * int(sizeof(typename C::Element)) / 16;
  let_next_kernel_start();
  wait_for_previous_kernels();
  const i64 n = blockIdx.x, row = tokens[n] - first;
  const bool own = row >= 0 && row < rows;
  const auto* from = reinterpret_cast<const Vector16*>(table) + row * vectors;
  for (int i = threadIdx.x; i < vectors; i += C::threads)
    reinterpret_cast<Vector16*>(x)[n * vectors + i] = own ? from[i] : Vector16{{0, 0, 0, 0}};
}

}  // namespace helix
