"""The kernels of the FFN and of the projections, and CudaFfn's launches, against the float64 oracle, without a GPU."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from helixc.codegen.config import configure
from helixc.codegen.problem import ffn as problems
from helixc_runtime.cubin import LoadedKernel
from helixc_runtime.ffn_cuda import CudaFfn
from helixc_runtime.ffn_shape import FfnShape
from helixc_runtime.manifest import Kernel
from tests.gpu.ffn_cases import (
    QWEN3,
    V2,
    V3,
    V3_LITE,
    FfnCase,
    check_linear,
    check_mixture,
    check_mlp,
    check_rows,
    ffn,
    random_case,
    random_mlp,
    want_mixture,
    want_mlp,
)
from tests.simt.bugs import Bug, planted
from tests.simt.cpu_kernel import ASYNCHRONY, CpuKernel, Gpu, KernelFault, cpu_ffn

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
CPU = torch.device("cpu")
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


def test_of_equal_scores_the_lower_expert_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """All experts but a few have the same router weights."""
    generator = torch.Generator().manual_seed(seed)
    case = random_case(ffn(V3_LITE, 64, 16, 8), 3, generator)
    router = case.weights.router[:1].repeat(64, 1)
    best = torch.randperm(64, generator=generator)[:3]
    router[best] = case.weights.router[best]
    case = replace(case, weights=replace(case.weights, router=router, bias=torch.zeros(64)))
    kernels = cpu_ffn(case.shape, 8, tmp_path, monkeypatch, gpu(seed))
    check_rows(kernels.mixture(case.x, case.weights), want_mixture(case))


def test_columns_that_pad_an_expert_add_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """As weights.py pads them, with zeros."""
    case = random_case(ffn(V3_LITE, 64, 16), 2, torch.Generator().manual_seed(seed))
    for part in (case.weights.experts.gate[:, 11:], case.weights.experts.up[:, 11:]):
        part.zero_()
    case.weights.experts.down[..., 11:] = 0
    kernels = cpu_ffn(case.shape, 8, tmp_path, monkeypatch, gpu(seed))
    check_mixture(kernels.mixture, case)


def test_many_tokens_are_torch_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Also projections whose memory no load fits. Torch rounds what lies between two products to bfloat16."""
    shape = ffn(V3_LITE, 64, 16, 8, 24)
    kernels = cpu_ffn(shape, 8, tmp_path, monkeypatch, gpu(seed))
    generator = torch.Generator().manual_seed(seed)
    case = random_case(shape, 9, generator)
    monkeypatch.setattr(CpuKernel, "launch", never)
    check_rows(kernels.mixture(case.x, case.weights), want_mixture(case), 2e-2)
    mlp = random_mlp(64, 24, generator)
    check_rows(kernels.mlp(case.x, mlp), want_mlp(case.x, mlp), 2e-2)
    check_linear(kernels.linear, case.x, case.weights.router)
    check_linear(kernels.linear, case.x[:2, 1:], case.weights.router[:, 1:])


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    shape = ffn(V3_LITE, 64, 16, 8, 24)
    kernels = cpu_ffn(shape, 8, tmp_path, monkeypatch, gpu(seed))
    case = random_case(shape, 2, torch.Generator().manual_seed(seed))
    experts, shared = case.weights.experts, case.weights.shared
    for wrong, message in (
        (
            replace(case.weights, router=case.weights.router[:, :56]),
            r"router has shape \[64, 56\], expected \[64, 64\]",
        ),
        (replace(case.weights, experts=replace(experts, up=experts.up[1:])), r"experts.up has shape \[63, 16, 64\]"),
        (replace(case.weights, shared=None), "must have shared experts if the model has"),
        (replace(case.weights, shared=replace(shared, gate=shared.gate.float())), "expected contiguous bfloat16"),
        (replace(case.weights, bias=torch.zeros(64).double()), "bias is torch.float64, expected torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.mixture(case.x, wrong)
    with pytest.raises(ValueError, match=r"x has shape \[2, 64\], expected \[any, 56\]"):
        kernels.linear(case.x, case.weights.router[:, :56])
    with pytest.raises(ValueError, match="this rank needs 8"):
        CudaFfn(shape, *_other(shape), 3, CPU)


def _other(shape: FfnShape) -> tuple[list[Kernel], dict[str, LoadedKernel]]:
    """Kernels of a rank with more shared columns."""
    planned = [configure(spec).planned() for spec in problems(replace(shape, shared_columns=16), 8, "sm_90a")]
    return planned, cast("dict[str, LoadedKernel]", {kernel.name: None for kernel in planned})


# Each with the case that shows it.
BUGS = [
    (Bug("skinny", "index += C::team;", "index += C::team + 1;"), "wide"),
    (Bug("skinny", "member();\n        fetch();", "0;\n        fetch();"), "wide"),
    (Bug("skinny", "high[word], low[word + 1]", "high[word], low[word]"), "wide"),
    (Bug("skinny", "const bool inside = at < unit.columns;", "const bool inside = at < unit.columns - 8;"), "wide"),
    (Bug("skinny", "half ^= 1", "half ^= 0"), "wide"),
    (Bug("skinny", "unit.x[t] >= 0", "true"), "wide"),
    (Bug("ffn", "if (slot == RoutingFor<C>::kNone) continue;", "if (slot != 0) continue;"), "wide"),
    (Bug("ffn", "gate / (1.0f + expf(-gate))", "gate / (1.0f + expf(gate))"), "wide"),
    (Bug("ffn", "factor = routing.factors[token][slot];", ""), "wide"),
    (Bug("ffn", "if (tile * kTileRows + row < C::hidden)", "if (tile * kTileRows + row + 8 < C::hidden)"), "wide"),
    (Bug("routing", "if (keys[i] > mine)", "if (keys[i] >= mine)"), "ties"),
    (Bug("routing", "__reduce_min_sync", "__reduce_max_sync"), "routing"),
    (Bug("routing", "if (better < C::top_groups) continue;", "if (better <= C::top_groups) continue;"), "routing"),
    (Bug("routing", "rank[group] += score_of(key);", ""), "routing"),
    (Bug("routing", "take(own, expert);", ""), "routing"),
    (Bug("routing", "bias ? scores[i] + bias[expert] : scores[i]", "scores[i]"), "routing"),
    (Bug("routing", "warp_sum(factor) + 1e-20f", "warp_sum(factor) + 1.0f"), "routing"),
    (Bug("routing", "factor *= C::scale;", ""), "routing"),
    (Bug("routing", "scores[i] = expert < C::experts ? logits[expert] : 0.0f;", "scores[i] = logits[0];"), "routing"),
    (Bug("routing", "active[before] = expert;", "active[before] = expert / 2 * 2;"), "routing"),
    (Bug("routing", "first + expert, tokens)", "expert, tokens)"), "routing"),
    (Bug("router", "sum += high_half(a) * high_half(b);", "sum += high_half(a) * low_half(b);"), "wide"),
    (Bug("router", "token * C::experts + expert] = total", "token * C::experts + expert] = sum"), "wide"),
]


def bug_case(name: str, generator: torch.Generator) -> FfnCase:
    """A mixture so wide that a warp has several units a tile; one of many rows, for the routing; or equal scores."""
    if name == "wide":
        return random_case(ffn(V3, 1160, 16, 8, experts=(64, 192)), 3, generator)
    if name == "routing":
        return random_case(ffn(V3, 64, 8, 8, experts=(1, 256)), 16, generator)
    case = random_case(ffn(replace(V3_LITE, correction_bias=False), 64, 16), 2, generator)
    return replace(case, weights=replace(case.weights, router=case.weights.router[:1].repeat(64, 1)))


@pytest.mark.parametrize(("bug", "name"), BUGS, ids=lambda value: str(value))
def test_a_wrong_kernel_is_noticed(
    bug: Bug, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    case = bug_case(name, torch.Generator().manual_seed(seed))
    kernels = cpu_ffn(case.shape, len(case.x), tmp_path, monkeypatch, gpu(seed), planted(tmp_path, [bug]))
    with pytest.raises((AssertionError, KernelFault)):
        check_mixture(kernels.mixture, case)


@pytest.mark.parametrize("name", sorted({name for _, name in BUGS}))
def test_the_right_kernels_pass_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    case = bug_case(name, torch.Generator().manual_seed(seed))
    check_mixture(cpu_ffn(case.shape, len(case.x), tmp_path, monkeypatch, gpu(seed)).mixture, case)
