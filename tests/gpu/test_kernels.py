"""The cubins on a GPU of compute capability 9.0 against the float64 oracle."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helixc.codegen.build import compile_all, render_all
from helixc.codegen.problem import KernelSpec, absorb, embed, problems
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.cubin import CubinError, check_arch, device_arch
from helixc_runtime.ops import DecodeBatch, GqaProjections, LayerCache
from helixc_runtime.ops_cuda import CudaOps
from helixc_runtime.ops_torch import TorchOps
from tests.gpu.append_cases import unabsorbed
from tests.gpu.kernel_cases import (
    APPEND_SHAPES,
    check_append,
    check_attend,
    check_combine,
    check_elements,
    check_partial,
    gqa,
    mla,
    random_case,
    relative_error,
)

pytestmark = pytest.mark.gpu

BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
LENGTHS = {
    "short": [0, 1, 3, 4, 5, 31],
    "uneven": [0, 63, 64, 65, 130, 0, 257],
    "one": [777],
    "empty": [0, 0, 0],
}
SHAPES = {
    "deepseek-v3 tp1": mla(128, 32),
    "deepseek-v3 tp2": mla(64, 64),
    "deepseek-v3 tp8": mla(16, 4),
    "deepseek-v3 float32": mla(16, 32, "float32"),
    "deepseek-v3 float16": mla(16, 32, "float16"),
    "llama-3.1-70b tp1": gqa(64, 8, 128, 32),
    "llama-3.1-70b tp2": gqa(32, 4, 128, 64),
    "llama-3.1-70b tp8": gqa(8, 1, 128, 4),
    "qwen3-8b": gqa(32, 8, 128, 32, "float16"),
    "qwen3-235b": gqa(64, 4, 128, 32),
    "smollm2": gqa(9, 3, 64, 32, "float32"),
    "nine heads": gqa(9, 3, 64, 4),
    "thirteen heads": gqa(13, 1, 72, 64),
    "one head": gqa(1, 1, 256, 32),
}


FP8_OR_TOKENS = {
    "deepseek-v3 tp2 fp8": mla(64, 64, kv_dtype="float8_e4m3fn"),
    "deepseek-v3 tp1 fp8, 4 tokens": mla(128, 32, kv_dtype="float8_e4m3fn", query_tokens=4),
    "deepseek-v3 tp8, 2 tokens": mla(16, 4, query_tokens=2),
    "deepseek-v3 float32, fp8, 3 tokens": mla(16, 4, "float32", kv_dtype="float8_e4m3fn", query_tokens=3),
    "llama-3.1-70b tp1 fp8": gqa(64, 8, 128, 32, kv_dtype="float8_e4m3fn"),
    "llama-3.1-70b tp2 fp8, 2 tokens": gqa(32, 4, 128, 64, kv_dtype="float8_e4m3fn", query_tokens=2),
    "qwen3-8b, 3 tokens": gqa(32, 8, 128, 32, "float16", query_tokens=3),
    "smollm2 fp8, 4 tokens": gqa(9, 3, 64, 4, "float32", kv_dtype="float8_e4m3fn", query_tokens=4),
    "thirteen heads fp8": gqa(13, 1, 72, 64, kv_dtype="float8_e4m3fn"),
    "two hundred columns": gqa(4, 2, 200, 4, "float16", kv_dtype="float8_e4m3fn", query_tokens=2),
}


@pytest.fixture(scope="module")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifact")


def build(
    shape: AttentionShape, cp: int, folder: Path, device: torch.device, more: Sequence[KernelSpec] = ()
) -> CudaOps:
    """CudaOps from freshly compiled cubins, laid out as in an artifact."""
    sources = render_all((*problems(shape, cp, device_arch(device)), *more))
    kernels = [cubin.kernel() for cubin in compile_all(sources, cache=folder / "kernels")]
    return CudaOps(shape, kernels, folder, device)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_append_and_attend(
    shape: AttentionShape, lengths: list[int], folder: Path, device: torch.device, seed: int
) -> None:
    ops, case = build(shape, 2, folder, device), random_case(shape, lengths, device, seed)
    check_append(ops, case, BOUNDS[shape.dtype])
    check_attend(ops, case, BOUNDS[shape.dtype])


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("shape", APPEND_SHAPES.values(), ids=APPEND_SHAPES.keys())
def test_append(shape: AttentionShape, rows: int, folder: Path, device: torch.device, seed: int) -> None:
    pick = random.Random(seed)
    case = random_case(shape, [pick.randint(0, 9) for _ in range(rows)], device, seed)
    check_append(build(shape, 2, folder, device), case, BOUNDS[shape.dtype])


@pytest.mark.parametrize("hidden", [2048, 7168])
def test_embed(hidden: int, folder: Path, device: torch.device, seed: int) -> None:
    generator = torch.Generator(device).manual_seed(seed)
    shape = gqa(64, 8, 128, 64)
    ops = build(shape, 1, folder, device, [embed(hidden, "bfloat16", device_arch(device))])
    table = torch.randn(1000, hidden, generator=generator, device=device).bfloat16()
    tokens = torch.randint(5000, (64,), generator=generator, device=device)
    tokens[:4] = torch.tensor([2000, 2999, 1999, 3000])
    assert torch.equal(ops.embed(tokens, table, 2000), TorchOps(shape).embed(tokens, table, 2000))


@pytest.mark.parametrize("tokens", [1, 8, 13, 40])
@pytest.mark.parametrize(
    ("shape", "nope"),
    [(mla(16, 64), 128), (mla(128, 32, kv_dtype="float8_e4m3fn"), 128), (mla(8, 4), 200)],
    ids=("deepseek-v3-lite", "deepseek-v3 fp8", "two units of columns"),
)
def test_absorb(shape: AttentionShape, nope: int, tokens: int, folder: Path, device: torch.device, seed: int) -> None:
    """Few tokens, which one launch serves, and more."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    case = random_case(shape, [pick.randint(0, 9) for _ in range(tokens)], device, seed)
    case = replace(case, new=unabsorbed(case.new, nope, generator))
    ops = build(shape, 2, folder, device, absorb(shape, nope, 16, device_arch(device)))
    check_append(ops, case, BOUNDS[shape.dtype])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("shape", FP8_OR_TOKENS.values(), ids=FP8_OR_TOKENS.keys())
def test_attend_fp8_and_query_tokens(
    shape: AttentionShape, lengths: list[int], folder: Path, device: torch.device, seed: int
) -> None:
    ops, case = build(shape, 1, folder, device), random_case(shape, lengths, device, seed, appended=True)
    check_attend(ops, case, BOUNDS[shape.dtype])


def test_every_fp8_element_is_read_exactly(folder: Path, device: torch.device) -> None:
    shape = gqa(1, 1, 256, 4, "float32", kv_dtype="float8_e4m3fn")
    check_elements(build(shape, 1, folder, device), shape, device)


@pytest.mark.parametrize("cp", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_combine(shape: AttentionShape, cp: int, folder: Path, device: torch.device, seed: int) -> None:
    check_combine(build(shape, cp, folder, device), shape, cp, device, seed, BOUNDS[shape.dtype])


def test_a_long_context_uses_many_splits(folder: Path, device: torch.device, seed: int) -> None:
    shape = gqa(8, 1, 128, 32)
    ops, case = build(shape, 2, folder, device), random_case(shape, [20_001, 17], device, seed)
    check_append(ops, case, 1e-2)
    check_attend(ops, case, 1e-2)


def test_pages_beyond_two_to_the_31_elements(folder: Path, device: torch.device, seed: int) -> None:
    shape = mla(16, 64)
    small = random_case(shape, [100, 70], device, seed)
    pages = (1 << 31) // (64 * 576) + 64
    k = torch.full((pages, 64, 576), torch.nan, dtype=torch.bfloat16, device=device)
    used = small.cache.k.shape[0]
    k[-used:] = small.cache.k
    small_batch, shift = small.batch, pages - used
    batch = DecodeBatch(
        small_batch.cos,
        small_batch.sin,
        small_batch.page_table + shift,
        small_batch.lengths,
        small_batch.owned,
        small_batch.slots + shift * 64,
    )
    ops, oracle = build(shape, 2, folder, device), TorchOps(shape)
    rotated = ops.append(small.new, LayerCache(k, None), batch)
    expected = oracle.append(small.new, small.cache, small_batch)
    assert relative_error(rotated, expected) <= 1e-2
    got = ops.attend(rotated, LayerCache(k, None), batch)
    wide = LayerCache(small.cache.k.double(), None)
    check_partial(got, oracle.attend(rotated.double(), wide, small_batch), 1e-2)


def test_combine_beyond_two_to_the_31_elements(folder: Path, device: torch.device, seed: int) -> None:
    shape, cp, heads = mla(128, 32), 64, 2
    rows = (1 << 31) // (cp * heads * 512) + 50
    generator = torch.Generator(device).manual_seed(seed)
    o = torch.randn(cp, rows, heads, 512, dtype=torch.bfloat16, device=device, generator=generator)
    lse = torch.randn(cp, rows, heads, device=device, generator=generator)
    got = build(shape, cp, folder, device).combine(o, lse)
    last = slice(rows - 40, rows)
    want = TorchOps(shape).combine(o[:, last].double(), lse[:, last].double())
    assert relative_error(got.o[last], want.o) <= 1e-2
    assert float((got.lse[last] - want.lse).abs().max()) <= 1e-3


def test_a_captured_graph_replays_the_launches(folder: Path, device: torch.device, seed: int) -> None:
    shape = gqa(8, 2, 128, 32)
    ops, case = build(shape, 2, folder, device), random_case(shape, [50, 0, 9], device, seed)
    ops.append(case.new, case.cache, case.batch)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        ops.attend(case.q, case.cache, case.batch)  # allocations before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = ops.attend(case.q, case.cache, case.batch)
    case.q.copy_(torch.randn_like(case.q))
    graph.replay()
    torch.cuda.synchronize(device)
    direct = ops.attend(case.q, case.cache, case.batch)
    assert torch.equal(captured.o, direct.o) and torch.equal(captured.lse, direct.lse)


def test_no_rows(folder: Path, device: torch.device) -> None:
    shape = gqa(8, 2, 128, 32)
    ops, case = build(shape, 2, folder, device), random_case(shape, [5], device, 0)
    b = case.batch
    none = DecodeBatch(b.cos[:0], b.sin[:0], b.page_table[:0], b.lengths[:0], b.owned[:0], b.slots[:0])
    assert isinstance(case.new, GqaProjections)
    new = GqaProjections(case.new.q[:0], case.new.k[:0], case.new.v[:0])
    assert ops.append(new, case.cache, none).shape == (0, 8, 128)
    assert ops.attend(case.q[:0], case.cache, none).lse.shape == (0, 8)


def test_wrong_arguments_are_refused(folder: Path, device: torch.device, seed: int) -> None:
    shape = gqa(8, 2, 128, 32)
    ops, case = build(shape, 2, folder, device), random_case(shape, [5, 6], device, seed)
    with pytest.raises(ValueError, match="q is float32, expected bfloat16"):
        ops.attend(case.q.float(), case.cache, case.batch)
    with pytest.raises(ValueError, match="q is on cpu"):
        ops.attend(case.q.cpu(), case.cache, case.batch)
    with pytest.raises(ValueError, match="q is not contiguous"):
        ops.attend(case.q.transpose(1, 2).contiguous().transpose(1, 2), case.cache, case.batch)
    with pytest.raises(ValueError, match="no kernel combines 5 partials"):
        ops.combine(torch.zeros(5, 1, 8, 128, dtype=case.q.dtype, device=device), torch.zeros(5, 1, 8, device=device))


def test_another_architecture_is_refused(device: torch.device) -> None:
    with pytest.raises(CubinError, match=r"compiled for sm_100a, .* compute capability 9.0: .* --arch sm_90a"):
        check_arch(["sm_100a"], device)
