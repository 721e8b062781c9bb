// GQA partial of an FP8 cache: what one computing warp does with 32 tokens of a tile in shared memory (gqa_partial.cuh).
//
// e4m3 becomes float16, exactly and two elements an instruction, in the registers of the products' fragments:
//   K: a lane's four bytes of an ldmatrix row are four neighbouring dims of one token. The order of the dims in a sum is
//      free: they are dims 2i, 2i + 1, 2i + 8, 2i + 9 of the fragment (lane % 4 = i), and q is loaded in that order.
//   V: a lane's four bytes of a transposed ldmatrix are two dims of two tokens. With the middle bytes swapped they are
//      two pairs of tokens, of dims 2j and 2j + 1 (lane / 4 = j): rows j and j + 8 of O^T, which `store` sorts.
// Scales are powers of two and multiply in float32: K's the score of a token, V's its weight.
// q as float16: a power of two brings a head's largest element to [2^14, 2^15); what then falls below float16's normal
// numbers is off by 2^-39 of the largest at most. Weights likewise: the largest weight times V scale that the warp has
// seen stands for 2^15, so that no mixture of scales costs precision; the softmax sum has a largest score of its own, a
// lane's. Float16 weights are rounded 8 times finer than bfloat16 ones.
// Instructions a warp and tile of 128 tokens, D 128, up to 8 queries, as compiled: 560, of them 132 conversions, 32
// swaps, 32 products, 16 ldmatrix and 20 exponentials. With two cycles for what issues at half the rate and eight for
// an exponential that is less than 1,000 of a scheduler's cycles, of the 2,500 in which memory brings the tile (13
// bytes a cycle and SM). Up to 16 queries: 740 and 1,400.
#pragma once
#include "helix/gqa_tile.cuh"

namespace helix {

// As GqaState; the rows of o stand for dims 2 * (lane / 4) and that + 1 of each 16.
template <class C> struct GqaFp8State {
  using Tile = GqaTile<C>;
  static constexpr int eights = Tile::columns / 8, steps = C::head_dim / 16, halves = Tile::warp_tokens / 16;
  static constexpr int chains = 3 - eights;       // independent sums of a score: products to overlap
  static constexpr int lane_tokens = halves * 2;  // lane / 4 + 8 * (0 .. lane_tokens - 1)
  static constexpr int pieces = Tile::token_bytes / 16;
  static constexpr float weight_bits = 15.0f;  // of the largest weight times V scale
  float o[steps][eights][4];
  float largest[eights][2];                     // of a score plus its V scale's byte, in units of log2: what o is in
  float lane_largest[eights][2], sum[eights][2];  // of the scores of this lane's tokens
  float scale[eights][2];                       // of a product to a score in units of log2
  FragmentB q[steps][eights];
  GqaBounds<C> bounds;

  HELIX_DEVICE void start(const GqaArguments& args, const GqaCursor& at, int lane) {
    bounds.start(args, at.row, at.length, lane);
    const bfloat16* query = args.q + first_group<C>(at.row, at.kv_head) * C::group * C::head_dim + lane % 4 * 4;
#pragma unroll
    for (int n = 0; n < eights; ++n) {
      const int column = n * 8 + lane / 4;
      uint2 words[steps];
      float most = 0.0f;
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        const bfloat16* from = query + query_offset<C>(column) * C::head_dim + step * 16;
        words[step] = has_query<C>(column) ? *reinterpret_cast<const uint2*>(from) : uint2{0, 0};
        most = fmaxf(fmaxf(most, largest_of(words[step].x)), largest_of(words[step].y));
      }
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
      const int exponent = min(14 + 254 - (__float_as_int(most) >> 23), 253);
      const float gain = __int_as_float(exponent << 23), inverse = __int_as_float((254 - exponent) << 23);
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        q[step][n] = {{to_float16(words[step].x, gain), to_float16(words[step].y, gain)}};
#pragma unroll
        for (int i = 0; i < 4; ++i) o[step][n][i] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scale[n][i] = __shfl_sync(0xffffffffu, inverse, (lane % 4 * 2 + i) * 4) * (C::scale * 1.4426950408889634f);
        largest[n][i] = lane_largest[n][i] = kLowest, sum[n][i] = 0.0f;
      }
    }
  }

  // 32 tokens whose K and V begin at shared addresses k and v, and their scales; those from `valid` on do not count.
  HELIX_DEVICE void attend(u32 k, u32 v, const u8* scales, int valid, int lane) {
    // ldmatrix rows: tokens lane % 16, K's as stored and V's transposed.
    const u32 row = row_of(lane % 16), piece = piece_of(lane % 16, lane / 16);
    float s[halves][eights][chains][4] = {};
#pragma unroll
    for (int pair = 0; pair < steps / 2; ++pair)
#pragma unroll
      for (int half = 0; half < halves; ++half) {
        const FragmentA raw = load_matrices(k + row + half * (16 * Tile::token_bytes) + (piece ^ (pair * 32)));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const FragmentA a = {{e4m3_low_to_float16(raw.x[2 * i]), e4m3_low_to_float16(raw.x[2 * i + 1]),
                                e4m3_high_to_float16(raw.x[2 * i]), e4m3_high_to_float16(raw.x[2 * i + 1])}};
#pragma unroll
          for (int n = 0; n < eights; ++n) multiply_add_float16(s[half][n][i % chains], a, q[2 * pair + i][n]);
        }
      }
    FragmentA values[halves][steps / 2];  // fetched before the weights are known
#pragma unroll
    for (int half = 0; half < halves; ++half)
#pragma unroll
      for (int pair = 0; pair < steps / 2; ++pair)
        values[half][pair] =
            load_matrices_transposed(v + row + half * (16 * Tile::token_bytes) + (piece ^ (pair * 32)));
    float k_scale[lane_tokens], v_scale[lane_tokens];  // V's in units of log2, plus 127
#pragma unroll
    for (int i = 0; i < lane_tokens; ++i) {
      const u8* at = scales + lane / 4 + i * 8;
      k_scale[i] = scale_to_float(at[0]), v_scale[i] = float(at[C::tile]);
    }
    FragmentB p[halves][eights];
#pragma unroll
    for (int n = 0; n < eights; ++n) {
      float scores[lane_tokens][2];
#pragma unroll
      for (int i = 0; i < lane_tokens; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float(&dots)[chains][4] = s[i / 2][n];
          const int at = i % 2 * 2 + j;
          const float dot = chains == 2 ? dots[0][at] + dots[chains - 1][at] : dots[0][at];
          const bool admitted = bounds.admit(n, j, lane / 4 + i * 8, valid);
          scores[i][j] = admitted ? dot * (k_scale[i] * scale[n][j]) : minus_infinity();
        }
      weigh(scores, v_scale, n);
#pragma unroll
      for (int half = 0; half < halves; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          p[half][n].x[i] = transpose(pack_float16(scores[2 * half + i][0], scores[2 * half + i][1]));
    }
#pragma unroll
    for (int half = 0; half < halves; ++half)
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        const u32 low = swap_middle_bytes(values[half][step / 2].x[step % 2 * 2]);
        const u32 high = swap_middle_bytes(values[half][step / 2].x[step % 2 * 2 + 1]);
        const FragmentA a = {{e4m3_low_to_float16(low), e4m3_high_to_float16(low), e4m3_low_to_float16(high),
                              e4m3_high_to_float16(high)}};
#pragma unroll
        for (int n = 0; n < eights; ++n) multiply_add_float16(o[step][n], a, p[half][n]);
      }
  }

  // Scores to weights times V scale, rescaling what came before if a largest grew.
  HELIX_DEVICE void weigh(float (&scores)[lane_tokens][2], const float (&v_scale)[lane_tokens], int n) {
    float most[2], rescale[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float of_lane = lane_largest[n][j];
      most[j] = largest[n][j];
#pragma unroll
      for (int i = 0; i < lane_tokens; ++i) {
        of_lane = fmaxf(of_lane, scores[i][j]);
        most[j] = fmaxf(most[j], scores[i][j] + v_scale[i]);
      }
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2)
        most[j] = fmaxf(most[j], __shfl_xor_sync(0xffffffffu, most[j], distance));
      rescale[j] = exp2_approximate(largest[n][j] - most[j]);
      sum[n][j] *= exp2_approximate(lane_largest[n][j] - of_lane);
#pragma unroll
      for (int i = 0; i < lane_tokens; ++i) {
        sum[n][j] += exp2_approximate(scores[i][j] - of_lane);
        scores[i][j] = exp2_approximate((scores[i][j] - most[j]) + (v_scale[i] + weight_bits));
      }
      lane_largest[n][j] = of_lane;
    }
    if (__any_sync(0xffffffffu, most[0] > largest[n][0] || most[1] > largest[n][1])) {
#pragma unroll
      for (int step = 0; step < steps; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[step][n][i] *= rescale[i % 2];
    }
    largest[n][0] = most[0], largest[n][1] = most[1];
  }

  // To shared memory, for the reduction over the warps.
  HELIX_DEVICE void store(GqaShared<C>& shared, u32 stage, int warp, int lane) {
#pragma unroll
    for (int n = 0; n < eights; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = n * 8 + lane % 4 * 2 + i;
        float most = lane_largest[n][i], total = sum[n][i];
#pragma unroll
        for (int distance = 4; distance < kWarp; distance *= 2)
          most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
        total *= exp2_approximate(lane_largest[n][i] - most);
#pragma unroll
        for (int distance = 4; distance < kWarp; distance *= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
        const float gain = exp2_approximate(largest[n][i] - most - (weight_bits + 127.0f));
#pragma unroll
        for (int step = 0; step < steps; ++step) {
          const float2 pair = {o[step][n][i] * gain, o[step][n][i + 2] * gain};
          *reinterpret_cast<float2*>(shared.o(stage, warp, column, step * 16 + lane / 4 * 2)) = pair;
        }
        if (lane < 4) shared.largest[column][warp] = most, shared.sum[column][warp] = total;
      }
  }

  // V of what holds no token becomes zero: 0 * NaN is NaN.
  HELIX_DEVICE static void clear_values(u8* v, int valid, int lane) {
    for (int i = lane; i < (Tile::warp_tokens - valid) * pieces; i += kWarp) {
      const int token = valid + i / pieces;
      *reinterpret_cast<Vector16*>(v + row_of(token) + piece_of(token, i % pieces)) = Vector16{};
    }
    __syncwarp();
    fence_async_proxy();
  }

  // Where a token has its 16-byte pieces: a line of 128 bytes, and the place in it. The copy engine swapped the pieces
  // of each line: piece p of line l is at p ^ (l % 8).
  HELIX_DEVICE static u32 row_of(int token) { return u32(token / Tile::line_tokens * 128); }
  HELIX_DEVICE static u32 piece_of(int token, int piece) {
    return u32((token % Tile::line_tokens * pieces + piece) ^ (token / Tile::line_tokens % 8)) * 16;
  }

  HELIX_DEVICE static float low_of(u32 pair) { return __int_as_float(int(pair << 16)); }
  HELIX_DEVICE static float high_of(u32 pair) { return __int_as_float(int(pair & 0xffff0000u)); }
  HELIX_DEVICE static float largest_of(u32 pair) { return fmaxf(fabsf(low_of(pair)), fabsf(high_of(pair))); }
  HELIX_DEVICE static u32 to_float16(u32 pair, float gain) {
    return pack_float16(low_of(pair) * gain, high_of(pair) * gain);
  }
};

}  // namespace helix
