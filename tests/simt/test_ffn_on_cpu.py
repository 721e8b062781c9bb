"""The kernels of the FFN and of the projections, and CudaFfn's launches, against the float64 oracle, without a GPU."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helixc_runtime.ffn_shape import FfnShape
from tests.gpu.ffn_cases import (
    QWEN3,
    V2,
    V3,
    V3_LITE,
    check_linear,
    check_mixture,
    check_mlp,
    ffn,
    random_case,
    random_mlp,
)
from tests.simt.cpu_kernel import ASYNCHRONY, Gpu, cpu_ffn

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

MIXTURES = {
    "v3-lite": ffn(V3_LITE, 192, 32, 24),
    "v3-lite, experts 17 to 49": ffn(V3_LITE, 128, 40, 16, experts=(17, 49)),
    "v3, groups by their two best": ffn(V3, 160, 16, 8, experts=(64, 192)),
    "v2, groups by their best": ffn(V2, 136, 24, 16),
    "qwen3, none shared": ffn(QWEN3, 264, 136),
    "one expert": ffn(V3_LITE, 72, 8, 8, experts=(5, 6)),
    "few experts": ffn(replace(QWEN3, experts=5, top_k=2), 64, 16),
}


def gpu(seed: int, processors: int = 3) -> Gpu:
    return Gpu(processors, seed, ASYNCHRONY[seed % 3])


def never(*arguments: object) -> Tensor:
    raise AssertionError("torch ran in place of the kernels")


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mix", "gated_mlp", "linear"):
        monkeypatch.setattr(f"helixc_runtime.ffn_cuda.{name}", never)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("shape", MIXTURES.values(), ids=MIXTURES.keys())
def test_mixtures(shape: FfnShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    kernels = cpu_ffn(shape, 16, tmp_path, monkeypatch, gpu(seed))
    generator = torch.Generator().manual_seed(seed)
    for rows in (1, random.Random(seed).randint(2, 8), 11):
        check_mixture(kernels.mixture, random_case(shape, rows, generator))


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize(("hidden", "columns"), [(264, 136), (72, 8), (128, 520)])
def test_a_dense_mlp(hidden: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    kernels = cpu_ffn(ffn(None, hidden, dense=columns), 16, tmp_path, monkeypatch, gpu(seed))
    generator = torch.Generator().manual_seed(seed)
    weights = random_mlp(hidden, columns, generator)
    for rows in (1, 8, 13):
        check_mlp(kernels.mlp, torch.randn(rows, hidden, generator=generator).bfloat16(), weights)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize(
    "size", [(40, 1056), (17, 600), (3, 24, 264), (2, 33, 128), (50, 40), (5, 16, 8)], ids=str
)  # teams of 8, 4, 2 and 1
def test_projections(size: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Also of rows that lie apart, as heads of a wider projection do."""
    kernels = cpu_ffn(ffn(None, 64), 16, tmp_path, monkeypatch, gpu(seed))
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(*size, generator=generator) * size[-1] ** -0.5).bfloat16()
    for rows in (1, 8, 16):
        wide = torch.randn(rows, *size[:-2], size[-1] + 16, generator=generator).bfloat16()
        check_linear(kernels.linear, wide[..., 8:-8], weight)
