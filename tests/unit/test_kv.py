"""What an FP8 cache keeps of a vector, packed and not. tests/unit/test_handoff.py fills whole caches."""

from __future__ import annotations

import pytest
import torch

from helixc_runtime.quantize import dequantize, quantize, rounded, unpack
from helixc_runtime.quantize import pack as packed


@pytest.mark.parametrize("width", [16, 128, 160, 576])
def test_a_packed_vector_is_taken_apart_again(width: int) -> None:
    x = torch.randn(3, 5, width) * 10 ** (torch.rand(3, 5, 1) * 8 - 4)
    message = packed(x)
    assert message.dtype == torch.uint8 and message.shape == (3, 5, width + 1)
    for found, right in zip(unpack(message, width), quantize(x), strict=True):
        assert torch.equal(found.view(torch.uint8), right.view(torch.uint8))


def test_what_a_cache_gives_back() -> None:
    x = torch.randn(7, 200)
    assert torch.equal(rounded(x, "float32"), x)
    assert torch.equal(rounded(x, "bfloat16"), x.bfloat16().float())
    assert torch.equal(rounded(x, "float8_e4m3fn"), dequantize(*quantize(x)))
    half = rounded(x.bfloat16(), "float8_e4m3fn")
    assert half.dtype == torch.bfloat16 and torch.equal(half.float(), dequantize(*quantize(x.bfloat16())))
