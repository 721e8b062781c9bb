// The instructions of templates/include/helix/convert.cuh for a CPU.
#pragma once

#define HELIX_DEVICE inline

namespace helix {

inline float float16_bits_to_float(unsigned short bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return float(x);
}

inline float float8_e4m3_bits_to_float(unsigned char bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 0x7f) == 0x7f) return std::nanf("");
  const float magnitude = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
  return bits & 0x80 ? -magnitude : magnitude;
}

inline unsigned short float_to_float16_bits(float x) {
  const _Float16 y = _Float16(x);
  unsigned short bits;
  std::memcpy(&bits, &y, sizeof bits);
  return bits;
}

inline unsigned short float_to_bfloat16_bits(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return 0x7fff;
  return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Three bits of mantissa, exponents down to -6, below them multiples of 2^-9; 0x7f is NaN, 0x7e 448.
inline unsigned float_to_e4m3_bits(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  const unsigned sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  const float absolute = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7f;
  if (absolute >= 448.0f) return sign | 0x7e;
  if (absolute < 0x1p-6f) return sign | unsigned(std::nearbyint(absolute * 0x1p9f));  // 8 is the bits of 2^-6
  const unsigned rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
  return sign | ((rounded >> 20) - ((127 - 7) << 3));
}

inline unsigned short floats_to_e4m3x2_bits(float low, float high) {
  return (unsigned short)(float_to_e4m3_bits(high) << 8 | float_to_e4m3_bits(low));
}

template <int count> inline void store_words(unsigned* to, const unsigned* from) {
  const unsigned long alignment = 4 * (count < 4 ? count : 4);
  if ((unsigned long)to % alignment)
    simt::fail("a store of %d words to an address that is not a multiple of %lu", count, alignment);
  std::memcpy(to, from, sizeof(unsigned) * count);
}

template <int count> inline void load_words(unsigned* to, const unsigned* from) {
  const unsigned long alignment = 4 * (count < 4 ? count : 4);
  if ((unsigned long)from % alignment)
    simt::fail("a load of %d words from an address that is not a multiple of %lu", count, alignment);
  std::memcpy(to, from, sizeof(unsigned) * count);
}

}  // namespace helix
