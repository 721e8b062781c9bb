"""Hopper's own attention kernels against the float64 oracle: lengths, pages, graphs, bits."""

from __future__ import annotations

import math
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from helixc.codegen.build import compile_all, render_all
from helixc.codegen.problem import attention, problems
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ops import DecodeBatch, LayerCache, Partial
from helixc_runtime.ops_cuda import CudaOps
from helixc_runtime.ops_torch import TorchOps
from tests.gpu.append_cases import random_projections
from tests.gpu.kernel_cases import (
    attend_in_double,
    check_partial,
    gqa,
    mla,
    moved,
    random_cache,
    random_case,
    to_double,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

BOUND = 5e-3  # relative Frobenius error of o in bfloat16
SHAPES = {
    **{f"mla h{heads} b{block}": mla(heads, block) for heads in (16, 32, 64, 128) for block in (32, 64)},
    **{
        f"mla h{heads} b{block} fp8": mla(heads, block, kv_dtype="float8_e4m3fn")
        for heads in (16, 32, 64, 128)
        for block in (32, 64)
    },
    "mla h8": mla(8, 64),
    "mla h8 b32 fp8 t2": mla(8, 32, kv_dtype="float8_e4m3fn", query_tokens=2),
    "mla h40 b32": mla(40, 32),
    "mla h72": mla(72, 64),
    "mla h16 t4": mla(16, 64, query_tokens=4),
    "mla h32 b32 t3": mla(32, 32, query_tokens=3),
    "mla h64 t2": mla(64, 64, query_tokens=2),
    "mla h128 b32 t2": mla(128, 32, query_tokens=2),
    "mla h16 b32 fp8 t3": mla(16, 32, kv_dtype="float8_e4m3fn", query_tokens=3),
    "mla h32 fp8 t4": mla(32, 64, kv_dtype="float8_e4m3fn", query_tokens=4),
    "mla h64 b32 fp8 t4": mla(64, 32, kv_dtype="float8_e4m3fn", query_tokens=4),
    "mla h64 fp8 t3": mla(64, 64, kv_dtype="float8_e4m3fn", query_tokens=3),
    "mla h128 fp8 t4": mla(128, 64, kv_dtype="float8_e4m3fn", query_tokens=4),
    "gqa 64,8": gqa(64, 8, 128, 64),
    "gqa 16,1": gqa(16, 1, 128, 64),
    "gqa 10,2 d64 b16": gqa(10, 2, 64, 16),
    "gqa 32,32 b128": gqa(32, 32, 128, 128),
    "gqa 12,4 d64 b32": gqa(12, 4, 64, 32),
    "gqa 8,2 t4": gqa(8, 2, 128, 64, query_tokens=4),
    "gqa 16,4 t2": gqa(16, 4, 128, 64, query_tokens=2),
    "gqa 5,1 d64 b16 t3": gqa(5, 1, 64, 16, query_tokens=3),
    "gqa 64,8 t4, 2 shares": gqa(64, 8, 128, 64, query_tokens=4),
    "gqa 64,8 t3, 2 shares": gqa(64, 8, 128, 64, query_tokens=3),
    "gqa 32,1, 2 shares": gqa(32, 1, 128, 64),
    "gqa 40,2 d64 b16 t3, 6 shares": gqa(40, 2, 64, 16, query_tokens=3),
    "gqa 8,1 fp8 t4, 2 shares": gqa(8, 1, 128, 64, kv_dtype="float8_e4m3fn", query_tokens=4),
    "gqa 21,1 d64 fp8 t4, 6 shares": gqa(21, 1, 64, 64, kv_dtype="float8_e4m3fn", query_tokens=4),
    "gqa 64,8 fp8": gqa(64, 8, 128, 64, kv_dtype="float8_e4m3fn"),
    "gqa 16,1 fp8": gqa(16, 1, 128, 64, kv_dtype="float8_e4m3fn"),
    "gqa 10,2 d64 b16 fp8": gqa(10, 2, 64, 16, kv_dtype="float8_e4m3fn"),
    "gqa 32,32 b256 fp8": gqa(32, 32, 128, 256, kv_dtype="float8_e4m3fn"),
    "gqa 12,4 d64 b32 fp8": gqa(12, 4, 64, 32, kv_dtype="float8_e4m3fn"),
    "gqa 8,2 fp8 t4": gqa(8, 2, 128, 64, kv_dtype="float8_e4m3fn", query_tokens=4),
    "gqa 8,4 fp8 t2": gqa(8, 4, 128, 16, kv_dtype="float8_e4m3fn", query_tokens=2),
    "gqa 5,1 d64 fp8 t3": gqa(5, 1, 64, 64, kv_dtype="float8_e4m3fn", query_tokens=3),
}
ONE_OF_EACH = [  # of the kernels
    mla(64, 64),
    mla(128, 32),
    mla(16, 32, kv_dtype="float8_e4m3fn"),
    mla(64, 64, kv_dtype="float8_e4m3fn", query_tokens=2),
    mla(16, 64, query_tokens=4),
    gqa(64, 8, 128, 64),
    gqa(8, 2, 128, 64, query_tokens=4),
    gqa(64, 8, 128, 64, kv_dtype="float8_e4m3fn"),
    gqa(8, 2, 128, 64, kv_dtype="float8_e4m3fn", query_tokens=4),
    gqa(21, 1, 64, 64, kv_dtype="float8_e4m3fn", query_tokens=4),
]
SANITIZED = (  # by `make sanitize`
    "mla h16 b64",
    "mla h72",
    "mla h16 b32 fp8 t3",
    "gqa 8,2 t4",
    "gqa 32,1, 2 shares",
    "gqa 5,1 d64 fp8 t3",
)
LENGTHS = {
    "hostile": [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 0, 1009],
    "one long": [70_001],
    "ragged": [9_001, 3, 0, 40_000, 129, 2_048],
    "many": [random.Random(5).randrange(0, 700) for _ in range(140)],
    "empty": [0, 0, 0],
}
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifact")


def make_ops(shape: AttentionShape, folder: Path) -> CudaOps:
    """CudaOps with Hopper's kernels; anything else would be a portable kernel under test by mistake."""
    assert "partial" not in {spec.template for spec in attention(shape, "sm_90a")}
    kernels = [c.kernel() for c in compile_all(render_all(problems(shape, 2, "sm_90a")), cache=folder / "kernels")]
    return CudaOps(shape, kernels, folder, DEVICE)


def random_pages(
    shape: AttentionShape, lengths: list[int], generator: torch.Generator, spare: int = 3
) -> tuple[LayerCache, DecodeBatch]:
    """Shuffled pages of random K and V; every token beyond a row's length, and every unused page, is poisoned.

    `lengths` are those of each row's last query token; one before sees as many, or one token less than its next. Beyond
    a row's own pages its page table has unused ones, which rows share.
    """
    rows, width = len(lengths), max(1, -(-max(lengths) // shape.block)) + 1
    limit = torch.tensor(lengths, device=DEVICE)
    used = (torch.arange(width * shape.block, device=DEVICE) < limit.unsqueeze(1)).view(rows, width, shape.block)
    own = used.any(dim=2)  # [rows, width]
    count = int(own.sum())
    order = torch.randperm(count + spare, generator=generator, device=DEVICE)
    table = order[count + torch.randint(0, spare, (rows, width), generator=generator, device=DEVICE)]
    table[own] = order[:count]
    valid = torch.zeros(count + spare, shape.block, dtype=torch.bool, device=DEVICE)
    valid[table[own]] = used[own]
    cache, _ = random_cache(shape, valid, generator)
    steps = torch.randint(0, 2, (rows, shape.query_tokens), generator=generator, device=DEVICE)
    bounds = (limit.unsqueeze(1) - steps.sum(1, keepdim=True) + steps.cumsum(1)).clamp_min(0)
    unused = torch.zeros(0, device=DEVICE)
    return cache, DecodeBatch(unused, unused, table.int(), bounds.flatten().int(), unused, unused)


def random_queries(shape: AttentionShape, rows: int, generator: torch.Generator, gain: float = 1.0) -> torch.Tensor:
    size = (rows * shape.query_tokens, shape.heads, shape.head_dim)
    return (torch.randn(*size, generator=generator, device=DEVICE) * gain).bfloat16()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_the_oracle(shape: AttentionShape, lengths: list[int], folder: Path, seed: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    cache, batch = random_pages(shape, lengths, generator)
    q, ops = random_queries(shape, len(lengths), generator), make_ops(shape, folder)
    first = ops.attend(q, cache, batch)
    check_partial(first, attend_in_double(shape, q, cache, batch), BOUND)
    second = ops.attend(q, cache, batch)
    assert torch.equal(first.o, second.o) and torch.equal(first.lse, second.lse), "two runs differ"


class TwoProcessors:
    """A GPU's properties, but for the number of its multiprocessors."""

    multi_processor_count = 2

    def __init__(self, properties: Any) -> None:
        self._properties = properties

    def __getattr__(self, name: str) -> Any:
        return getattr(self._properties, name)


@pytest.mark.parametrize("name", SANITIZED)
def test_on_two_multiprocessors(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Few short rows whose tiles still go round each ring, over what earlier tiles and results of rows left there."""
    shape, generator = SHAPES[name], torch.Generator(DEVICE).manual_seed(seed)
    properties, lengths = torch.cuda.get_device_properties, [*LENGTHS["hostile"], 0, 700, 30]
    cache, batch = random_pages(shape, lengths, generator)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: TwoProcessors(properties(device)))
    q, ops = random_queries(shape, len(lengths), generator), make_ops(shape, folder)
    check_partial(ops.attend(q, cache, batch), attend_in_double(shape, q, cache, batch), BOUND)


@pytest.mark.parametrize("shape", ONE_OF_EACH, ids=str)
def test_large_scores(shape: AttentionShape, folder: Path, seed: int) -> None:
    """Scores in the thousands: one token takes all the weight, and LSE is as large as the score."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    cache, batch = random_pages(shape, [3000, 77, 0, 640], generator)
    q, ops = random_queries(shape, 4, generator, gain=300.0), make_ops(shape, folder)
    want = TorchOps(shape).attend(q.double(), to_double(cache), batch)
    largest = float(want.lse[want.lse.isfinite()].abs().max())
    assert largest > 1000
    check_partial(ops.attend(q, cache, batch), want, BOUND, lse_bound=1e-3 + 1e-6 * largest)


@pytest.mark.parametrize("shape", ONE_OF_EACH, ids=str)
def test_a_graph_replays_with_other_lengths_and_pages(shape: AttentionShape, folder: Path, seed: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    cases = [[6_000, 0, 77], [64, 65, 5_007], [0, 0, 0], [1, 5_999, 6_000]]
    problems_ = [random_pages(shape, lengths, generator, spare=200 - len(lengths)) for lengths in cases]
    width = max(batch.page_table.shape[1] for _, batch in problems_)
    pages = max(cache.k.shape[0] for cache, _ in problems_)
    ops = make_ops(shape, folder)
    first = problems_[0][0]
    tensors = (first.k, first.v, first.k_scale, first.v_scale)
    k, *rest = (None if t is None else t.new_empty(pages, *t.shape[1:]).zero_() for t in tensors)
    assert k is not None
    cache = LayerCache(k, *rest)
    unused = torch.zeros(0, device=DEVICE)
    table = torch.zeros(3, width, dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(3 * shape.query_tokens, dtype=torch.int32, device=DEVICE)
    batch = DecodeBatch(unused, unused, table, lengths, unused, unused)
    q = random_queries(shape, 3, generator)
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        ops.begin_step(batch)
        ops.attend(q, cache, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        ops.begin_step(batch)
        captured = ops.attend(q, cache, batch)
    for filled, step in problems_:
        for name in ("k", "v", "k_scale", "v_scale"):
            if (new := getattr(filled, name)) is not None:
                getattr(cache, name)[: len(new)] = new
        table[:, : step.page_table.shape[1]] = step.page_table
        lengths.copy_(step.lengths)
        q.copy_(random_queries(shape, 3, generator))
        captured.o.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize(DEVICE)
        want = TorchOps(shape).attend(q.double(), to_double(filled), step)
        check_partial(captured, want, BOUND)


@pytest.mark.parametrize("shape", ONE_OF_EACH, ids=str)
def test_layers_in_a_graph_see_their_new_tokens(shape: AttentionShape, folder: Path, seed: int) -> None:
    """Each layer's kernels may start before the one before has ended; what append writes must be there by then."""
    layers, generator = 3, torch.Generator().manual_seed(seed)
    case = random_case(shape, [9_001, 3, 640, 64, 65, 130, 0, 4_000], DEVICE, seed)
    ops, batch, tokens = make_ops(shape, folder), case.batch, len(case.q)
    caches = [moved(case.cache, DEVICE) for _ in range(layers)]
    news = [random_projections(shape, tokens, DEVICE, generator) for _ in range(layers)]
    done: list[tuple[torch.Tensor, Partial]] = []

    def step() -> None:
        ops.begin_step(batch)
        done.clear()
        for new, cache in zip(news, caches, strict=True):
            q = ops.append(new, cache, batch)
            done.append((q, ops.attend(q, cache, batch)))

    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    for _ in range(5):
        for new, cache in zip(news, caches, strict=True):
            fresh = random_projections(shape, tokens, DEVICE, generator)
            for to, value in ((getattr(new, f.name), getattr(fresh, f.name)) for f in fields(new)):
                if to is not None:
                    to.copy_(value)
            for name in ("k", "v", "k_scale", "v_scale"):
                if (poisoned := getattr(case.cache, name)) is not None:
                    getattr(cache, name).copy_(poisoned)
        graph.replay()
        torch.cuda.synchronize(DEVICE)
        for (q, got), cache in zip(done, caches, strict=True):
            check_partial(got, TorchOps(shape).attend(q.double(), to_double(cache), batch), BOUND)


@pytest.mark.parametrize("query_tokens", [1, 4])
def test_scales_far_apart(query_tokens: int, folder: Path, seed: int) -> None:
    """Queries beyond float16 and keys as small; values of which some are 2^120 times others."""
    shape = gqa(8, 2, 128, 64, kv_dtype="float8_e4m3fn", query_tokens=query_tokens)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    cache, batch = random_pages(shape, [3000, 77, 0, 640], generator)
    assert cache.k_scale is not None and cache.v_scale is not None
    cache.k_scale.sub_(40)
    cache.v_scale.add_(torch.randint(-60, 61, cache.v_scale.shape, generator=generator, device=DEVICE))
    q, ops = random_queries(shape, 4, generator, gain=2.0**40), make_ops(shape, folder)
    want = TorchOps(shape).attend(q.double(), to_double(cache), batch)
    check_partial(ops.attend(q, cache, batch), want, BOUND)


@pytest.mark.parametrize("heads", [16, 128])
def test_mla_scales_far_apart(heads: int, folder: Path, seed: int) -> None:
    """Tokens of which some are 2^120 times others; the weights are all alike, so the largest make the result."""
    shape = mla(heads, 64, kv_dtype="float8_e4m3fn")
    generator = torch.Generator(DEVICE).manual_seed(seed)
    cache, batch = random_pages(shape, [3000, 77, 0, 640], generator)
    assert cache.k_scale is not None
    cache.k_scale.add_(torch.randint(-60, 61, cache.k_scale.shape, generator=generator, device=DEVICE))
    q, ops = random_queries(shape, 4, generator, gain=2.0**-60), make_ops(shape, folder)
    want = TorchOps(shape).attend(q.double(), to_double(cache), batch)
    check_partial(ops.attend(q, cache, batch), want, BOUND)


def test_two_million_tokens_beyond_two_to_the_31_bytes(folder: Path, seed: int) -> None:
    shape = mla(16, 64)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    cache, batch = random_pages(shape, [2_000_003], generator)
    assert cache.k.numel() * 2 > 1 << 31
    q = random_queries(shape, 1, generator)
    got = make_ops(shape, folder).attend(q, cache, batch)
    tokens = cache.k[batch.page_table[0].long()].view(-1, 576)[:2_000_003]
    scores = torch.cat([q[0].double() @ part.double().T for part in tokens.split(1 << 17)], dim=1) * shape.scale
    weights = scores.softmax(-1)
    o = sum(
        w @ part[:, :512].double() for w, part in zip(weights.split(1 << 17, 1), tokens.split(1 << 17), strict=True)
    )
    assert float((got.o[0].double() - o).norm() / o.norm()) <= BOUND
    assert float((got.lse[0].double() - scores.logsumexp(-1)).abs().max()) <= 1e-3
