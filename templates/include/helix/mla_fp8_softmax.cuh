// The FP8 MLA partial's warpgroup of scores and softmax (see mla_fp8_partial.cuh).
#pragma once
#include "helix/mla_fp8_layout.cuh"
#include "helix/wgmma.cuh"

namespace helix {

// Of a thread: sums 4 n + 2 r + e of S' are of token 16 warp + lane / 4 + 8 r and query 8 n + 2 (lane % 4) + e.
// Arrays over queries are indexed 2 n + e.
HELIX_DEVICE u32 mla_fp8_token() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }
HELIX_DEVICE u32 mla_fp8_query(int i) { return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2; }

// Columns of Q in the order in which K's come out of their words: of every 16, first the even ones, then the odd ones.
template <class C> HELIX_DEVICE void mla_fp8_order_queries(u32 q) {
#pragma unroll 1
  for (u32 i = threadIdx.x % 128; i < C::columns * 36; i += 128) {  // 16 columns of one query
    const u32 row = i / 4, at = q + row / 8 * 1024 + swizzled(row % 8, i % 4 * 32);
    const Vector16 low = load_shared_vector(at), high = load_shared_vector(at ^ 16);
    Vector16 even, odd;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const u32 x = (w < 2 ? low : high).words[w % 2 * 2], y = (w < 2 ? low : high).words[w % 2 * 2 + 1];
      even.words[w] = (x & 0xffff) | y << 16;
      odd.words[w] = x >> 16 | (y & 0xffff0000u);
    }
    store_shared(at, even);
    store_shared(at ^ 16, odd);
  }
  fence_async_proxy();
  named_barrier(1, 128);
}

// Scale bytes of a thread's two tokens, each pair in one word; 0, the least scale, for tokens from `valid` on, whose
// bytes may be anything.
struct TokenScales {
  u32 pairs[kGroups];
  u32 own;  // that of group lane % 4, whose factors this thread publishes

  HELIX_DEVICE TokenScales(u32 from, int valid) {
    const u32 token = mla_fp8_token(), at = from + token * kGroups;
    const bool first = int(token) < valid, second = int(token) + 8 < valid;
    const auto load = [&](u32 group) {
      return (first ? load_shared_byte(at + group) : 0) | (second ? load_shared_byte(at + group + 8 * kGroups) : 0) << 8;
    };
#pragma unroll
    for (u32 group = 0; group < kGroups; ++group) pairs[group] = load(group);
    own = load(threadIdx.x % 4);
  }
  HELIX_DEVICE static u32 byte(u32 pair, int r) { return r == 0 ? pair & 0xff : pair >> 8; }
  // Of any token of the warp.
  HELIX_DEVICE bool exceeds() const {
    bool any = false;
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) any |= e4m3_exceeds(byte(pairs[i / 2], i % 2));
    return __any_sync(0xffffffffu, any);
  }
};

// S'[64][N] = K Q' of a tile.
template <class C, int kSums>
HELIX_DEVICE void mla_fp8_scores(float (&s)[kSums], u32 base, u32 tile, const TokenScales& scales, bool exceeds) {
  using M8 = MlaFp8Shared<C>;
  const u32 lane = threadIdx.x % 32, token = threadIdx.x % 128 / 32 * 16 + lane % 16, column = lane / 16 * 16;
  const u32 latent = tile + latent_offset(token, 0, column), rotary = tile + rotary_offset(token, column);
  const MatrixOperand q(base + M8::q, 16, M8::kQGroup);
  const auto address = [&](int batch) {
    return batch / 4 == kRotaryGroup ? rotary ^ (batch % 2 * 32) : (latent + batch / 4 * 1024) ^ (batch % 4 * 32);
  };
  FragmentA k[3][2], words[2] = {load_matrices(address(0))};
  u32 factor[2];
#pragma unroll
  for (int batch = 0; batch < 18; ++batch) {  // 32 columns
    const int group = batch / 4;
    if (batch % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) factor[r] = both_halves(e4m3_factor(scales.byte(scales.pairs[group], r)));
    }
    FragmentA(&mine)[2] = k[batch % 3];
    if (batch < 17) words[(batch + 1) % 2] = load_matrices(address(batch + 1));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mine[i / 2].x[i % 2] = e4m3_even(words[batch % 2].x[i], factor[i % 2]);
      mine[i / 2].x[i % 2 + 2] = e4m3_odd(words[batch % 2].x[i], factor[i % 2]);
    }
    if (exceeds) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const u32 excess = both_halves(e4m3_excess(scales.byte(scales.pairs[group], r)));
#pragma unroll
        for (int i = 0; i < 4; ++i) mine[i / 2].x[i % 2 * 2 + r] = multiply_bfloat16(mine[i / 2].x[i % 2 * 2 + r], excess);
      }
    }
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 2; ++step)
      wgmma_m64k16(s, mine[step], q.at(batch / 2 * 1024 + batch % 2 * 64 + step * 32), batch + step > 0);
    wgmma_commit();
    if (batch > 1) {  // the registers of the batch before the last may be written again
      wgmma_wait<2>();
      wgmma_keep(k[(batch + 1) % 3][0]);
      wgmma_keep(k[(batch + 1) % 3][1]);
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 6; ++i) wgmma_keep(k[i / 2][i % 2]);
}

// Factors of the latent groups for the warpgroups of O', lane % 4 = 0 to 3 each one group: lanes with an even token
// store the first token of theirs and its neighbour's, the others the second.
HELIX_DEVICE void mla_fp8_publish_factors(u32 table, u32 first, u32 second) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, odd = lane / 4 % 2;
  const u32 both = first | second << 16, other = __shfl_xor_sync(0xffffffffu, both, 4);
  const u32 pair = odd ? other >> 16 | (both & 0xffff0000u) : (both & 0xffff) | other << 16;
  store_shared(table + factor_offset(lane % 4, warp / 2, lane / 8) + 4 * (warp % 2 * 2 + odd), pair);
}

// Running softmax of the queries, each spread over the lanes with the same lane % 4 of all four warps.
template <class C> struct MlaFp8Softmax {
  static constexpr int kQueries = C::columns / 4, kSums = C::columns / 2;  // of a thread
  static constexpr float kScale = C::scale * 1.4426950408889634f;          // weights are powers of 2
  static constexpr float kSlack = 8.0f;  // the reference follows the maximum when 2^8 behind: O is seldom rescaled
  float reference[kQueries], sum[kQueries];

  HELIX_DEVICE MlaFp8Softmax() {
#pragma unroll
    for (int i = 0; i < kQueries; ++i) reference[i] = minus_infinity(), sum[i] = 0.0f;
  }

  HELIX_DEVICE static float larger(const float (&s)[kSums], int i) {
    return fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + i % 2 + 2]);
  }

  // Does a score of this warp lie above what its reference allows?
  HELIX_DEVICE bool outgrown(const float (&s)[kSums]) const {
    float most = minus_infinity();
#pragma unroll
    for (int i = 0; i < kQueries; ++i) most = fmaxf(most, fmaf(larger(s, i), kScale, -reference[i]));  // NaN is dropped
    return __any_sync(0xffffffffu, most > kSlack);
  }

  // Moves the references to the largest scores, and leaves what earlier weights are to be multiplied by in `rescale`.
  HELIX_DEVICE void refer(const float (&s)[kSums], u32 scratch, u32 rescale) {
    const u32 warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      float largest = larger(s, i);
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
      if (lane < 4) store_shared(scratch + 4 * (warp * C::columns + mla_fp8_query(i)), largest);
    }
    named_barrier(1, 128);
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      float largest = minus_infinity(), factor = 1.0f;
#pragma unroll
      for (u32 w = 0; w < 4; ++w) largest = fmaxf(largest, load_shared(scratch + 4 * (w * C::columns + mla_fp8_query(i))));
      largest *= kScale;
      if (largest > reference[i] + kSlack) {
        factor = exp2_approximate(reference[i] - largest);
        reference[i] = largest;
        sum[i] *= factor;
      }
      if (warp == 0 && lane < 4) store_shared(rescale + 4 * mla_fp8_query(i), factor);
    }
    named_barrier(1, 128);  // scratch is free
  }

  // Turns scores into weights of 2^8 at most.
  HELIX_DEVICE void weigh(float (&s)[kSums]) {
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      // A query without a token up to here has no finite reference, and -inf - -inf would be NaN.
      const float base = C::row_tokens > 1 && is_minus_infinity(reference[i]) ? 0.0f : reference[i];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& x = s[i / 2 * 4 + i % 2 + 2 * r];
        x = exp2_approximate(fmaf(x, kScale, -base));
        sum[i] += x;
      }
    }
  }

  // Sums over all tokens: 1 / sum of every query to `inverse`, and the LSE to memory.
  HELIX_DEVICE void finish(u32 scratch, u32 inverse, float* lse) {
    const u32 warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], distance);
      if (lane < 4) store_shared(scratch + 4 * (warp * C::columns + mla_fp8_query(i)), sum[i]);
    }
    named_barrier(1, 128);
    if (warp == 0 && lane < 4) {
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        const u32 query = mla_fp8_query(i);
        float total = sum[i];
#pragma unroll
        for (u32 w = 1; w < 4; ++w) total += load_shared(scratch + 4 * (w * C::columns + query));
        store_shared(inverse + 4 * query, C::row_tokens > 1 && total == 0.0f ? 0.0f : 1.0f / total);
        if (int(query) < queries_here<C>()) lse[query] = reference[i] * 0.6931471805599453f + logf(total);
      }
    }
    named_barrier(1, 128);  // scratch is free
  }
};

// Tokens from their query's bound on count nothing. `bounds`: of the query tokens in this block, from the tile's start.
template <class C, int kSums, int kTokens>
HELIX_DEVICE void mla_fp8_mask(float (&s)[kSums], const int (&bounds)[kTokens]) {
  const int token = int(mla_fp8_token());
#pragma unroll
  for (int i = 0; i < kSums; ++i)
    if (token + i / 2 % 2 * 8 >= bounds[i / 4 * 8 / C::heads]) s[i] = minus_infinity();
}

// Weights as P [N][64 tokens], tokens contiguous.
template <class C, int kSums> HELIX_DEVICE void mla_fp8_publish_weights(const float (&s)[kSums], u32 p) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const u32 at = p + lane / 16 * 1024 + swizzled(lane % 8, warp * 32 + lane / 8 % 2 * 16);
#pragma unroll
  for (int n = 0; n < C::columns / 16; ++n) {  // 16 queries
    FragmentA weights;
#pragma unroll
    for (int i = 0; i < 4; ++i) weights.x[i] = pack_bfloat16(s[n * 8 + i * 2], s[n * 8 + i * 2 + 1]);
    store_matrices_transposed(at + n * 2048, weights);
  }
}

template <class C> HELIX_DEVICE float* mla_fp8_lse(const MlaArguments& a, const Segment& segment) {
  return (segment.whole ? a.lse : a.part_lse) + i64(segment.whole ? segment.row : segment.partial) * C::queries +
         head_half<C>() * 64;
}

// One warpgroup: scores, running softmax, and the LSE. The scores of a tile overlap with P V of the one before.
template <class C> HELIX_DEVICE void mla_fp8_softmax(const MlaArguments& a, u32 base) {
  using M8 = MlaFp8Shared<C>;
  constexpr int kTokens = C::row_tokens == 1 ? 1 : C::heads < C::columns ? C::columns / C::heads : 1;
  const u32 thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  RingStage<C> stage;
  u32 q_parity = 0, p_parity = 1;
  Segments<C> segments(a.segments);
  wait_for_previous_kernels();
  if (segments.left == 0) return;
  do {
    const int start = segments.current->first_tile * kTileTokens;
    int tiles = segments.current->last_tile - segments.current->first_tile;
    if (tiles == 0) {
      if (int(thread) < queries_here<C>()) mla_fp8_lse<C>(a, *segments.current)[thread] = minus_infinity();
      continue;
    }
    int bounds[kTokens], valid = segments.current->length - start;
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      bounds[t] = mla_bound<C>(a, *segments.current, head_half<C>() * 64 / C::heads + t) - start;
    MlaFp8Softmax<C> softmax;
    barrier_wait(base + M8::q_full, q_parity);
    q_parity ^= 1;
    mla_fp8_order_queries<C>(base + M8::q);
    for (; tiles > 0; --tiles) {
      const bool last = tiles == 1;
      float s[MlaFp8Softmax<C>::kSums];
      barrier_wait(base + M8::full(stage.index), stage.parity);
      const TokenScales scales(opaque(base) + M8::scale_bytes(stage.index), valid);
      const bool exceeds = scales.exceeds();
      mla_fp8_scores<C>(s, base, opaque(base) + M8::tile(stage.index), scales, exceeds);
      __syncwarp();
      mla_release<C>(base + M8::empty(stage.index));
      stage.advance();
      if (last && lane == 0) barrier_arrive(base + M8::q_empty);
      if (kTokens > 1 || C::row_tokens > 1 || valid < kTileTokens) mla_fp8_mask<C>(s, bounds);
      const u32 mine = (softmax.outgrown(s) ? kRescale : 0) | (exceeds ? kExcess : 0);
      const u32 at = base + M8::flags + (p_parity ^ 1) * 16;
      if (lane == 0) store_shared(at + 4 * warp, mine);
      named_barrier(1, 128);
      const Vector16 found = load_shared_vector(at);
      const u32 flags = found.words[0] | found.words[1] | found.words[2] | found.words[3];
      if (flags & kRescale) {
        barrier_wait(base + M8::p_empty, p_parity);  // P is the scratch
        softmax.refer(s, base + M8::p, base + M8::rescale);
      }
      softmax.weigh(s);
      barrier_wait(base + M8::p_empty, p_parity);
      p_parity ^= 1;
      if (last) softmax.finish(base + M8::p, base + M8::inverse, mla_fp8_lse<C>(a, *segments.current));
      mla_fp8_publish_weights<C>(s, base + M8::p);
      const u32 bytes[2] = {scales.byte(scales.own, 0), scales.byte(scales.own, 1)};
      mla_fp8_publish_factors(base + M8::factors, e4m3_factor(bytes[0]), e4m3_factor(bytes[1]));
      if (flags & kExcess) mla_fp8_publish_factors(base + M8::excess, e4m3_excess(bytes[0]), e4m3_excess(bytes[1]));
      fence_async_proxy();
      barrier_arrive(base + M8::p_full);
      valid -= kTileTokens;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) bounds[t] -= kTileTokens;
    }
  } while (segments.next());
}

}  // namespace helix
