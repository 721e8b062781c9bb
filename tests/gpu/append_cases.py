"""Random inputs of Ops.append, as strided as a model's, and how near to the oracle what it stores must be."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ops import GqaProjections, MlaProjections, MlaUnabsorbed, Projections
from helixc_runtime.quantize import EXPONENT_BIAS, dequantize

_UNUSED = 16  # columns beside a projection's in a fused one: NaN, so that reading them shows


def random_projections(
    shape: AttentionShape, tokens: int, device: torch.device, generator: torch.Generator
) -> Projections:
    """Slices of fused projections and a transposed product, all in shape.dtype.

    Tokens differ in magnitude, every second is small enough for the norm's eps to matter, and so do their
    heads, so that another's FP8 scale is noticed. Some elements are subnormal in FP8.
    """
    dtype: torch.dtype = getattr(torch, shape.dtype)
    gain = 10.0 ** (torch.rand(tokens, 1, 1, generator=generator) * 2 - 1)
    gain[::2] = 1e-3

    def normal(heads: int, width: int, unused: int) -> Tensor:
        """[tokens, heads, unused + width], NaN in the unused columns."""
        head_gain = torch.exp2(-torch.randint(0, 4, (tokens, heads, 1), generator=generator).float())
        x = torch.randn(tokens, heads, width, generator=generator) * gain * head_gain
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.1, x * 2.0**-13, x)
        return torch.cat((torch.full((tokens, heads, unused), torch.nan), x), dim=-1).to(device, dtype)

    def weight(width: int) -> Tensor:
        return (torch.rand(width, generator=generator) + 0.5).to(device, dtype)

    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    if shape.is_mla:
        latent = shape.partial_dim
        q_latent = normal(heads, latent, 0).transpose(0, 1).contiguous().transpose(0, 1)  # heads are its outer dim
        q_rope = normal(heads, shape.rope_dim, _UNUSED)[..., _UNUSED:]
        return MlaProjections(q_latent, q_rope, normal(1, dim, _UNUSED)[:, 0, _UNUSED:], weight(latent))
    parts = [normal(count, dim, 0).flatten(1) for count in (heads, kv_heads, kv_heads)]
    fused = torch.cat(parts, dim=1).split([part.shape[1] for part in parts], dim=1)  # as of one qkv projection
    q, k, v = (part.unflatten(1, (-1, dim)) for part in fused)
    return GqaProjections(q, k, v, *((weight(dim), weight(dim)) if shape.qk_norm else ()))


def unabsorbed(new: Projections, nope: int, generator: torch.Generator) -> MlaUnabsorbed:
    """MLA's `new` before the product with a random W_UK of `nope` columns; q as a slice of a fused projection."""
    assert isinstance(new, MlaProjections)
    tokens, heads, latent = new.q_latent.shape
    device, dtype = new.q_latent.device, new.q_latent.dtype

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    head = nope + new.q_rope.shape[2]
    fused = torch.full((tokens, heads * head + _UNUSED), torch.nan, device=device, dtype=dtype)
    q = fused[:, _UNUSED:].unflatten(1, (heads, head))
    q.copy_(torch.cat((normal(tokens, heads, nope), new.q_rope), dim=-1))
    return MlaUnabsorbed(q, normal(heads, latent, nope) * nope**-0.5, new.kv, new.norm)


def doubled(new: Projections) -> Projections:
    """A float64 copy, for the oracle."""
    tensors = (getattr(new, field.name) for field in fields(new))
    return type(new)(*(None if tensor is None else tensor.double() for tensor in tensors))


def vector_error(got: Tensor, want: Tensor) -> float:
    """The largest relative error of a vector (the last dim); NaN in `got` gives NaN, which no bound admits."""
    if not got.numel():
        return 0.0
    error = (got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1).clamp_min(1e-30)
    return float(error.max())


def check_quantized(
    elements: Tensor, scales: Tensor, like_elements: Tensor, like_scales: Tensor, exact: Tensor, bound: float
) -> None:
    """Raise AssertionError unless FP8 tokens [..., D] equal those of the same arithmetic elsewhere, up to rounding.

    One element in a hundred may be the neighbour of the other's. A scale may differ only where the float64 `exact` is
    so near a limit, 448 times a power of two, that rounding by `bound` decides which side it is on.
    """
    largest = exact.abs().amax(-1, keepdim=True)
    low = torch.minimum(scales, like_scales).double()
    ratio = largest / (448 * torch.exp2(low - EXPONENT_BIAS))
    other = scales != like_scales
    assert ((ratio[other] - 1).abs() <= bound).all(), f"scales differ: {scales[other]} and {like_scales[other]}"
    steps = (_ordinal(elements) - _ordinal(like_elements)).abs()[~other.squeeze(-1)]
    assert not steps.numel() or int(steps.max()) <= 1, f"elements differ by {steps.max()} steps"
    assert int(steps.sum()) <= max(1, steps.numel() // 100), f"{steps.sum()} of {steps.numel()} elements differ"
    # Half a unit in the last of 4 bits at most.
    assert vector_error(dequantize(elements, scales), exact) <= 2.0**-4 + bound


def _ordinal(elements: Tensor) -> Tensor:
    """The place of FP8 elements in the order of their values."""
    codes = elements.view(torch.uint8).int()
    return torch.where(codes < 128, codes, 128 - codes)
