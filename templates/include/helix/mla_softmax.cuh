// The MLA partial's warpgroup of scores and softmax (see mla_partial.cuh).
#pragma once
#include "helix/mla_layout.cuh"
#include "helix/wgmma.cuh"

namespace helix {

// A warp's 16 queries, [64 columns][16 columns], as far as registers hold them.
using MlaQueries = FragmentA[kHeldChunks][4];

// Takes the queries, and passes their slots on.
template <class C> HELIX_DEVICE void mla_load_queries(MlaQueries& q, u32 base, const Stage& stage) {
  const u32 lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
  for (int region = 0; region <= kRotary; ++region) {
    barrier_wait(base + M::full(stage, region), stage.parity);
#pragma unroll
    for (int step = 0; region < kRotary && step < 4 * chunks_in(region); ++step) {
      const u32 from = base + M::region(stage, region) + step / 4 * M::kChunk;
      q[first_chunk(region) + step / 4][step % 4] = load_matrices(from + swizzled(row, step % 4 * 32 + lane / 16 * 16));
    }
  }
  for (int region = 0; region <= kRotary; ++region) mla_release<C>(base + M::empty(stage, region));
  mla_release<C>(base + M::empty(stage, kRotary));  // which waits for two warpgroups
  barrier_arrive(base + M::p_full(stage));  // their slots take part in everything
  if (lane == 0) barrier_arrive(base + M::turn(stage));
}

// Lets the products with the weights of the tile before begin, if they are held back.
HELIX_DEVICE void mla_pass_turn(u32& held) {
  if (held != 0 && threadIdx.x % 32 == 0) barrier_arrive(held);
  held = 0;
}

// S[64][64] = Q K' of a tile, region by region as they arrive; column 8 j + 2 (lane % 4) + e of row lane / 4 + 8 r is
// in s[4 j + 2 r + e]. The tensor cores are passed on a little early: it takes a while until they are used.
HELIX_DEVICE void mla_scores(float (&s)[32], const MlaQueries& q, u32 shared, const Stage& stage, u32& held) {
  const u32 base = opaque(shared);
  const MatrixOperand shared_q(base + M::q, 16, 1024);
  if (!__any_sync(0xffffffffu, barrier_passed(base + M::full(stage, 0), stage.parity))) mla_pass_turn(held);
#pragma unroll
  for (int region = 0; region < kRegions; ++region) {
    const MatrixOperand k(base + M::region(stage, region), 16, 1024 * chunks_in(region));
    barrier_wait(base + M::full(stage, region), stage.parity_of(region));
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 4 * chunks_in(region); ++step) {
      const u32 within = step / 4 * 1024 + step % 4 * 32;
      if (region < kRotary) {
        wgmma_m64n64k16(s, q[first_chunk(region) + step / 4][step % 4], k.at(within), region + step > 0);
      } else {
        const int chunk = first_chunk(region) + step / 4 - kHeldChunks;
        wgmma_m64n64k16(s, shared_q.at(chunk * M::kChunk + step % 4 * 32), k.at(within), 1);
      }
      if (step % 4 == 3) wgmma_commit();
    }
  }
  wgmma_wait<3>();
  mla_pass_turn(held);
  wgmma_wait<0>();
}

// Running softmax of two rows of S, which four lanes share.
template <class C> struct MlaSoftmax {
  static constexpr float kScale = C::scale * 1.4426950408889634f;  // weights are powers of 2
  static constexpr float kSlack = 8.0f;  // the reference follows the maximum when 2^8 behind: O is seldom rescaled
  float reference[2] = {minus_infinity(), minus_infinity()}, sum[2] = {0.0f, 0.0f};

  // Takes new scores into account; `factor` is what earlier weights are to be multiplied by. Seldom more than a vote.
  HELIX_DEVICE void refer(const float (&s)[32], float (&factor)[2]) {
    float largest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[r] = 1.0f, largest[r] = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
      for (int j = 1; j < 8; ++j) largest[r] = fmaxf(largest[r], fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
      largest[r] *= kScale;
    }
    const bool outgrown = largest[0] > reference[0] + kSlack || largest[1] > reference[1] + kSlack;
    if (!__any_sync(0xffffffffu, outgrown)) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(0xffffffffu, largest[r], 1));
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(0xffffffffu, largest[r], 2));
      if (largest[r] > reference[r] + kSlack) {
        factor[r] = exp2_approximate(reference[r] - largest[r]);
        reference[r] = largest[r];
        sum[r] *= factor[r];
      }
    }
  }

  // Turns scores into weights of 2^8 at most.
  HELIX_DEVICE void weigh(float (&s)[32]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * r + e];
          x = exp2_approximate(fmaf(x, kScale, -finite(reference[r])));
          sum[r] += x;
        }
      }
    }
  }

  // Queries with no token up to here have no finite reference, and -inf - -inf would be NaN.
  HELIX_DEVICE static float finite(float x) { return C::row_tokens > 1 && is_minus_infinity(x) ? 0.0f : x; }
  HELIX_DEVICE float inverse(int r) const { return C::row_tokens > 1 && sum[r] == 0.0f ? 0.0f : 1.0f / sum[r]; }

  HELIX_DEVICE void add_lanes() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    }
  }
};

// Tokens from `valid` on count nothing.
HELIX_DEVICE void mla_mask(float (&s)[32], int valid) {
  if (valid >= kTileTokens) return;
  const int mine = valid - int(opaque(threadIdx.x)) % 4 * 2;  // in this thread's first columns
#pragma unroll
  for (int i = 0; i < 32; ++i)
    if (i / 4 * 8 + i % 2 >= mine) s[i] = minus_infinity();
}

// Weights as P, the factors, and with the last tile 1 / sum, to shared memory. P takes the place of the tile's rotary
// columns, so all warps must have their scores.
template <class C>
HELIX_DEVICE void mla_publish(const float (&s)[32], const float (&factor)[2], MlaSoftmax<C>& softmax, u32 base,
                              const Stage& stage, bool last) {
  const u32 thread = opaque(threadIdx.x) % 128, lane = thread % 32, first_row = thread / 32 * 16;
  if (last) softmax.add_lanes();
  named_barrier(3, 128);
#pragma unroll
  for (u32 step = 0; step < kTileTokens / 16; ++step) {
    FragmentA p;
#pragma unroll
    for (int i = 0; i < 4; ++i) p.x[i] = pack_bfloat16(s[step * 8 + 2 * i], s[step * 8 + 2 * i + 1]);
    store_matrices(base + M::p(stage) + swizzled(first_row + lane % 16, step * 32 + lane / 16 * 16), p);
  }
  if (lane % 4 == 0) {
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      const u32 row = first_row + lane / 4 + 8 * r;
      store_shared(base + M::row_rescale(stage, row), factor[r]);
      if (last) store_shared(base + M::row_inverse(stage, row), softmax.inverse(r));
    }
  }
  fence_async_proxy();
  barrier_arrive(base + M::p_full(stage));
}

// One warpgroup: scores, running softmax, and the LSE. Most of P V is held back until the scores of the next tile are
// almost there: it has the tensor cores for itself during their softmax, and they have them before.
template <class C> HELIX_DEVICE void mla_softmax(const MlaArguments& a, u32 base) {
  const int thread = int(threadIdx.x) % 128, lane = thread % 32, row0 = thread / 32 * 16 + lane / 4;
  Stage stage;
  Segments<C> segments(a.segments);
  wait_for_previous_kernels();
  if (segments.left == 0) return;
  do {
    const int first_tile = segments.current().first_tile, last_tile = segments.current().last_tile;
    // A warp's 16 rows are heads of one query token.
    const int bound = mla_bound<C>(a, segments.current(), (head_half<C>() * 64 + thread / 32 * 16) / C::heads);
    MlaSoftmax<C> softmax;
    if (first_tile < last_tile) {
      MlaQueries q;
      mla_load_queries<C>(q, base, stage);
      stage.pass_queries();
      u32 held = 0;
      for (int tile = first_tile; tile < last_tile; ++tile) {
        const bool last = tile + 1 == last_tile;
        float s[32], factor[2];
        mla_scores(s, q, base, stage, held);
        if (last && lane == 0) barrier_arrive(base + M::q_empty);
        mla_mask(s, bound - tile * kTileTokens);
        softmax.refer(s, factor);
        softmax.weigh(s);
        mla_publish(s, factor, softmax, base, stage, last);
        held = base + M::turn(stage);
        stage.pass_tile();
      }
      mla_pass_turn(held);
    }
    if (lane % 4 == 0) {
      const Segment& segment = segments.current();
      const i64 place = mla_place<C>(segment.whole ? segment.row : segment.partial);
      float* lse = (segment.whole ? a.lse : a.part_lse) + place * C::queries;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = head_half<C>() * 64 + row0 + 8 * r;
        if (query < C::queries) lse[query] = softmax.reference[r] * 0.6931471805599453f + logf(softmax.sum[r]);
      }
    }
  } while (segments.next());
}

}  // namespace helix
