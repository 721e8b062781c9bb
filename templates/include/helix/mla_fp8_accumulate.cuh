// The FP8 MLA partial's two warpgroups of O' (see mla_fp8_partial.cuh).
#pragma once
#include "helix/mla_fp8_layout.cuh"
#include "helix/wgmma.cuh"

namespace helix {

// 16 columns of 32 tokens of V', as operands of two products of 16 tokens. A lane's word has two columns of two tokens;
// the columns of a pair become rows r and r + 8 of the operand.
HELIX_DEVICE void mla_fp8_values(FragmentA (&v)[2], const FragmentA& words) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 columns = swap_middle_bytes(words.x[i]);
    v[i / 2].x[i % 2 * 2] = e4m3_low_to_float16(columns);
    v[i / 2].x[i % 2 * 2 + 1] = e4m3_high_to_float16(columns);
  }
}

// Zeroes this side's columns of the tile's tokens from `valid` on: what lies there may be NaN, and 0 * NaN = NaN.
template <class C> HELIX_DEVICE void mla_fp8_clear_tail(u32 tile, int side, u32 valid) {
#pragma unroll 1
  for (u32 i = valid * 16 + threadIdx.x % 128; i < kTileTokens * 16; i += 128)
    store_shared(tile + latent_offset(i / 16, 2 * side + i / 8 % 2, i % 8 * 16), Vector16{{0, 0, 0, 0}});
  fence_async_proxy();  // before the copy engine writes there again
  if constexpr (C::cluster == 2) fence_cluster();  // for the other block
  named_barrier(2 + side, 128);
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

// Where a segment's result goes, from this block's first query and this side's first column on.
template <class C> HELIX_DEVICE bfloat16* mla_fp8_output(const MlaArguments& a, const Segment& segment, int side) {
  bfloat16* to = segment.whole ? a.o : a.part_o;
  const i64 place = mla_place<C>(segment.whole ? segment.row : segment.partial);
  return to + (place * C::queries + head_half<C>() * 64) * 512 + side * 256;
}

// One warpgroup: O'[256][N] += V' P' over a segment, then O / sum to memory. `side` says which 256 columns.
template <class C> HELIX_DEVICE void mla_fp8_accumulate(const MlaArguments& a, u32 base, int side) {
  using M8 = MlaFp8Shared<C>;
  constexpr int kSums = C::columns / 2;
  const int thread = int(threadIdx.x) % 128, lane = thread % 32;
  // A lane's row of the matrices it loads: of columns 16 warp on, in the first 64 of a group. The other 64: xor 64.
  const u32 mine = latent_offset(lane, 2 * side, thread / 32 * 16);
  RingStage<C> stage;
  u32 p_parity = 0;
  Segments<C> segments(a.segments);
  wait_for_previous_kernels();
  if (segments.left == 0) return;
  do {
    const int first_tile = segments.current().first_tile, last_tile = segments.current().last_tile;
    int valid = segments.current().length - first_tile * kTileTokens;
    if (first_tile == last_tile) {
      bfloat16* to = mla_fp8_output<C>(a, segments.current(), side);
#pragma unroll 1
      for (int i = opaque(thread); i < queries_here<C>() * 32; i += 128)
        store_global(to + i / 32 * 512 + i % 32 * 8, Vector16{{0, 0, 0, 0}});
      continue;
    }
    float o[4][kSums];  // 64 columns each
    for (int tile = first_tile; tile < last_tile; ++tile) {
      barrier_wait(base + M8::p_full, p_parity);
      barrier_wait(base + M8::full(stage.index), stage.parity);
      p_parity ^= 1;
      if (tile > first_tile && bits_of(load_shared(base + M8::moved)) != 0) {
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
      if (valid < kTileTokens) mla_fp8_clear_tail<C>(base + M8::tile(stage.index), side, valid);
      valid -= kTileTokens;
      const MatrixOperand p(base + M8::p, 16, 1024);
      const u32 values = base + M8::tile(stage.index) + mine;
      const auto load = [&](int batch) {
        const u32 at = values + batch % 2 * (M8::kLatent / 2) + batch / 4 * 1024;
        return load_matrices_transposed(at ^ (batch / 2 % 2 * 64));
      };
      FragmentA v[2][2], words[2] = {load(0), load(1)};
#pragma unroll
      for (int batch = 0; batch < 8; ++batch) {  // of 64 columns and 32 tokens
        const int chunk = batch / 2, half = batch % 2;
        mla_fp8_values(v[batch % 2], words[batch % 2]);
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < 2; ++step)
          wgmma_m64k16_float16(o[chunk], v[batch % 2][step], p.at(half * 64 + step * 32),
                               half + step > 0 || tile > first_tile);
        wgmma_commit();
        if (batch < 6) words[batch % 2] = load(batch + 2);
        if (batch > 0) {  // the registers of the batch before may be written again
          wgmma_wait<1>();
          wgmma_keep(v[(batch + 1) % 2][0]);
          wgmma_keep(v[(batch + 1) % 2][1]);
        }
      }
      mla_release<C>(base + M8::empty(stage.index));
      stage.advance();
      wgmma_wait<0>();
      wgmma_keep(v[1][0]);
      wgmma_keep(v[1][1]);
      if (tile + 1 == last_tile) mla_fp8_write<C>(mla_fp8_output<C>(a, segments.current(), side), o, base + M8::inverse);
      barrier_arrive(base + M8::p_empty);
    }
  } while (segments.next());
}

}  // namespace helix
