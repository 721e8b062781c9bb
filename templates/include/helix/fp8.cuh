// FP8 e4m3 elements with a scale that is a power of two, as bfloat16, exactly (quantize.py states the format).
//
// The bits of an e4m3, sign eeee mmm, put where bfloat16 has its sign, low exponent and high mantissa bits are the
// element times 2^-120, subnormals included; one product of pairs corrects that and applies the scale. Nine
// instructions turn a word of four elements into two pairs: of bytes 0 and 2, and of bytes 1 and 3. That order costs
// nothing where the other operand's columns are permuted alike, or where the word holds two columns of two tokens.
//
// NaN (0x7f) becomes 480 times the scale, finite under any e4m3_factor: a weight of 0 clears a token whatever lies in
// its memory. `quantize` stores NaN under the scale 2^120 only, for which e4m3_excess is NaN; a group that needs that
// scale without one, for numbers beyond 2^127.8, counts as NaN too.
#pragma once
#include "helix/element.cuh"

namespace helix {

// What pairs are to be multiplied with: 2^120 times the scale, or as much of it as bfloat16 can hold.
HELIX_DEVICE u32 e4m3_factor(u32 scale_byte) { return min(scale_byte + 120, 254u) << 7; }
// The rest, 1 unless the scale is larger than 2^7: a second product.
HELIX_DEVICE u32 e4m3_excess(u32 scale_byte) { return scale_byte < 247 ? max(scale_byte, 134u) - 7 << 7 : 0x7fc0; }
HELIX_DEVICE bool e4m3_exceeds(u32 scale_byte) { return scale_byte > 134; }

// The same number in both halves of a word.
HELIX_DEVICE u32 both_halves(u32 x) { return x * 0x10001u; }

// Bytes 0 and 2 (1 and 3) of a word times a pair of factors.
HELIX_DEVICE u32 e4m3_even(u32 word, u32 factors) {
  return multiply_bfloat16((word << 8 & 0x80008000u) | (word << 4 & 0x07f007f0u), factors);
}
HELIX_DEVICE u32 e4m3_odd(u32 word, u32 factors) {
  return multiply_bfloat16((word & 0x80008000u) | (word >> 4 & 0x07f007f0u), factors);
}

}  // namespace helix
