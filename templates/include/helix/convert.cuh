// Conversions and stores that are one PTX instruction. Apart from the rest so that the tests can run the kernels' own
// source on a CPU with another version of this file.
#pragma once

#define HELIX_DEVICE __device__ __forceinline__

namespace helix {

HELIX_DEVICE float float16_bits_to_float(unsigned short bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

HELIX_DEVICE float float8_e4m3_bits_to_float(unsigned char bits) {
  unsigned pair;  // of float16
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"((unsigned short)bits));
  return float16_bits_to_float((unsigned short)pair);
}

HELIX_DEVICE unsigned short float_to_bfloat16_bits(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

HELIX_DEVICE unsigned short float_to_float16_bits(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Two FP8 e4m3 elements, `low` in the low byte; beyond 448 the largest one, NaN stays NaN.
HELIX_DEVICE unsigned short floats_to_e4m3x2_bits(float low, float high) {
  unsigned short bits;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
  return bits;
}

// To global memory, aligned to 16 bytes, or to all of them where they are fewer.
template <int count> HELIX_DEVICE void store_words(unsigned* to, const unsigned* from) {
  static_assert(count == 1 || count == 2 || count % 4 == 0, "no store has so many words");
  if constexpr (count == 1) {
    *to = *from;
  } else if constexpr (count == 2) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(from[0]), "r"(from[1]) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < count; i += 4)
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to + i), "r"(from[i]), "r"(from[i + 1]),
                   "r"(from[i + 2]), "r"(from[i + 3])
                   : "memory");
  }
}

// From global memory, aligned as for store_words. The compilers leave these loads before all that uses any of them,
// where they would spread others out to save registers.
template <int count> HELIX_DEVICE void load_words(unsigned* to, const unsigned* from) {
  static_assert(count == 1 || count == 2 || count % 4 == 0, "no load has so many words");
  if constexpr (count == 1) {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(*to) : "l"(from) : "memory");
  } else if constexpr (count == 2) {
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < count; i += 4)
      asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[i]), "=r"(to[i + 1]), "=r"(to[i + 2]), "=r"(to[i + 3])
                   : "l"(from + i)
                   : "memory");
  }
}

}  // namespace helix
