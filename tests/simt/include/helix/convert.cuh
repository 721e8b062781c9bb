// The conversions of templates/include/helix/convert.cuh for a CPU.
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

inline unsigned multiply_bfloat16(unsigned a, unsigned b) {
  const auto product = [](unsigned x, unsigned y) {
    return unsigned(float_to_bfloat16_bits(__int_as_float(x << 16) * __int_as_float(y << 16)));
  };
  return product(a & 0xffff, b & 0xffff) | product(a >> 16, b >> 16) << 16;
}

}  // namespace helix
