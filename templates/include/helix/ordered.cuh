// Floats as unsigned integers of the same order, so that the warp's integer reductions find the largest.
#pragma once
#include "helix/element.cuh"

namespace helix {

// Not the key of any score: that of an expert that is taken or is none.
constexpr u32 kTaken = 0;

// Order of floats as order of unsigned integers, above kTaken. NaN lies above or below all numbers, by its sign.
HELIX_DEVICE u32 ordered(float x) {
  const u32 bits = bits_of(x), key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return key == kTaken ? kTaken + 1 : key;
}

// The score whose order is `key`.
HELIX_DEVICE float score_of(u32 key) { return __int_as_float(int(key & 0x80000000u ? key & 0x7fffffffu : ~key)); }

}  // namespace helix
