"""Rotary position embedding: frequencies of every supported scaling, and the angles of global positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helixc_runtime.manifest import Rope


def inverse_frequencies(rope: Rope, dim: int) -> Tensor:
    """[dim / 2] float32 radians a position. Formulas: RoFormer, Llama 3.1's scaling, YaRN (arXiv 2309.00071)."""
    plain = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        return _llama3(rope, plain)
    if rope.scaling == "yarn":
        return _yarn(rope, plain, dim)
    return plain


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended by turns in the old context."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / rope.factor


def _yarn(rope: Rope, plain: Tensor, dim: int) -> Tensor:
    def dim_of(turns: float) -> float:
        span = rope.original_max_position / (turns * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    interpolate = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * interpolate + plain * (1 - interpolate)


class Rotary:
    """Angles of one model on one device."""

    def __init__(self, rope: Rope, dim: int, device: torch.device) -> None:
        self.interleaved = rope.interleaved
        self.factor = rope.attention_factor
        self.frequencies = inverse_frequencies(rope, dim).to(device)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [N, dim / 2] float32 of global `positions` [N]."""
        angles = positions.to(torch.float32).unsqueeze(1) * self.frequencies
        return angles.cos() * self.factor, angles.sin() * self.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate x [N, heads, dim] by the angles [N, dim / 2] of its rows, in float32; in float64 where an argument is."""
    wide = x.to(torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)
    a, b = wide.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
