"""FP8 e4m3 KV with block scales: each group of up to 128 columns of a token and KV head has a power of two.

Powers of two keep the cast the only rounding: an element read back is exact in bfloat16 and float32. A scale is one
byte, the exponent plus 127 (the E8M0 of the OCP microscaling formats); MLA's 512 latent columns have four and its
rotary columns one of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helixc_runtime.manifest import SCALE_COLUMNS, KvDtype

EXPONENT_BIAS = 127
_LEAST, _MOST = -100, 120  # exponents whose scaled elements are normal numbers in bfloat16


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., width] of any floating dtype -> (elements [..., width] float8_e4m3fn, scales [..., groups] uint8).

    Nearest even; the scale is the least power of two under which the group's largest magnitude is at most 448. NaN
    and infinity become NaN.
    """
    wide = x.float()
    scales = torch.stack([_exponents(group) for group in torch.split(wide, SCALE_COLUMNS, dim=-1)], dim=-1)
    scaled = torch.ldexp(wide, -_spread(scales, x.shape[-1]))
    elements = scaled.masked_fill(scaled.isinf(), torch.nan).to(torch.float8_e4m3fn)
    return elements, (scales + EXPONENT_BIAS).to(torch.uint8)


def dequantize(elements: Tensor, scales: Tensor) -> Tensor:
    """What `quantize` took apart, float32."""
    exponents = scales.to(torch.int32) - EXPONENT_BIAS
    return torch.ldexp(elements.float(), _spread(exponents, elements.shape[-1]))


def pack(x: Tensor) -> Tensor:
    """`quantize`, as one message: [..., width + groups] uint8, each vector's elements and then its scales."""
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


def _exponents(group: Tensor) -> Tensor:
    """The scale's exponent [...] int32 of each group [..., columns]."""
    largest = group.abs().amax(dim=-1)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, mantissa in [0.5, 1)
    least = exponent - 9 + (mantissa > 0.875).int()  # 448 = 0.875 * 2^9
    least = least.masked_fill(largest == 0, _LEAST)
    return torch.where(largest.isfinite(), least, _MOST).clamp(_LEAST, _MOST).int()


def _spread(exponents: Tensor, width: int) -> Tensor:
    """Each group's exponent for each of its columns."""
    return exponents.repeat_interleave(SCALE_COLUMNS, dim=-1)[..., :width]
