"""CudaOps with Hopper's kernels on a driver that only records: what is refused, and how it is said."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helixc.codegen.build import render_all
from helixc.codegen.problem import exchange, problems
from helixc_runtime import ops_cuda
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ops import LayerCache
from helixc_runtime.ops_cuda import ARGUMENTS, CudaOps, load_kernel
from tests.driver.stub import Driver
from tests.gpu.kernel_cases import Case, gqa, mla, random_case

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
pytest.importorskip("cuda.bindings")

CPU = torch.device("cpu")
SHAPES = {"mla": mla(16, 32), "mla, values": replace(mla(16, 32), value_dim=128), "gqa": gqa(8, 2, 128, 32)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request: pytest.FixtureRequest) -> AttentionShape:
    assert isinstance(request.param, AttentionShape)
    return request.param


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(tmp_path, monkeypatch)


@pytest.fixture
def ops(shape: AttentionShape, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CudaOps:
    monkeypatch.setattr(ops_cuda, "check_arch", lambda arches, device: "sm_90a")
    (tmp_path / "any.cubin").write_bytes(b"any")
    sources = render_all(problems(shape, 2, "sm_90a"))
    kernels = [replace(source.config.planned(), cubin="any.cubin") for source in sources]
    return CudaOps(shape, kernels, tmp_path, CPU)


@pytest.fixture
def case(shape: AttentionShape) -> Case:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return random_case(shape, [70, 0, 5], CPU, seed)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape, not contiguous."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


Spoil = Callable[[Case], Case]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: replace(c, q=c.q.float()), "q is float32, expected bfloat16"),
        (lambda c: replace(c, q=c.q.to("meta")), "q is on meta, expected cpu"),
        (lambda c: replace(c, q=strided(c.q)), r"q is not contiguous: strides \("),
        (lambda c: replace(c, q=c.q[:2]), "q has 2 tokens, expected 1 for each of 3 rows"),
        (lambda c: replace(c, q=c.q[:, 1:]), r"q has shape \[3, \d+, \d+\], expected \[any, \d+, \d+\]"),
        (lambda c: replace(c, q=c.q[0]), r"q has shape \[\d+, \d+\], expected \[any, \d+, \d+\]"),
        (lambda c: replace(c, cache=replace(c.cache, k=c.cache.k.half())), "cache_k is float16, expected bfloat16"),
        (lambda c: replace(c, cache=replace(c.cache, k=strided(c.cache.k))), "cache_k is not contiguous"),
        (lambda c: replace(c, cache=replace(c.cache, k=c.cache.k[..., 8:])), r"cache.k has shape \["),
        (lambda c: replace(c, cache=shifted(c.cache)), "cache_k does not start at a multiple of 16 bytes"),
        (lambda c: replace(c, batch=replace(c.batch, lengths=c.batch.lengths.long())), "lengths is int64"),
        (lambda c: replace(c, batch=replace(c.batch, lengths=c.batch.lengths[:2])), r"lengths has shape \[2\]"),
        (lambda c: replace(c, batch=replace(c.batch, page_table=strided(c.batch.page_table))), "page_table is not co"),
    ],
)
def test_wrong_arguments_of_attend(spoil: Spoil, message: str, ops: CudaOps, case: Case, driver: Driver) -> None:
    ops.begin_step(case.batch)
    ops.attend(case.q, case.cache, case.batch)
    before, wrong = driver.launches, spoil(case)
    with pytest.raises(ValueError, match=message):
        ops.attend(wrong.q, wrong.cache, wrong.batch)
    assert driver.launches == before


def shifted(cache: LayerCache) -> LayerCache:
    """Pages that start 2 bytes off."""
    memory = torch.zeros(cache.k.numel() + 1, dtype=cache.k.dtype)
    return replace(cache, k=memory[1:].view(cache.k.shape))


def test_a_combine_of_other_columns(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of an exchange in latent space do not serve a rank that exchanges values."""
    monkeypatch.setattr(ops_cuda, "check_arch", lambda arches, device: "sm_90a")
    kernels = [source.config.planned() for source in render_all(problems(SHAPES["mla"], 2, "sm_90a"))]
    with pytest.raises(ValueError, match="combine_cp2_p512_bf16 has partial_dim 512, this rank needs 128"):
        CudaOps(SHAPES["mla, values"], kernels, tmp_path, CPU)


def test_wrong_arguments_of_combine(ops: CudaOps, shape: AttentionShape, driver: Driver) -> None:
    o, lse = torch.zeros(2, 3, 4, shape.exchanged_dim, dtype=torch.bfloat16), torch.zeros(2, 3, 4)
    ops.combine(o, lse)
    before = driver.launches
    for wrong_o, wrong_lse, message in (
        (o.float(), lse, "o is float32, expected bfloat16"),
        (o, lse.bfloat16(), "lse is bfloat16, expected float32"),
        (o, strided(lse), "lse is not contiguous"),
        (o, lse[:, :2], r"lse has shape \[2, 2, 4\], expected \[2, 3, 4\]"),
        (o[..., 8:], lse, r"o has shape \[2, 3, 4, \d+\], expected \[any, any, any, \d+\]"),
        (o.repeat(2, 1, 1, 1)[:3], lse.repeat(2, 1, 1)[:3], r"no kernel combines 3 partials, only \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.combine(wrong_o, wrong_lse)
    assert driver.launches == before


@pytest.mark.parametrize("early", [True, False])
def test_an_exchange_beside_attention_waits_for_its_turn(early: bool, driver: Driver, tmp_path: Path) -> None:
    """Launched early, it would have its thread blocks before the attention that it runs beside."""
    kernel = render_all((exchange(SHAPES["gqa"], 2, "sm_90a"),))[0].config.planned()
    (tmp_path / "any.cubin").write_bytes(b"any")
    loaded = load_kernel(replace(kernel, cubin="any.cubin"), tmp_path, CPU, early=early)
    driver.takes(ARGUMENTS["exchange"])
    loaded.launch((1, 1, 1), *[0] * len(ARGUMENTS["exchange"]))
    assert driver.record.attribute_count == early
