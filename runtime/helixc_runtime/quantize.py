"""FP8 e4m3 KV with scales: each vector, of a token and KV head, has a power of two for all its columns.

Powers of two keep the cast the only rounding: an element read back is exact in bfloat16 and float32. A scale is one
byte, the exponent plus 127 (the E8M0 of the OCP microscaling formats). One is enough for a whole vector, latent and
rotary columns of MLA alike: e4m3 is a floating format with full precision over 15 binades under the largest column,
so a scale for fewer columns would help only those that are 2^-14 of the largest and less, by amounts under 2^-18 of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helixc_runtime.manifest import KvDtype

EXPONENT_BIAS = 127
_LEAST, _MOST = -100, 120  # exponents whose scaled elements are normal numbers in bfloat16


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., width] of any floating dtype -> (elements [..., width] float8_e4m3fn, scales [..., 1] uint8).

    Nearest even; the scale is the least power of two under which the vector's largest magnitude is at most 448. NaN
    and infinity become NaN.
    """
    wide = x.float()
    exponents = _exponents(wide)
    scaled = torch.ldexp(wide, -exponents)
    elements = scaled.masked_fill(scaled.isinf(), torch.nan).to(torch.float8_e4m3fn)
    return elements, (exponents + EXPONENT_BIAS).to(torch.uint8)


def dequantize(elements: Tensor, scales: Tensor) -> Tensor:
    """What `quantize` took apart, float32."""
    return torch.ldexp(elements.float(), scales.to(torch.int32) - EXPONENT_BIAS)


def pack(x: Tensor) -> Tensor:
    """`quantize`, as one message: [..., width + 1] uint8, each vector's elements and then its scale."""
    elements, scales = quantize(x)
    return torch.cat((elements.view(torch.uint8), scales), dim=-1)


def unpack(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(elements, scales), as `quantize` gives them, of vectors of `width` columns that `pack` made one of."""
    return packed[..., :width].view(torch.float8_e4m3fn), packed[..., width:]


def rounded(x: Tensor, kv_dtype: KvDtype) -> Tensor:
    """What a cache of `kv_dtype` gives back of x [..., width], in x's dtype."""
    if kv_dtype == "float8_e4m3fn":
        return dequantize(*quantize(x)).to(x.dtype)
    return x.to(getattr(torch, kv_dtype)).to(x.dtype)


def _exponents(vectors: Tensor) -> Tensor:
    """The scale's exponent [..., 1] int32 of each vector [..., columns]."""
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, mantissa in [0.5, 1)
    least = exponent - 9 + (mantissa > 0.875).int()  # 448 = 0.875 * 2^9
    least = least.masked_fill(largest == 0, _LEAST)
    return torch.where(largest.isfinite(), least, _MOST).clamp(_LEAST, _MOST).int()
