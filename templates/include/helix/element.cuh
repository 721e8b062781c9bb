// Element types and their conversions, without any CUDA header (NVRTC finds none unless told where).
#pragma once
#include "helix/convert.cuh"

namespace helix {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct bfloat16 { u16 bits; };
struct float16 { u16 bits; };
struct float8_e4m3fn { u8 bits; };  // of a cache only, with scales: see below
using float32 = float;

template <class A, class B> constexpr bool kSame = false;
template <class A> constexpr bool kSame<A, A> = true;

// 16 bytes: the widest load and store of one thread.
struct alignas(16) Vector16 { u32 words[4]; };

// FP8 caches: the columns of a token and KV head share a scale, a power of two; its byte is a float's exponent.
HELIX_DEVICE float scale_to_float(u8 scale) { return __int_as_float(int(scale) << 23); }

HELIX_DEVICE float minus_infinity() { return __int_as_float(0xff800000); }
HELIX_DEVICE bool is_minus_infinity(float x) { return __float_as_int(x) == int(0xff800000); }

HELIX_DEVICE float to_float(float x) { return x; }
HELIX_DEVICE float to_float(bfloat16 x) { return __int_as_float(int(u32(x.bits) << 16)); }
HELIX_DEVICE float to_float(float16 x) { return float16_bits_to_float(x.bits); }
HELIX_DEVICE float to_float(float8_e4m3fn x) { return float8_e4m3_bits_to_float(x.bits); }

HELIX_DEVICE u32 bits_of(float x) { return u32(__float_as_int(x)); }
HELIX_DEVICE u32 bits_of(bfloat16 x) { return x.bits; }
HELIX_DEVICE u32 bits_of(float16 x) { return x.bits; }
HELIX_DEVICE u32 bits_of(float8_e4m3fn x) { return x.bits; }

// Of the low bits.
HELIX_DEVICE void from_bits(float& x, u32 bits) { x = __int_as_float(int(bits)); }
HELIX_DEVICE void from_bits(bfloat16& x, u32 bits) { x.bits = u16(bits); }
HELIX_DEVICE void from_bits(float16& x, u32 bits) { x.bits = u16(bits); }

// Round to nearest even.
template <class T> HELIX_DEVICE T from_float(float x);
template <> HELIX_DEVICE float from_float<float>(float x) { return x; }
template <> HELIX_DEVICE bfloat16 from_float<bfloat16>(float x) { return {float_to_bfloat16_bits(x)}; }
template <> HELIX_DEVICE float16 from_float<float16>(float x) { return {float_to_float16_bits(x)}; }

}  // namespace helix
