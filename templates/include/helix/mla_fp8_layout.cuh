// What the warpgroups of the FP8 MLA partial share (see mla_fp8_partial.cuh): shared memory, the ring of tiles.
#pragma once
#include "helix/mla_layout.cuh"

namespace helix {

template <class C> struct MlaFp8Shared {
  static constexpr u32 kLatent = 64 * 512, kTile = 64 * 576, kScales = 64;  // bytes
  static constexpr u32 kQ = C::columns * 1152, kQGroup = 9 * 1024, kP = C::columns * 128;
  static constexpr u32 q = 0, tiles = q + kQ, p = tiles + C::stages * kTile, scales = p + kP;
  static constexpr u32 queries = scales + C::stages * kScales, rescale = queries + 8 * C::columns;
  static constexpr u32 inverse = rescale + 4 * C::columns, moved = inverse + 4 * C::columns;
  static constexpr u32 full_barriers = moved + 16, empty_barriers = full_barriers + 8 * C::stages;
  static constexpr u32 q_full = empty_barriers + 8 * C::stages, q_empty = q_full + 8, p_full = q_empty + 8;
  static constexpr u32 p_empty = p_full + 8, bytes = p_empty + 8;
  static_assert(bytes <= 232448, "shared memory of one block");
  HELIX_DEVICE static u32 full(u32 stage) { return full_barriers + 8 * stage; }
  HELIX_DEVICE static u32 empty(u32 stage) { return empty_barriers + 8 * stage; }
  HELIX_DEVICE static u32 tile(u32 stage) { return tiles + stage * kTile; }
  HELIX_DEVICE static u32 scale_bytes(u32 stage) { return scales + stage * kScales; }
};

// What turns products into scores (mla_fp8_softmax.cuh), of two queries side by side: factors, then references.
HELIX_DEVICE u32 gain_offset(u32 query) { return query / 2 * 16 + query % 2 * 4; }
HELIX_DEVICE u32 reference_offset(u32 query) { return gain_offset(query) + 8; }

constexpr int kLift = 7;  // log2 of the weight times scale of a token at its query's reference

// Which tile of the ring a role is at.
template <class C> struct RingStage {
  u32 index = 0, parity = 0;
  HELIX_DEVICE void advance() {
    if (++index == C::stages) index = 0, parity ^= 1;
  }
};

// Where in a tile an element lies: [8-token group][128-column group][8 tokens][128 bytes, swizzled], then the rotary
// columns [64 tokens][64 bytes, swizzled].
HELIX_DEVICE u32 latent_offset(u32 token, u32 group, u32 column) {
  return token / 8 * 4096 + group * 1024 + swizzled(token % 8, column);
}
HELIX_DEVICE u32 rotary_offset(u32 token, u32 column) {
  return 64 * 512 + token * 64 + (column ^ (token / 2 % 4 * 16));
}

}  // namespace helix
