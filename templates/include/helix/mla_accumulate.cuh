// The MLA partial's two warpgroups of O (see mla_partial.cuh).
#pragma once
#include "helix/mla_layout.cuh"
#include "helix/wgmma.cuh"

namespace helix {

// Zeroes this side's columns of the tile's tokens from `valid` on: what lies there may be NaN, and 0 * NaN = NaN.
template <class C> HELIX_DEVICE void mla_clear_tail(const u32 (&values)[2], int side, u32 valid) {
  const u32 thread = threadIdx.x % 128;
#pragma unroll 1
  for (u32 i = valid * 32 + thread; i < kTileTokens * 32; i += 128) {
    const u32 token = i / 32, chunk = i / 8 % 4, unit = i % 8;
    const u32 at = token / 8 * 2048 + chunk % 2 * 1024 + token % 8 * 128 + unit * 16;
    store_shared((chunk < 2 ? values[0] : values[1]) + at, Vector16{{0, 0, 0, 0}});
  }
  fence_async_proxy();
  if constexpr (C::cluster == 2) fence_cluster();  // the other block copies there, too
  named_barrier(1 + side, 128);
}

// O / sum in bf16 through the tile's own shared memory, so that a warp writes 512 contiguous bytes; each its 16 rows.
template <class C>
HELIX_DEVICE void mla_write(bfloat16* to, const float (&o)[2][64], u32 inverses, const u32 (&values)[2],
                            int queries) {
  const u32 thread = opaque(threadIdx.x) % 128, warp = thread / 32, lane = thread % 32;
  const bool needed = int(warp * 16) < queries;  // a jump here would cost registers
  const u32 mine = warp * (2 * 2048);
  const float inverse[2] = {load_shared(inverses), load_shared(inverses + 32)};
  const u32 at = mine + lane % 16 / 8 * 2048 + swizzled(lane % 8, lane / 16 * 16);
#pragma unroll
  for (int step = 0; step < 16; ++step) {  // 16 columns
    const float* eight = o[step / 8] + step % 8 * 8;
    FragmentA rows;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rows.x[i] = pack_bfloat16(eight[2 * i] * inverse[i % 2], eight[2 * i + 1] * inverse[i % 2]);
    if (needed) store_matrices(values[step / 8] + (at ^ (step % 4 * 32)) + step / 4 % 2 * 1024, rows);
  }
  if constexpr (C::cluster == 2) fence_cluster();  // as above, and before there are stores that it would wait for
  __syncwarp();
  const u32 from = (lane < 16 ? values[0] : values[1]) + mine + lane / 8 % 2 * 1024;
  to += (warp * 16) * 512 + lane * 8;
#pragma unroll
  for (u32 eight = 0; eight < 2; ++eight) {  // all loads of eight rows are under way at once
    if (int(warp * 16 + eight * 8) >= queries) return;
    Vector16 rows[8];
#pragma unroll
    for (u32 row = 0; row < 8; ++row)
      rows[row] = load_shared_vector(from + eight * 2048 + swizzled(row, lane % 8 * 16));
#pragma unroll
    for (u32 row = 0; row < 8; ++row) store_global(to + (eight * 8 + row) * 512, rows[row]);
  }
}

// The first of the two rows of O, 8 apart, that this thread's registers are of.
HELIX_DEVICE u32 mla_row() {
  const u32 thread = opaque(threadIdx.x) % 128;
  return thread / 32 * 16 + thread % 32 / 4;
}

// O times the factors of its rows, which are nearly always 1.
HELIX_DEVICE void mla_rescale(float (&o)[2][64], u32 factors) {
  const float scale0 = load_shared(factors), scale1 = load_shared(factors + 32);
  if (!__any_sync(0xffffffffu, scale0 != 1.0f || scale1 != 1.0f)) return;
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i / 64][i % 64] *= i % 4 < 2 ? scale0 : scale1;
}

// 128 columns of O += P V, or = P V. Not waited for.
HELIX_DEVICE void mla_multiply(float (&o)[64], u32 weights, u32 values, bool first) {
  const MatrixOperand p(weights, 16, 1024), v(values, 1024, 2048);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < 4; ++step)
    wgmma_m64n128k16(o, p.at(step * 32), v.at(step * 2 * 2048), step > 0 || !first);
  wgmma_commit();
}

// Where a segment's result goes, from this block's first query and this side's first column on.
template <class C> HELIX_DEVICE bfloat16* mla_output(const MlaArguments& a, const Segment& segment, int side) {
  bfloat16* to = segment.whole ? a.o : a.part_o;
  const i64 place = mla_place<C>(segment.whole ? segment.row : segment.partial);
  return to + (place * C::queries + head_half<C>() * 64) * 512 + side * 256;
}

template <class C> HELIX_DEVICE void mla_write_zeros(bfloat16* to) {
#pragma unroll 1
  for (int i = int(threadIdx.x) % 128; i < queries_here<C>() * 32; i += 128)
    store_global(to + i / 32 * 512 + i % 32 * 8, Vector16{{0, 0, 0, 0}});
}

// One warpgroup: O[64][256] += P V over a segment, then O / sum to memory. `side` says which 256 columns. All are
// multiplied when it is their turn, but what lies in the last region as soon as there are weights, for its two slots
// are soon needed; not so where other clusters read the same tokens: they come from L2 soon enough.
template <class C, int side> HELIX_DEVICE void mla_accumulate(const MlaArguments& a, u32 base) {
  constexpr int kFirst = side == 0 ? 0 : 1;  // half of the columns, in the order in which the regions are fetched again
  constexpr bool kAtOnce = region_of(side, kFirst) == kLast && C::team * C::shares == 1;
  Stage stage;
  Segments<C> segments(a.segments);
  wait_for_previous_kernels();
  if (segments.left == 0) return;
  do {
    int tiles = segments.current().last_tile - segments.current().first_tile;
    if (tiles == 0) {
      mla_write_zeros<C>(mla_output<C>(a, segments.current(), side));
      continue;
    }
    stage.pass_queries();
    int valid = segments.current().length - segments.current().first_tile * kTileTokens;
    float o[2][64];  // two instructions of 128 columns: one of 256 needs more registers than 512 threads start with
    for (bool first = true; tiles > 0; --tiles, first = false) {
      const bool last = tiles == 1;
      const u32 values[2] = {base + M::region(stage, region_of(side, 0)), base + M::region(stage, region_of(side, 1))};
      barrier_wait(base + M::p_full(stage), stage.parity);
      if (!first) mla_rescale(o, base + M::row_rescale(stage, mla_row()));
      if (valid < kTileTokens) mla_clear_tail<C>(values, side, valid);
      valid -= kTileTokens;
      const u32 p = base + M::p(stage);
      if (kAtOnce) {
        mla_multiply(o[kFirst], p, values[kFirst], first);
        wgmma_wait<0>();
        if (!last) mla_release<C>(base + M::empty(stage, kLast));
      }
      barrier_wait(base + M::turn(stage), stage.parity);
      if (!kAtOnce) mla_multiply(o[kFirst], p, values[kFirst], first);
      mla_multiply(o[1 - kFirst], p, values[1 - kFirst], first);
      if (!kAtOnce && !last) {
        wgmma_wait<1>();
        mla_release<C>(base + M::empty(stage, region_of(side, kFirst)));
      }
      wgmma_wait<0>();
      if (last) {
        named_barrier(1 + side, 128);  // all warps have read V
        mla_write<C>(mla_output<C>(a, segments.current(), side), o, base + M::row_inverse(stage, mla_row()), values,
                  queries_here<C>());
        fence_async_proxy();
        mla_release<C>(base + M::empty(stage, region_of(side, kFirst)));
      }
      mla_release<C>(base + M::empty(stage, region_of(side, 1 - kFirst)));
      mla_release<C>(base + M::empty(stage, kRotary));
      stage.pass_tile();
    }
  } while (segments.next());
}

}  // namespace helix
