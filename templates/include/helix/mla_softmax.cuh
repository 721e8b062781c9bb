// The MLA partial's warpgroup of scores and softmax (see mla_partial.cuh).
#pragma once
#include "helix/mla_layout.cuh"
#include "helix/wgmma.cuh"

namespace helix {

// Starts S[64][64] = Q K' of a tile, region by region as they arrive (or all at once, if they are `here`); column
// 8 j + 2 (lane % 4) + e of row lane / 4 + 8 r comes to s[4 j + 2 r + e], once it is waited for.
template <bool here> HELIX_DEVICE void mla_start_scores(float (&s)[32], u32 shared, Stage stage) {
  const u32 base = opaque(shared);
  const MatrixOperand q(base + M::q, 16, M::kQGroup);
  wgmma_begin();
#pragma unroll
  for (int region = 0; region < kRegions; ++region) {
    const MatrixOperand k(base + M::region(stage.index, region), 16, 1024 * chunks_in(region));
    if constexpr (!here) barrier_wait(base + M::full(stage.index, region), stage.parity);
#pragma unroll
    for (int step = 0; step < 4 * chunks_in(region); ++step) {
      const u32 within = step / 4 * 1024 + step % 4 * 32;
      wgmma_m64n64k16(s, q.at(first_chunk(region) * 1024 + within), k.at(within), region + step > 0);
    }
  }
  wgmma_commit();
}

// Whether all of a tile has arrived; the warpgroup is of one mind.
HELIX_DEVICE bool mla_arrived(u32 base, Stage stage) {
  bool all = true;
#pragma unroll
  for (int region = 0; region < kRegions; ++region)
    all &= barrier_passed(base + M::full(stage.index, region), stage.parity);
  return named_barrier_all(3, 128, all);
}

// Running softmax of two rows of S, which four lanes share.
template <class C> struct MlaSoftmax {
  static constexpr float kScale = C::scale * 1.4426950408889634f;  // weights are powers of 2
  static constexpr float kSlack = 8.0f;  // the reference follows the maximum when 2^8 behind: O is seldom rescaled
  float reference[2] = {minus_infinity(), minus_infinity()}, sum[2] = {0.0f, 0.0f};

  // Takes new scores into account; `factor` is what earlier weights are to be multiplied by.
  HELIX_DEVICE void refer(const float (&s)[32], float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
      for (int j = 1; j < 8; ++j) largest = fmaxf(largest, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2)) * kScale;
      factor[r] = 1.0f;
      if (largest > reference[r] + kSlack) {
        factor[r] = exp2_approximate(reference[r] - largest);
        reference[r] = largest;
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
  const int column = int(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int i = 0; i < 32; ++i)
    if (i / 4 * 8 + column + i % 2 >= valid) s[i] = minus_infinity();
}

// Weights as P, the factors, and with the last tile 1 / sum, to shared memory, once that is free.
template <class C>
HELIX_DEVICE void mla_publish(const float (&s)[32], const float (&factor)[2], MlaSoftmax<C>& softmax, u32 base,
                              u32& p_parity, bool last) {
  const u32 thread = opaque(threadIdx.x) % 128, lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  if (last) softmax.add_lanes();
  barrier_wait(base + M::p_empty, p_parity);
  p_parity ^= 1;
#pragma unroll
  for (u32 j = 0; j < 8; ++j) {
    const u32 at = base + M::p + swizzled(row, 16 * j + 4 * (lane % 4));
    store_shared(at, pack_bfloat16(s[4 * j], s[4 * j + 1]));
    store_shared(at + 8 * 128, pack_bfloat16(s[4 * j + 2], s[4 * j + 3]));
  }
  if (lane % 4 == 0) {
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      store_shared(base + M::rescale + 4 * (row + 8 * r), factor[r]);
      if (last) store_shared(base + M::inverse + 4 * (row + 8 * r), softmax.inverse(r));
    }
  }
  fence_async_proxy();
  barrier_arrive(base + M::p_full);
}

// What the warpgroup keeps while it goes through a segment's tiles.
template <class C> struct MlaScoring {
  u32 base, p_parity = 1;
  Stage stage;  // of the tile whose scores come next
  int bound, tile, last_tile;
  MlaSoftmax<C> softmax;

  HELIX_DEVICE explicit MlaScoring(u32 base) : base(base) {}

  // From the scores of `tile` to its weights.
  HELIX_DEVICE void weigh(float (&s)[32], bool last) {
    mla_mask(s, bound - tile * kTileTokens);
    float factor[2];
    softmax.refer(s, factor);
    softmax.weigh(s);
    mla_publish(s, factor, softmax, base, p_parity, last);
  }

  // One tile, whose scores `s` are complete; leaves those of the next tile in `next` (the same array, unless in a
  // cluster). Returns whether there is one.
  HELIX_DEVICE bool step(float (&s)[32], float (&next)[32]) {
    mla_release<C>(base + M::empty(stage.index, kRotary));
    stage.advance();
    const bool last = tile + 1 == last_tile;
    if (last && threadIdx.x % 32 == 0) barrier_arrive(base + M::q_empty);
    if constexpr (C::cluster == 2) {
      if (!last && mla_arrived(base, stage)) {
        mla_start_scores<true>(next, base, stage);
        weigh(s, false);
        wgmma_wait<0>();
        ++tile;
        return true;
      }
    }
    weigh(s, last);
    if (!last) {
      mla_start_scores<false>(next, base, stage);
      wgmma_wait<0>();
    }
    return ++tile < last_tile;
  }
};

// One warpgroup: scores, running softmax, and the LSE. The scores of a tile overlap with P V of the one before. In a
// cluster, where the tensor cores are what takes long, also with that one's softmax, if the tile has arrived by then: if
// it were waited for, P V and the memory of its tile would come later. Elsewhere memory takes long, and it never has.
template <class C> HELIX_DEVICE void mla_softmax(const MlaArguments& a, u32 base) {
  const int thread = int(threadIdx.x) % 128, lane = thread % 32, row0 = thread / 32 * 16 + lane / 4;
  u32 q_parity = 0;
  MlaScoring<C> scoring(base);
  Segments<C> segments(a.segments);
  wait_for_previous_kernels();
  if (segments.left == 0) return;
  do {
    scoring.tile = segments.current->first_tile, scoring.last_tile = segments.current->last_tile;
    // A warp's 16 rows are heads of one query token.
    scoring.bound = mla_bound<C>(a, *segments.current, (head_half<C>() * 64 + thread / 32 * 16) / C::heads);
    MlaSoftmax<C>& softmax = scoring.softmax = {};
    if (scoring.tile < scoring.last_tile) {
      float even[32];
      barrier_wait(base + M::q_full, q_parity);
      q_parity ^= 1;
      mla_start_scores<false>(even, base, scoring.stage);
      wgmma_wait<0>();
      if constexpr (C::cluster == 1) {
        while (scoring.step(even, even)) {}
      } else {
        float odd[32];
        while (scoring.step(even, odd) && scoring.step(odd, even)) {}
      }
    }
    if (lane % 4 == 0) {
      const Segment& segment = *segments.current;
      float* lse = segment.whole ? a.lse + i64(segment.row) * C::queries : a.part_lse + i64(segment.partial) * C::queries;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = head_half<C>() * 64 + row0 + 8 * r;
        if (query < C::queries) lse[query] = softmax.reference[r] * 0.6931471805599453f + logf(softmax.sum[r]);
      }
    }
  } while (segments.next());
}

}  // namespace helix
