"""`load_format: dummy`: random weights by a counter-based generator, so that ranks need not agree on an order."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from helixc_runtime.manifest import Range

RESIDUAL_SCALE = 0.125

_MASK = (1 << 32) - 1


def dummy_tensor(seed: int, name: str, shape: tuple[int, ...], box: tuple[Range, ...], device: torch.device) -> Tensor:
    """The `box` of the tensor `name` of `shape`, float32 on `device`.

    Matrices are uniform with standard deviation 1/sqrt(fan-in), norms uniform in [0.5, 1.5], other vectors small. The
    embedding has standard deviation 1 and the projections back into the residual stream RESIDUAL_SCALE of theirs: as
    in a trained model, one layer changes the stream a little, so that rounding, or a near tie in an expert's choice,
    does not grow from layer to layer.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")
    uniform = _uniform(_flat_index(shape, box, device), key)  # in [-1, 1)
    if "norm" in name:
        return 1.0 + 0.5 * uniform
    if len(shape) == 1:
        return 0.05 * uniform
    deviation = 1.0 if "embed" in name else 1.0 / math.sqrt(shape[-1])
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        deviation *= RESIDUAL_SCALE
    return uniform.mul_(deviation * math.sqrt(3.0))


def _flat_index(shape: tuple[int, ...], box: tuple[Range, ...], device: torch.device) -> Tensor:
    """int64 positions of the box's elements in the row-major whole."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, (lo, hi) in zip(shape, box, strict=True):
        index = index.unsqueeze(-1) * size + torch.arange(lo, hi, device=device)
    return index


def _uniform(index: Tensor, key: int) -> Tensor:
    """A hash of (index, key) as float32 in [-1, 1): a 32-bit multiply-xorshift mixer, run in int64, in place."""
    x = index.add_(key)
    high = x >> 32  # tensors of more than 2^32 elements do not repeat
    x.bitwise_xor_(high.mul_(0x9E3779B1)).bitwise_and_(_MASK)
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x.bitwise_xor_(x >> shift).mul_(multiplier).bitwise_and_(_MASK)
    x.bitwise_xor_(x >> 16)
    return x.to(torch.float32).mul_(2.0**-31).sub_(1.0)
