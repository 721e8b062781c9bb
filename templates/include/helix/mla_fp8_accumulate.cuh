// The FP8 MLA partial's two warpgroups of O' (see mla_fp8_partial.cuh).
#pragma once
#include "helix/mla_fp8_layout.cuh"
#include "helix/wgmma.cuh"

namespace helix {

// 16 columns of 32 tokens of V', as operands of two products of 16 tokens. The columns of a pair come as rows r and
// r + 8 of the operand, since they are the even and the odd bytes of what a lane loads.
HELIX_DEVICE void mla_fp8_values(FragmentA (&v)[2], const FragmentA& words, const Vector16& factor) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i / 2].x[i % 2 * 2] = e4m3_even(words.x[i], factor.words[i]);
    v[i / 2].x[i % 2 * 2 + 1] = e4m3_odd(words.x[i], factor.words[i]);
  }
}

HELIX_DEVICE void mla_fp8_exceed(FragmentA (&v)[2], const Vector16& excess) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    v[i / 4].x[i % 4] = multiply_bfloat16(v[i / 4].x[i % 4], excess.words[i / 2]);
}

// O' / sum to memory: a lane holds two neighbouring columns of a query, eight lanes the 32 bytes that DRAM moves.
template <class C, int kSums>
HELIX_DEVICE void mla_fp8_write(bfloat16* to, const float (&o)[4][kSums], u32 inverse) {
  const int thread = int(opaque(threadIdx.x)) % 128, lane = thread % 32;
  to += thread / 32 * 16 + lane / 4 * 2;
#pragma unroll
  for (int i = 0; i < kSums / 2; ++i) {  // of the queries a lane has, in pairs
    const int query = i / 2 * 8 + lane % 4 * 2 + i % 2, at = i / 2 * 4 + i % 2;
    if (query >= queries_here<C>()) continue;
    const float scale = load_shared(inverse + 4 * query);
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk)
      *reinterpret_cast<u32*>(to + query * 512 + chunk * 64) =
          pack_bfloat16(o[chunk][at] * scale, o[chunk][at + 2] * scale);
  }
}

// One warpgroup: O'[256][N] += V' P' over a segment, then O / sum to memory. `side` says which 256 columns.
template <class C> HELIX_DEVICE void mla_fp8_accumulate(const MlaArguments& a, u32 base, int side) {
  using M8 = MlaFp8Shared<C>;
  constexpr int kSums = C::columns / 2;
  const int thread = int(threadIdx.x) % 128, lane = thread % 32;
  // A lane's row of the matrices it loads: of columns 16 warp on, in the first 64 of a group. The other 64: xor 64.
  const u32 mine = latent_offset(lane, 2 * side, thread / 32 * 16), factors = base + M8::factors + factor_offset(2 * side, 0, lane % 4);
  RingStage<C> stage;
  u32 p_parity = 0;
  Segments<C> segments(a.segments);
  wait_for_previous_kernels();
  if (segments.left == 0) return;
  do {
    const int first_tile = segments.current->first_tile, last_tile = segments.current->last_tile;
    bfloat16* to = (segments.current->whole ? a.o : a.part_o) + side * 256;
    to += (i64(segments.current->whole ? segments.current->row : segments.current->partial) * C::queries +
           head_half<C>() * 64) * 512;
    if (first_tile == last_tile) {
      for (int i = thread; i < queries_here<C>() * 32; i += 128)
        store_global(to + i / 32 * 512 + i % 32 * 8, Vector16{{0, 0, 0, 0}});
      continue;
    }
    float o[4][kSums];  // 64 columns each
    for (int tile = first_tile; tile < last_tile; ++tile) {
      barrier_wait(base + M8::p_full, p_parity);
      barrier_wait(base + M8::full(stage.index), stage.parity);
      const Vector16 found = load_shared_vector(base + M8::flags + p_parity * 16);
      p_parity ^= 1;
      const u32 flags = found.words[0] | found.words[1] | found.words[2] | found.words[3];
      if (tile > first_tile && (flags & kRescale)) {
#pragma unroll
        for (int i = 0; i < kSums / 2; ++i) {
          const float scale = load_shared(base + M8::rescale + 4 * (i / 2 * 8 + lane % 4 * 2 + i % 2));
#pragma unroll
          for (int chunk = 0; chunk < 4; ++chunk) {
            o[chunk][i / 2 * 4 + i % 2] *= scale;
            o[chunk][i / 2 * 4 + i % 2 + 2] *= scale;
          }
        }
      }
      const MatrixOperand p(base + M8::p, 16, 1024);
      const u32 values = base + M8::tile(stage.index) + mine;
      FragmentA v[2][2], words = load_matrices_transposed(values);
#pragma unroll
      for (int batch = 0; batch < 8; ++batch) {
        const int chunk = batch / 2, half = batch % 2;
        const u32 factor = factors + factor_offset(chunk / 2, half, 0);
        mla_fp8_values(v[batch % 2], words, load_shared_vector(factor));
        if (flags & kExcess)
          mla_fp8_exceed(v[batch % 2], load_shared_vector(factor + M8::kFactors));
        if (batch < 7) {  // ahead of the products, which are waited for before the next conversion
          const int next = (batch + 1) / 2, next_half = (batch + 1) % 2;
          words = load_matrices_transposed((values + next_half * (M8::kLatent / 2) + next / 2 * 1024) ^ (next % 2 * 64));
        }
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < 2; ++step)
          wgmma_m64k16(o[chunk], v[batch % 2][step], p.at(half * 64 + step * 32), half + step > 0 || tile > first_tile);
        wgmma_commit();
        if (batch > 0) {  // the registers of the batch before may be written again
          wgmma_wait<1>();
          wgmma_keep(v[(batch + 1) % 2][0]);
          wgmma_keep(v[(batch + 1) % 2][1]);
        }
      }
      __syncwarp();
      mla_release<C>(base + M8::empty(stage.index));
      stage.advance();
      wgmma_wait<0>();
      wgmma_keep(v[1][0]);
      wgmma_keep(v[1][1]);
      if (tile + 1 == last_tile) mla_fp8_write<C>(to, o, base + M8::inverse);
      __syncwarp();
      if (lane == 0) barrier_arrive(base + M8::p_empty);
    }
  } while (segments.next());
}

}  // namespace helix
