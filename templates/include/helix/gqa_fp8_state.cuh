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
// Instructions a warp and tile of 128 tokens, D 128, as compiled: 560, of them 132 conversions, 32 swaps, 32 products,
// 16 ldmatrix and 20 exponentials. With two cycles for what issues at half the rate and eight for an exponential that
// is less than 1,000 of a scheduler's cycles, of the 2,500 in which memory brings the tile (13 bytes a cycle and SM).
// As measured: 1,050 cycles a tile, and 1,650 of two warps a scheduler (9 to 16 queries), which both convert.
#pragma once
#include "helix/gqa_tile.cuh"

namespace helix {

// As GqaState; the rows of o stand for dims 2 * (lane / 4) and that + 1 of each 16.
template <class C> struct GqaFp8State {
  using Tile = GqaTile<C>;
  static constexpr int steps = C::head_dim / 16, halves = Tile::slice_tokens / 16;
  static constexpr int chains = 2;                // independent sums of a score: products to overlap
  static constexpr int lane_tokens = halves * 2;  // lane / 4 + 8 * (0 .. lane_tokens - 1)
  static constexpr int pieces = Tile::token_bytes / 16;
  static constexpr float weight_bits = 15.0f;  // of the largest weight times V scale
  float o[steps][4];
  float largest[2];               // of a score plus its V scale's byte, in units of log2: what o is in
  float lane_largest[2], sum[2];  // of the scores of this lane's tokens
  float scale[2];                 // of a product to a score in units of log2
  FragmentB q[steps];
  GqaBounds<C> bounds;

  HELIX_DEVICE void start(const GqaArguments& args, const GqaCursor& at, int eight, int lane) {
    bounds.start(args, at.row, at.length, eight, lane);
    const bfloat16* query = args.q + first_group<C>(at.row, at.kv_head) * C::group * C::head_dim + lane % 4 * 4;
    const int column = eight * 8 + lane / 4;
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
      q[step] = {{to_float16(words[step].x, gain), to_float16(words[step].y, gain)}};
#pragma unroll
      for (int i = 0; i < 4; ++i) o[step][i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[i] = __shfl_sync(0xffffffffu, inverse, (lane % 4 * 2 + i) * 4) * (C::scale * 1.4426950408889634f);
      largest[i] = lane_largest[i] = kLowest, sum[i] = 0.0f;
    }
  }

  // 32 tokens whose K and V begin at shared addresses k and v, and their scales; those from `valid` on do not count.
  HELIX_DEVICE void attend(u32 k, u32 v, const u8* scales, int valid, int lane) {
    // ldmatrix rows: tokens lane % 16, K's as stored and V's transposed.
    const u32 row = row_of(lane % 16), piece = piece_of(lane % 16, lane / 16);
    float s[halves][chains][4] = {};
#pragma unroll
    for (int pair = 0; pair < steps / 2; ++pair)
#pragma unroll
      for (int half = 0; half < halves; ++half) {
        const FragmentA raw = load_matrices(k + row + half * (16 * Tile::token_bytes) + (piece ^ (pair * 32)));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const FragmentA a = {{e4m3_low_to_float16(raw.x[2 * i]), e4m3_low_to_float16(raw.x[2 * i + 1]),
                                e4m3_high_to_float16(raw.x[2 * i]), e4m3_high_to_float16(raw.x[2 * i + 1])}};
          multiply_add_float16(s[half][i], a, q[2 * pair + i]);
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
    float scores[lane_tokens][2];
#pragma unroll
    for (int i = 0; i < lane_tokens; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float(&dots)[chains][4] = s[i / 2];
        const int at = i % 2 * 2 + j;
        const bool admitted = bounds.admit(j, lane / 4 + i * 8, valid);
        scores[i][j] = admitted ? (dots[0][at] + dots[1][at]) * (k_scale[i] * scale[j]) : minus_infinity();
      }
    weigh(scores, v_scale);
    if (valid < Tile::slice_tokens) clear_values(values, valid, lane);
    FragmentB p[halves];
#pragma unroll
    for (int half = 0; half < halves; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        p[half].x[i] = transpose(pack_float16(scores[2 * half + i][0], scores[2 * half + i][1]));
#pragma unroll
    for (int half = 0; half < halves; ++half)
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        const u32 low = swap_middle_bytes(values[half][step / 2].x[step % 2 * 2]);
        const u32 high = swap_middle_bytes(values[half][step / 2].x[step % 2 * 2 + 1]);
        const FragmentA a = {{e4m3_low_to_float16(low), e4m3_high_to_float16(low), e4m3_low_to_float16(high),
                              e4m3_high_to_float16(high)}};
        multiply_add_float16(o[step], a, p[half]);
      }
  }

  // Scores to weights times V scale, rescaling what came before if a largest grew.
  HELIX_DEVICE void weigh(float (&scores)[lane_tokens][2], const float (&v_scale)[lane_tokens]) {
    float most[2], rescale[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float of_lane = lane_largest[j];
      most[j] = largest[j];
#pragma unroll
      for (int i = 0; i < lane_tokens; ++i) {
        of_lane = fmaxf(of_lane, scores[i][j]);
        most[j] = fmaxf(most[j], scores[i][j] + v_scale[i]);
      }
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2)
        most[j] = fmaxf(most[j], __shfl_xor_sync(0xffffffffu, most[j], distance));
      rescale[j] = exp2_approximate(largest[j] - most[j]);
      sum[j] *= exp2_approximate(lane_largest[j] - of_lane);
#pragma unroll
      for (int i = 0; i < lane_tokens; ++i) {
        sum[j] += exp2_approximate(scores[i][j] - of_lane);
        scores[i][j] = exp2_approximate((scores[i][j] - most[j]) + (v_scale[i] + weight_bits));
      }
      lane_largest[j] = of_lane;
    }
    if (__any_sync(0xffffffffu, most[0] > largest[0] || most[1] > largest[1])) {
#pragma unroll
      for (int step = 0; step < steps; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[step][i] *= rescale[i % 2];
    }
    largest[0] = most[0], largest[1] = most[1];
  }

  // To shared memory, for the reduction over the slices.
  HELIX_DEVICE void store(GqaShared<C>& shared, u32 stage, int slice, int eight, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = eight * 8 + lane % 4 * 2 + i;
      float most = lane_largest[i], total = sum[i];
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2)
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
      total *= exp2_approximate(lane_largest[i] - most);
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
      const float gain = exp2_approximate(largest[i] - most - (weight_bits + 127.0f));
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        const float2 pair = {o[step][i] * gain, o[step][i + 2] * gain};
        *reinterpret_cast<float2*>(shared.o(stage, slice, column, step * 16 + lane / 4 * 2)) = pair;
      }
      if (lane < 4) shared.largest[column][slice] = most, shared.sum[column][slice] = total;
    }
  }

  // V of what holds no token becomes zero: 0 * NaN is NaN.
  HELIX_DEVICE static void clear_values(FragmentA (&values)[halves][steps / 2], int valid, int lane) {
#pragma unroll
    for (int i = 0; i < lane_tokens; ++i) {
      const u32 bits = valid_bits(i * 8 + lane % 4 * 2, valid);
#pragma unroll
      for (FragmentA& v : values[i / 2]) v.x[i % 2] &= bits, v.x[i % 2 + 2] &= bits;
    }
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
