// FP8 e4m3 with scales, as runtime/helixc_runtime/quantize.py has it: a vector's scale is the least power of two under
// which its largest magnitude is at most 448; its byte is that power's exponent as a float32 holds it.
#pragma once
#include "helix/chunk.cuh"

namespace helix {

constexpr float kLargestFloat8 = 448.0f;  // 1.75 * 2^8

// The larger of `largest` and the chunk's magnitudes, all as bits of float32: their order is that of integers, with NaN
// above infinity.
template <class T, int n> HELIX_DEVICE u32 max_bits(u32 largest, const Chunk<T, n>& chunk) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const u32 bits = bits_of(to_float(chunk.items[i])) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// 448 is the last of its mantissas that keeps the exponent, so the next one carries into it. Bounds: quantize.py.
HELIX_DEVICE u8 scale_of(u32 largest) {
  constexpr u32 carry = 0x7fffffu - 0x600000u;
  const int scale = int((largest + carry) >> 23) - 8;
  return u8(scale < 27 ? 27 : scale > 247 ? 247 : scale);
}

template <class T, int n> HELIX_DEVICE Chunk<float8_e4m3fn, n> quantized(const Chunk<T, n>& chunk, u8 scale) {
  const float inverse = __int_as_float((254 - int(scale)) << 23);
  float scaled[n + 1];  // one more, so that an odd number makes pairs
  scaled[n] = 0.0f;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float x = to_float(chunk.items[i]) * inverse;
    scaled[i] = fabsf(x) <= kLargestFloat8 ? x : __int_as_float(0x7fffffff);  // infinity becomes NaN
  }
  Chunk<float8_e4m3fn, n> out;
#pragma unroll
  for (int i = 0; i < n; i += 2) {
    const u16 pair = floats_to_e4m3x2_bits(scaled[i], scaled[i + 1]);
    out.items[i].bits = u8(pair);
    if (i + 1 < n) out.items[i + 1].bits = u8(pair >> 8);
  }
  return out;
}

}  // namespace helix
