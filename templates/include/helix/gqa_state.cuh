// GQA partial in bf16: what one computing warp does with 16 tokens of a tile in shared memory (gqa_partial.cuh).
#pragma once
#include "helix/gqa_tile.cuh"

namespace helix {

// What one computing warp knows of a unit. Lane l holds columns l % 4 * 2 + {0, 1} of the warp's eight; the rows of o
// (of D) and the tokens behind `sum` are spread over l / 4.
template <class C> struct GqaState {
  static constexpr int steps = C::head_dim / 16;
  static constexpr int chains = 2;  // independent sums of a score: products to overlap
  float o[steps][4];
  float largest[2], sum[2];  // of scores in units of log2; sum: this lane's tokens only
  FragmentB q[steps];
  GqaBounds<C> bounds;

  HELIX_DEVICE void start(const GqaArguments& args, const GqaCursor& at, int eight, int lane) {
    const bfloat16* query = args.q + first_group<C>(at.row, at.kv_head) * C::group * C::head_dim;
    bounds.start(args, at.row, at.length, eight, lane);
    const int column = eight * 8 + lane / 4;
#pragma unroll
    for (int step = 0; step < steps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[step][i] = 0.0f;
      const u32* words = reinterpret_cast<const u32*>(query + query_offset<C>(column) * C::head_dim + step * 16);
      q[step].x[0] = has_query<C>(column) ? words[lane % 4] : 0;
      q[step].x[1] = has_query<C>(column) ? words[lane % 4 + 4] : 0;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = nothing(), sum[i] = 0.0f;
  }

  // The largest score of no token. A query that sees a tile but none of its tokens must not subtract -inf from -inf.
  HELIX_DEVICE static float nothing() { return C::query_tokens == 1 ? minus_infinity() : kLowest; }

  // 16 tokens whose K and V rows begin at shared addresses k and v; those from `valid` on do not count.
  HELIX_DEVICE void attend(u32 k, u32 v, const u8*, int valid, int lane) {
    constexpr int plane = GqaTile<C>::plane_bytes;
    // ldmatrix rows: K as stored gives (token, dim) fragments, V transposed (dim, token) ones. The copy engine swapped
    // the 16-byte pieces of each 128-byte row: piece p of row r is at p ^ (r % 8).
    const u32 k_row = k + u32(lane % 16) * 128, k_piece = u32((lane / 16) ^ (lane % 8)) * 16;
    const u32 v_row = v + u32(lane % 8 + lane / 16 * 8) * 128, v_piece = u32((lane / 8 % 2) ^ (lane % 8)) * 16;
    float s[chains][4] = {};
#pragma unroll
    for (int step = 0; step < steps; ++step)
      multiply_add(s[step % chains], load_matrices(k_row + step / 4 * plane + (k_piece ^ (step % 4 * 32))), q[step]);
    FragmentA values[steps];  // fetched before the weights are known
#pragma unroll
    for (int step = 0; step < steps; ++step)
      values[step] = load_matrices_transposed(v_row + step / 4 * plane + (v_piece ^ (step % 4 * 32)));
    const FragmentB p = weigh(s, valid, lane);
    if (valid < 16) clear_values(values, valid, lane);
#pragma unroll
    for (int step = 0; step < steps; ++step) multiply_add(o[step], values[step], p);
  }

  // Scores of 16 tokens to weights exp2(score - largest), rescaling what came before if the largest grew.
  HELIX_DEVICE FragmentB weigh(const float (&dots)[chains][4], int valid, int lane) {
    constexpr float scale = C::scale * 1.4426950408889634f;
    float s[4], most[2], rescale[2];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      s[i] = bounds.admit(i % 2, lane / 4 + i / 2 * 8, valid) ? (dots[0][i] + dots[1][i]) * scale : minus_infinity();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = fmaxf(s[i], s[i + 2]);
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2)
        most[i] = fmaxf(most[i], __shfl_xor_sync(0xffffffffu, most[i], distance));
      most[i] = fmaxf(most[i], largest[i]);
      rescale[i] = exp2_approximate(largest[i] - most[i]);
    }
    if (__any_sync(0xffffffffu, most[0] > largest[0] || most[1] > largest[1])) {
#pragma unroll
      for (int step = 0; step < steps; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[step][i] *= rescale[i % 2];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = exp2_approximate(s[i] - most[i % 2]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] = sum[i] * rescale[i] + s[i] + s[i + 2];
      largest[i] = most[i];
    }
    return {{transpose(pack_bfloat16(s[0], s[1])), transpose(pack_bfloat16(s[2], s[3]))}};
  }

  // To shared memory, for the reduction over the slices.
  HELIX_DEVICE void store(GqaShared<C>& shared, u32 stage, int slice, int eight, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = eight * 8 + lane % 4 * 2 + i;
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        *shared.o(stage, slice, column, step * 16 + lane / 4) = o[step][i];
        *shared.o(stage, slice, column, step * 16 + lane / 4 + 8) = o[step][i + 2];
      }
      float total = sum[i];
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
      if (lane < 4) shared.largest[column][slice] = largest[i], shared.sum[column][slice] = total;
    }
  }

  // V of what holds no token becomes zero: 0 * NaN is NaN.
  HELIX_DEVICE static void clear_values(FragmentA (&values)[steps], int valid, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 bits = valid_bits(i / 2 * 8 + lane % 4 * 2, valid);
#pragma unroll
      for (FragmentA& v : values) v.x[i] &= bits;
    }
  }
};

}  // namespace helix
