"""The FFN's and the projections' kernels on a GPU against the float64 oracle; in a graph, with other tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helixc.codegen.build import compile_all, render_all
from helixc.codegen.problem import ffn as problems
from helixc_runtime.cubin import device_arch
from helixc_runtime.ffn_cuda import CudaFfn
from helixc_runtime.ffn_shape import FfnShape
from helixc_runtime.ops_cuda import load_kernel
from tests.gpu.ffn_cases import (
    QWEN3,
    V2,
    V3,
    V3_LITE,
    check_linear,
    check_mixture,
    check_mlp,
    check_rows,
    ffn,
    random_case,
    random_mlp,
    want_mixture,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = torch.device("cuda", 0)
MIXTURES = {
    "v3-lite, tp 2": ffn(V3_LITE, 2048, 704, 1408),
    "v3-lite, ep 2": ffn(V3_LITE, 2048, 1408, 1408, experts=(32, 64)),
    "v3, ep 32": ffn(V3, 7168, 2048, 64, experts=(64, 72)),
    "v2, odd widths": ffn(V2, 1032, 72, 40),
    "qwen3, tp 8": ffn(QWEN3, 4096, 96),
    "few experts": ffn(replace(QWEN3, experts=5, top_k=2), 576, 136, 24),
}
LINEARS = [(3648, 2048), (16, 512, 128), (8, 128, 512), (2048, 1024), (51200, 2048), (9, 40), (3, 20, 264)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifact")


def make_ffn(shape: FfnShape, folder: Path) -> CudaFfn:
    """The kernels of `shape`, and torch's way forbidden."""
    arch = device_arch(DEVICE)
    kernels = [c.kernel() for c in compile_all(render_all(problems(shape, 16, arch)), cache=folder / "kernels")]
    loaded = {kernel.name: load_kernel(kernel, folder, DEVICE) for kernel in kernels}
    return CudaFfn(shape, kernels, loaded, torch.cuda.get_device_properties(DEVICE).multi_processor_count, DEVICE)


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> torch.Tensor:
        raise AssertionError("torch ran in place of the kernels")

    for name in ("mix", "gated_mlp", "linear"):
        monkeypatch.setattr(f"helixc_runtime.ffn_cuda.{name}", never)


@pytest.mark.parametrize("shape", MIXTURES.values(), ids=MIXTURES.keys())
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_mixtures(shape: FfnShape, rows: int, folder: Path, seed: int) -> None:
    case = random_case(shape, rows, torch.Generator(DEVICE).manual_seed(seed))
    check_mixture(make_ffn(shape, folder).mixture, case)


@pytest.mark.parametrize("rows", [1, 8, 13])
def test_a_dense_mlp(rows: int, folder: Path, seed: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    kernels = make_ffn(ffn(None, 2048, dense=5472), folder)
    x = torch.randn(rows, 2048, generator=generator, device=DEVICE).bfloat16()
    check_mlp(kernels.mlp, x, random_mlp(2048, 5472, generator))


@pytest.mark.parametrize("size", LINEARS, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_projections(size: tuple[int, ...], rows: int, folder: Path, seed: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    kernels = make_ffn(ffn(None, 64), folder)
    weight = (torch.randn(*size, generator=generator, device=DEVICE) * size[-1] ** -0.5).bfloat16()
    wide = torch.randn(rows, *size[:-2], size[-1] + 16, generator=generator, device=DEVICE).bfloat16()
    check_linear(kernels.linear, wide[..., 8:-8], weight)


def test_a_graph_replays_with_other_tokens(folder: Path, seed: int) -> None:
    """A chain of calls, each on the result of the last: what one kernel reads too soon of another is seen."""
    shape = MIXTURES["v3-lite, tp 2"]
    generator = torch.Generator(DEVICE).manual_seed(seed)
    kernels, case = make_ffn(shape, folder), random_case(shape, 8, generator)
    x = case.x.clone()
    kernels.mixture(x, case.weights)
    graph, results = torch.cuda.CUDAGraph(), []
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        given = x
        for _ in range(6):
            results.append((given, kernels.mixture(given, case.weights)))
            given = results[-1][1]
    for _ in range(20):
        x.copy_(torch.randn(x.shape, generator=generator, device=DEVICE))
        graph.replay()
        torch.cuda.synchronize()
        eager = [kernels.mixture(given, case.weights) for given, _ in results]
        assert all(torch.equal(got, want) for (_, got), want in zip(results, eager, strict=True))
    x.copy_(case.x)
    graph.replay()
    check_rows(results[0][1], want_mixture(case))
