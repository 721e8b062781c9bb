"""FP8 with scales: the nearest element of the right scale, exact when read back."""

from __future__ import annotations

import random

import pytest
import torch

from helixc_runtime.quantize import EXPONENT_BIAS, dequantize, quantize


@pytest.mark.parametrize("width", [64, 72, 128, 256, 576])
def test_elements_are_the_nearest_and_exact_in_bfloat16(width: int) -> None:
    seed = random.randrange(1 << 30)
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10.0 ** (torch.rand(40, 1, generator=generator) * 20 - 10)
    x = torch.randn(40, width, generator=generator) * magnitudes
    elements, scales = quantize(x)
    assert elements.dtype == torch.float8_e4m3fn and elements.shape == x.shape
    assert scales.dtype == torch.uint8 and scales.shape == (40, 1)
    back = dequantize(elements, scales)
    assert torch.equal(back, back.bfloat16().float()), f"{seed=}"
    # Half a unit in the last of 4 bits; below the least normal number, 2^-6, half of 2^-9.
    scale = torch.exp2(scales.double() - EXPONENT_BIAS)
    bound = torch.maximum(x.double().abs() * 2.0**-4, scale * 2.0**-10)
    assert ((back.double() - x.double()).abs() <= bound).all(), f"{seed=}"
    largest = x.double().abs().amax(1, keepdim=True)
    assert (largest <= 448 * scale).all() and (largest > 224 * scale).all(), f"{seed=}"


@pytest.mark.parametrize("gain", [50.0, 1000.0])
@pytest.mark.parametrize("columns", [slice(512, 576), slice(7, 8)], ids=["rotary", "outlier"])
def test_columns_that_dwarf_the_others_cost_them_nothing(columns: slice, gain: float) -> None:
    """Of a scale for all columns: their rounding is what a scale of their own would give, 2.6% root mean square."""
    x = torch.randn(500, 576)
    x[:, columns] *= gain
    rest = torch.ones(576, dtype=torch.bool)
    rest[columns] = False
    alone, beside = dequantize(*quantize(x[:, rest])), dequantize(*quantize(x))[:, rest]
    errors = [float((back - x[:, rest]).norm() / x[:, rest].norm()) for back in (alone, beside)]
    assert errors[1] <= 1.01 * errors[0] <= 0.03


def test_edges() -> None:
    x = torch.zeros(7, 64)
    x[1, 0] = 448.0  # the largest element, scale 1
    x[2, 0] = 448.1  # scale 2
    x[3, 5] = torch.nan
    x[4, 5] = torch.inf
    x[5, 5] = 1e-44
    x[6, 5] = 2.0**127
    elements, scales = quantize(x)
    back = dequantize(elements, scales)
    assert (back[0] == 0).all() and scales[0, 0] == EXPONENT_BIAS - 100
    assert scales[1, 0] == EXPONENT_BIAS and scales[2, 0] == EXPONENT_BIAS + 1
    assert back[1, 0] == 448.0 and back[2, 0] == 448.0
    assert back[3, 5].isnan() and back[4, 5].isnan() and back[5, 5] == 0
    assert 0.93 < back[6, 5] / x[6, 5] <= 1.07
