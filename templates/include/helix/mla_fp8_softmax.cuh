// The FP8 MLA partial's warpgroup of scores and softmax (see mla_fp8_partial.cuh).
#pragma once
#include "helix/mla_fp8_layout.cuh"
#include "helix/wgmma.cuh"

namespace helix {

// Of a thread: sums 4 n + 2 r + e of S' are of token 16 warp + lane / 4 + 8 r and query 8 n + 2 (lane % 4) + e.
// Arrays over queries are indexed 2 n + e.
HELIX_DEVICE u32 mla_fp8_token() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }
HELIX_DEVICE u32 mla_fp8_query(int i) { return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2; }

HELIX_DEVICE float low_bfloat16(u32 pair) { return __int_as_float(int(pair << 16)); }
HELIX_DEVICE float high_bfloat16(u32 pair) { return __int_as_float(int(pair & 0xffff0000u)); }

// Q from bfloat16 to float16, in place, times a power of two that brings each query's largest element to [2^14, 2^15):
// what then falls below float16's normal numbers is off by 2^-39 of the largest at most. To `queries` goes what makes a
// product a score, in units of log2, and the first reference, 0. Columns are put in the order in which K's come out of
// their words: of every 16, first the pairs 0, 2, 4, 6, then the pairs 1, 3, 5, 7.
template <class C> HELIX_DEVICE void mla_fp8_convert_queries(u32 q, u32 queries) {
  constexpr int kChunks = 9;
  const u32 thread = threadIdx.x % 128, unit = thread % 8;  // eight lanes have one query, 16 bytes of each chunk
  const bool odd = unit % 2;
#pragma unroll 1
  for (u32 query = thread / 8; query < C::columns; query += 16) {
    const u32 row = q + query / 8 * (kChunks * 1024) + swizzled(query % 8, unit * 16);
    Vector16 part[kChunks];
    float most = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      part[chunk] = load_shared_vector(row + chunk * 1024);
#pragma unroll
      for (u32 pair : part[chunk].words)
        most = fmaxf(most, fmaxf(fabsf(low_bfloat16(pair)), fabsf(high_bfloat16(pair))));
    }
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2)
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
    const int exponent = min(14 + 254 - (__float_as_int(most) >> 23), 253);
    const float factor = __int_as_float(exponent << 23);
    if (unit == 0) {
      const float gain = __int_as_float((254 - exponent) << 23) * (C::scale * 1.4426950408889634f);
      store_shared(queries + gain_offset(query), gain);
      store_shared(queries + reference_offset(query), 0.0f);
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      u32 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 pair = part[chunk].words[i];
        pairs[i] = pack_float16(low_bfloat16(pair) * factor, high_bfloat16(pair) * factor);
      }
      // Lanes of even units keep their pairs 0 and 2 for 1 and 3 of their neighbours.
      const u32 first = __shfl_xor_sync(0xffffffffu, odd ? pairs[0] : pairs[1], 1);
      const u32 second = __shfl_xor_sync(0xffffffffu, odd ? pairs[2] : pairs[3], 1);
      store_shared(row + chunk * 1024, odd ? Vector16{{first, second, pairs[1], pairs[3]}}
                                           : Vector16{{pairs[0], pairs[2], first, second}});
    }
  }
  fence_async_proxy();
  named_barrier(1, 128);
}

// Scales of a thread's two tokens, for their products and for their weights. Tokens from `valid` on, whose bytes may be
// anything, have finite ones.
struct TokenScales {
  float product[2], weight[2];

  HELIX_DEVICE TokenScales(u32 from, int valid) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const u32 token = mla_fp8_token() + 8 * r, byte = int(token) < valid ? load_shared_byte(from + token) : 0;
      product[r] = scale_to_float(u8(byte)), weight[r] = scale_to_float(u8(byte + kLift));
    }
  }
  // In units of log2.
  HELIX_DEVICE float exponent(int r) const { return float(int(bits_of(weight[r]) >> 23) - (127 + kLift)); }
};

// With 64 queries P waits for most of the next tile's scores before it is passed on: O' would take turns with them on
// the tensor cores, and leave these to nobody while the softmax is computed. Scores and softmax are the longest chain.
template <class C> constexpr bool kHold = C::columns == 64;
constexpr int kPassBatch = 10;  // measured: 10 to 14 are alike

// Passes P on to the warpgroups of O', if this lane has not done so yet.
HELIX_DEVICE void mla_fp8_pass_weights(u32 p_full, bool& pending) {
  if (!pending) return;
  fence_async_proxy();
  barrier_arrive(p_full);
  pending = false;
}

// S'[64][N] = K Q' of a tile. Passes on weights that are `pending` after kPassBatch batches.
template <class C, int kSums>
HELIX_DEVICE void mla_fp8_scores(float (&s)[kSums], u32 base, u32 tile, bool& pending) {
  using M8 = MlaFp8Shared<C>;
  constexpr int kBatches = 18, kBuffers = C::columns == 64 ? 4 : 5, kAhead = 2;  // batches of 32 columns
  const u32 lane = threadIdx.x % 32, token = threadIdx.x % 128 / 32 * 16 + lane % 16, column = lane / 16 * 16;
  const u32 latent = tile + latent_offset(token, 0, column), rotary = tile + rotary_offset(token, column);
  const MatrixOperand q(base + M8::q, 16, M8::kQGroup);
  const auto load = [&](int batch) {
    return load_matrices(batch < 16 ? (latent ^ (batch % 4 * 32)) + batch / 4 * 1024 : rotary ^ (batch % 2 * 32));
  };
  FragmentA k[kBuffers][2], words[kAhead];
#pragma unroll
  for (int batch = 0; batch < kAhead; ++batch) words[batch] = load(batch);
#pragma unroll
  for (int batch = 0; batch < kBatches; ++batch) {
    FragmentA(&mine)[2] = k[batch % kBuffers];
    FragmentA& raw = words[batch % kAhead];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mine[i / 2].x[i % 2] = e4m3_low_to_float16(raw.x[i]);
      mine[i / 2].x[i % 2 + 2] = e4m3_high_to_float16(raw.x[i]);
    }
    if (batch + kAhead < kBatches) raw = load(batch + kAhead);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 2; ++step)
      wgmma_m64k16_float16(s, mine[step], q.at(batch / 2 * 1024 + batch % 2 * 64 + step * 32), batch + step > 0);
    wgmma_commit();
    if (kHold<C> && batch == kPassBatch) mla_fp8_pass_weights(base + M8::p_full, pending);
    if (batch + 1 >= kBuffers) {  // the registers of the next batch may be written again
      wgmma_wait<kBuffers - 1>();
#pragma unroll
      for (const FragmentA& free : k[(batch + 1) % kBuffers]) wgmma_keep(free);
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 2 * kBuffers; ++i) wgmma_keep(k[i / 2][i % 2]);
}

// Running softmax of the queries, each spread over the lanes with the same lane % 4 of all four warps. A weight is
// 2^(score - reference). What multiplies V is the weight times the token's scale, and the reference, in units of log2,
// a recent maximum of score + log2(scale): float16 has full precision from 2^8 to 2^-21 times what V is multiplied by
// there, whatever the tokens' scales are. The weight itself, which the sum takes, is a float32: for scales up to 2^90
// it reaches down to 2^-35 of the largest, and under the least scale, 2^-100, it is finite.
template <class C> struct MlaFp8Softmax {
  static constexpr int kQueries = C::columns / 4, kSums = C::columns / 2;  // of a thread
  static constexpr float kSlack = 8.0f;      // the reference follows when 2^8 behind: O is seldom rescaled
  static constexpr float kLowest = -1e30f;   // reference of a query without tokens: finite, so that -inf - it is no NaN
  float sum[kQueries] = {};

  // Products to scores minus references.
  HELIX_DEVICE static void relate(float (&s)[kSums], const TokenScales& scales, u32 queries) {
#pragma unroll
    for (int n = 0; n < C::columns / 8; ++n) {
      const Vector16 two = load_shared_vector(queries + gain_offset(mla_fp8_query(2 * n)));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float gain = __int_as_float(int(two.words[i % 2])), reference = __int_as_float(int(two.words[2 + i % 2]));
        s[4 * n + i] = fmaf(s[4 * n + i] * scales.product[i / 2], gain, -reference);
      }
    }
  }

  // Does anything in this thread lie above what its reference allows?
  HELIX_DEVICE static bool outgrown(const float (&s)[kSums], const TokenScales& scales) {
    float most[4] = {s[0], s[1], s[2], s[3]};  // four chains
#pragma unroll
    for (int i = 4; i < kSums; ++i) most[i % 4] = fmaxf(most[i % 4], s[i]);  // NaN is dropped
    return fmaxf(fmaxf(most[0], most[1]) + scales.exponent(0), fmaxf(most[2], most[3]) + scales.exponent(1)) > kSlack;
  }

  // Moves the references to the largest sums of score and log2(scale), and leaves what earlier weights are to be
  // multiplied by in `rescale`. The first tile has no reference before.
  HELIX_DEVICE void refer(float (&s)[kSums], const TokenScales& scales, bool first, u32 scratch, u32 queries,
                          u32 rescale) {
    const u32 warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const float* mine = s + i / 2 * 4 + i % 2;
      float largest = fmaxf(mine[0] + scales.exponent(0), mine[2] + scales.exponent(1));
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
      if (lane < 4) store_shared(scratch + 4 * (warp * C::columns + mla_fp8_query(i)), largest);
    }
    named_barrier(1, 128);
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      float largest = kLowest;
#pragma unroll
      for (u32 w = 0; w < 4; ++w)
        largest = fmaxf(largest, load_shared(scratch + 4 * (w * C::columns + mla_fp8_query(i))));
      const float by = first || largest > kSlack ? largest : 0.0f;
      s[i / 2 * 4 + i % 2] -= by;
      s[i / 2 * 4 + i % 2 + 2] -= by;
      const float factor = first ? 0.0f : exp2_approximate(-by);
      sum[i] *= factor;
      if (warp == 0 && lane < 4) {
        const u32 reference = queries + reference_offset(mla_fp8_query(i));
        store_shared(reference, load_shared(reference) + by);
        store_shared(rescale + 4 * mla_fp8_query(i), factor);
      }
    }
    named_barrier(1, 128);  // scratch is free
  }

  // Turns scores minus references into weights times scales.
  HELIX_DEVICE void weigh(float (&s)[kSums], const TokenScales& scales) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float weight = exp2_approximate(s[i]);
      sum[i / 4 * 2 + i % 2] += weight;
      s[i] = weight * scales.weight[i / 2 % 2];
    }
  }

  // Sums over all tokens: what O' is to be multiplied by to `inverse`, and the LSE to memory.
  HELIX_DEVICE void finish(u32 scratch, u32 queries, u32 inverse, float* lse) {
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
        const float one = 1.0f / (1 << kLift);
        store_shared(inverse + 4 * query, C::row_tokens > 1 && total == 0.0f ? 0.0f : one / total);
        const float reference = load_shared(queries + reference_offset(query));
        if (int(query) < queries_here<C>()) lse[query] = reference * 0.6931471805599453f + logf(total);
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
    for (int i = 0; i < 4; ++i) weights.x[i] = pack_float16(s[n * 8 + i * 2], s[n * 8 + i * 2 + 1]);
    store_matrices_transposed(at + n * 2048, weights);
  }
}

template <class C> HELIX_DEVICE float* mla_fp8_lse(const MlaArguments& a, const Segment& segment) {
  const i64 place = mla_place<C>(segment.whole ? segment.row : segment.partial);
  return (segment.whole ? a.lse : a.part_lse) + place * C::queries + head_half<C>() * 64;
}

// One warpgroup: scores, running softmax, and the LSE. The scores of a tile overlap with P V of the one before.
template <class C> HELIX_DEVICE void mla_fp8_softmax(const MlaArguments& a, u32 base) {
  using M8 = MlaFp8Shared<C>;
  constexpr int kTokens = C::row_tokens == 1 ? 1 : C::heads < C::columns ? C::columns / C::heads : 1;
  const u32 thread = threadIdx.x % 128, lane = thread % 32;
  RingStage<C> stage;
  u32 q_parity = 0, p_parity = 1;
  Segments<C> segments(a.segments);
  wait_for_previous_kernels();
  if (segments.left == 0) return;
  do {
    const int start = segments.current().first_tile * kTileTokens;
    int tiles = segments.current().last_tile - segments.current().first_tile;
    if (tiles == 0) {
      if (int(thread) < queries_here<C>()) mla_fp8_lse<C>(a, segments.current())[thread] = minus_infinity();
      continue;
    }
    int bounds[kTokens], valid = segments.current().length - start;
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      bounds[t] = mla_bound<C>(a, segments.current(), head_half<C>() * 64 / C::heads + t) - start;
    MlaFp8Softmax<C> softmax;
    barrier_wait(base + M8::q_full, q_parity);
    q_parity ^= 1;
    mla_fp8_convert_queries<C>(base + M8::q, base + M8::queries);
    bool pending = false;
    for (bool first = true; tiles > 0; --tiles, first = false) {
      const bool last = tiles == 1;
      float s[MlaFp8Softmax<C>::kSums];
      // While the tile is not there yet, there is nothing to compete with.
      if (kHold<C> && !__any_sync(0xffffffffu, barrier_passed(base + M8::full(stage.index), stage.parity)))
        mla_fp8_pass_weights(base + M8::p_full, pending);
      barrier_wait(base + M8::full(stage.index), stage.parity);
      const TokenScales scales(opaque(base) + M8::scale_bytes(stage.index), valid);
      mla_fp8_scores<C>(s, base, opaque(base) + M8::tile(stage.index), pending);
      mla_release<C>(base + M8::empty(stage.index));
      stage.advance();
      if (last && lane == 0) barrier_arrive(base + M8::q_empty);
      softmax.relate(s, scales, base + M8::queries);
      if (bounds[0] < kTileTokens) mla_fp8_mask<C>(s, bounds);  // the least bound of all
      const bool moved = named_barrier_any(1, 128, first || softmax.outgrown(s, scales));
      if (moved) {
        barrier_wait(base + M8::p_empty, p_parity);  // P is the scratch
        softmax.refer(s, scales, first, base + M8::p, base + M8::queries, base + M8::rescale);
      }
      softmax.weigh(s, scales);
      barrier_wait(base + M8::p_empty, p_parity);
      p_parity ^= 1;
      if (last)
        softmax.finish(base + M8::p, base + M8::queries, base + M8::inverse, mla_fp8_lse<C>(a, segments.current()));
      mla_fp8_publish_weights<C>(s, base + M8::p);
      if (thread == 0) store_shared(base + M8::moved, u32(moved));
      pending = true;
      if (last || !kHold<C>) mla_fp8_pass_weights(base + M8::p_full, pending);
      valid -= kTileTokens;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) bounds[t] -= kTileTokens;
    }
  } while (segments.next());
}

}  // namespace helix
