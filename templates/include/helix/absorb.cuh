// Absorb: append (append.cuh) of a few tokens of MLA whose queries are not in the latent space yet, in one launch.
//
//   q_plain [N, H, nope], W_UK [H, latent, nope], and append's other inputs  ->  what append gives
//   q_out[n, h] = (W_UK[h] q_plain[n, h], rotated q_rotary[n, h]), and where owned[n] the new token of the cache
//
// The first `append_blocks` thread blocks rotate the queries' rotary columns and store the keys, a warp a vector; the
// others multiply with W_UK, straight into the queries (linear.cuh). Neither needs the other.
// Shared memory: the sums of the warps (skinny.cuh). Roofline: memory, H * latent * nope * 2 bytes of weights.
#pragma once
#include "helix/append.cuh"
#include "helix/linear.cuh"

namespace helix {

template <class C> HELIX_DEVICE void absorb(const LinearArguments& product, const AppendArguments<C>& rest,
                                            int append_blocks) {
  const int block = int(blockIdx.x) - append_blocks;
  if (block < 0) {
    constexpr int vectors = kWarp / C::lanes;  // of a warp
    const int lane = threadIdx.x % C::lanes, place = int(threadIdx.x) % kWarp / C::lanes;
    const int warp = int(blockIdx.x) * (C::threads / kWarp) + int(threadIdx.x) / kWarp;
    const int keys = (rest.rows * C::kv_heads + vectors - 1) / vectors;  // warps
    if (warp < keys) prefetch_norm<C>(rest, lane);
    wait_for_previous_kernels();
    let_next_kernel_start();
    if (warp < keys) append_key<C>(rest, warp * vectors + place, lane);
    else append_query<C, Layout<C>::kPlainChunks>(rest, (warp - keys) * vectors + place, lane);
  } else {
    linear<C>(product, block, int(gridDim.x) - append_blocks);
  }
}

}  // namespace helix
