"""Hopper's MLA kernels over FP8 caches and for several query tokens a row, without a GPU (see simt.h)."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import pytest
import torch

from helixc_runtime.attend_cuda import HopperMla
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ops_cuda import CudaOps
from helixc_runtime.quantize import quantize
from tests.gpu.kernel_cases import Case, check_attend, mla, random_case
from tests.simt.bugs import Bug, planted
from tests.simt.cpu_kernel import ASYNCHRONY, Gpu, KernelFault, cpu_ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPU = torch.device("cpu")
BOUND = 5e-3  # relative Frobenius error of o in bfloat16
FP8 = "float8_e4m3fn"
SHAPES = {
    "fp8 h16 b32": mla(16, 32, kv_dtype=FP8),
    "fp8 h32 b64": mla(32, 64, kv_dtype=FP8),
    "fp8 h64 b64": mla(64, 64, kv_dtype=FP8),
    "fp8 h128 b32": mla(128, 32, kv_dtype=FP8),
    "fp8 h16 b64 4 tokens": mla(16, 64, kv_dtype=FP8, query_tokens=4),
    "fp8 h32 b32 3 tokens": mla(32, 32, kv_dtype=FP8, query_tokens=3),  # 64 queries in one block, 32 in the other
    "fp8 h64 b32 4 tokens": mla(64, 32, kv_dtype=FP8, query_tokens=4),  # a team of two clusters of two tokens
    "fp8 h128 b64 2 tokens": mla(128, 64, kv_dtype=FP8, query_tokens=2),
    "fp8 h24 b32 2 tokens": mla(24, 32, kv_dtype=FP8, query_tokens=2),
    "h8 b32 2 tokens": mla(8, 32, query_tokens=2),
    "h16 b32 3 tokens": mla(16, 32, query_tokens=3),
    "h32 b64 3 tokens": mla(32, 64, query_tokens=3),
    "h64 b32 2 tokens": mla(64, 32, query_tokens=2),
    "h64 b64 3 tokens": mla(64, 64, query_tokens=3),  # a team of three thread blocks
    "h64 b32 4 tokens": mla(64, 32, query_tokens=4),
    "h128 b64 2 tokens": mla(128, 64, query_tokens=2),
    "h24 b32 4 tokens": mla(24, 32, query_tokens=4),  # two rows of the schedule for one
}
SMALL = mla(16, 32, kv_dtype=FP8, query_tokens=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps what was built, for all tests."""
    return tmp_path_factory.mktemp("kernels")


def hopper_ops(
    shape: AttentionShape, folder: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu, root: Path | None = None
) -> CudaOps:
    """CudaOps with Hopper's kernels of attend; its other kernels do nothing."""
    ops = cpu_ops(shape, 1, folder, monkeypatch, gpu, root, "sm_90a", idle=("append", "combine"))
    assert isinstance(ops._attends[0], HopperMla)
    return ops


def hostile_case(shape: AttentionShape, seed: int) -> Case:
    """No tokens, ends around pages and tiles; heads of unlike magnitude; query tokens whose bounds are far apart."""
    draw = random.Random(seed)
    lengths = [shape.query_tokens, 0, 1, 33, 64, 129, draw.randint(2, 150), draw.randint(700, 900), 128, 95]
    case = random_case(shape, lengths, CPU, seed, appended=True)
    gains = torch.tensor([2.0 ** draw.randint(-6, 1) for _ in range(shape.heads)], dtype=torch.bfloat16)
    bounds = case.batch.lengths.view(-1, shape.query_tokens)
    for row in range(1, len(lengths), 2):
        earlier = sorted(draw.randint(0, lengths[row]) for _ in range(shape.query_tokens - 1))
        bounds[row, :-1] = torch.tensor([0, *earlier[1:]] if row % 4 == 3 else earlier)[: shape.query_tokens - 1]
    return dataclasses.replace(case, q=case.q * gains.unsqueeze(1))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_any_order_gives_the_oracles_result_and_the_same_bits(
    shape: AttentionShape, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """On GPUs that cut rows into parts, and on one that has more multiprocessors than there are tiles."""
    case, processors, bits = hostile_case(shape, seed), random.Random(seed).choice([2, 5, 9, 80]), set()
    for asynchrony in ASYNCHRONY:
        ops = hopper_ops(shape, folder, monkeypatch, Gpu(processors, seed, asynchrony))
        check_attend(ops, case, BOUND)
        o, lse = ops.attend(case.q, case.cache, case.batch)
        bits.add((o.view(torch.uint8).numpy().tobytes(), lse.numpy().tobytes()))
    assert len(bits) == 1, "the result depends on the order of events"


def test_scales_far_apart(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Tokens of which some are 2^120 times others; the weights are all alike, so the largest make the result."""
    case, ops = hostile_case(SMALL, seed), hopper_ops(SMALL, folder, monkeypatch, Gpu(3, seed, "random"))
    scales, draw = case.cache.k_scale, torch.Generator().manual_seed(seed)
    assert scales is not None
    scales += torch.randint(-60, 61, scales.shape, generator=draw).to(torch.uint8)  # of poisoned tokens any byte
    check_attend(ops, dataclasses.replace(case, q=case.q * 2.0**-60), BOUND)


def test_queries_far_apart(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Heads and columns of a head that float16 holds only with a factor of its own for each head."""
    case, ops = hostile_case(SMALL, seed), hopper_ops(SMALL, folder, monkeypatch, Gpu(3, seed, "random"))
    scales = case.cache.k_scale
    assert scales is not None
    scales -= 40  # of poisoned tokens any byte
    gains = torch.full((SMALL.heads, SMALL.head_dim), 2.0**40, dtype=torch.bfloat16)
    gains[::2] *= 2.0**-60
    gains[:, ::5] *= 2.0**-20
    check_attend(ops, dataclasses.replace(case, q=case.q * gains), BOUND)


def test_all_tokens_zero(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Under the least scale there is."""
    case, ops = hostile_case(SMALL, seed), hopper_ops(SMALL, folder, monkeypatch, Gpu(3, seed, "random"))
    (elements, scale), scales = quantize(torch.zeros(SMALL.head_dim)), case.cache.k_scale
    assert scales is not None
    case.cache.k.view(torch.uint8)[:], scales[:] = elements.view(torch.uint8), scale
    o, lse = ops.attend(case.q, case.cache, case.batch)
    assert not o.any()
    assert (lse - case.batch.lengths.log().unsqueeze(1)).nan_to_num(0.0).abs().max() <= 1e-4


def test_nan_of_a_token_shows(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """It reaches the queries that see the token, and no others."""
    shape = dataclasses.replace(SMALL, query_tokens=1)
    case, draw = random_case(shape, [20, 40, 200], CPU, seed, appended=True), random.Random(seed)
    token, column = torch.ones(shape.head_dim), draw.choice([3, 200, 575])
    token[column] = draw.choice([torch.nan, torch.inf])
    assert case.cache.k_scale is not None
    page = case.batch.page_table[1, 1]
    case.cache.k[page, 7], case.cache.k_scale[page, 7] = quantize(token)  # token 39
    o, lse = hopper_ops(shape, folder, monkeypatch, Gpu(3, seed)).attend(case.q, case.cache, case.batch)
    assert o[1].isnan().all() and lse[1].isnan().all()
    assert not o[[0, 2]].isnan().any() and not lse[[0, 2]].isnan().any()


BUGS = [
    Bug("mla_fp8_softmax", "min(14 + 254 - ", "min(30 + 254 - "),
    Bug("mla_fp8_softmax", "Vector16{{first, second, pairs[1]", "Vector16{{second, first, pairs[1]"),
    Bug("mla_fp8_softmax", "store_shared(queries + gain_offset(query), gain);", "store_shared(queries + 8, gain);"),
    Bug("mla_fp8_softmax", "? load_shared_byte(from + token) : 0;", "? load_shared_byte(from) : 0;"),
    Bug("mla_fp8_softmax", "u8(byte + kLift)", "u8(byte)"),
    Bug("mla_fp8_softmax", "float(int(bits_of(weight[r]) >> 23) - (127 + kLift))", "0.0f"),
    Bug("mla_fp8_softmax", "mla_fp8_mask<C>(s, bounds);", ";"),
    Bug("mla_fp8_softmax", "bounds[t] -= kTileTokens;", ";"),
    Bug("mla_fp8_softmax", "first || softmax.outgrown(s, scales)", "first"),
    Bug("mla_fp8_softmax", "float largest = kLowest;", "float largest = minus_infinity();"),
    Bug("mla_fp8_softmax", "s[i / 2 * 4 + i % 2] -= by;", ""),
    Bug("mla_fp8_softmax", "load_shared(reference) + by", "by"),
    Bug("mla_fp8_softmax", "sum[i] *= factor;", ""),
    Bug("mla_fp8_softmax", "C::row_tokens > 1 && total == 0.0f ? 0.0f : one / total", "one / total"),
    Bug("mla_fp8_softmax", "    mla_fp8_convert_queries<C>(base + M8::q, base + M8::queries);", ""),
    Bug("mla_fp8_softmax", "fence_async_proxy();\n  named_barrier(1, 128);", "named_barrier(1, 128);"),
    Bug("mla_fp8_softmax", "  fence_async_proxy();\n  barrier_arrive(p_full);", "  barrier_arrive(p_full);"),
    Bug("mla_fp8_partial", "3 * 128 * C::cluster", "2 * 128 * C::cluster"),
    Bug("mla_fp8_partial", "M8::p_empty, 256", "M8::p_empty, 128"),
    Bug("mla_fp8_softmax", "if (last || !kHold<C>) mla_fp8_pass_weights(base + M8::p_full, pending);", ""),
    Bug("mla_fp8_softmax", "store_shared(base + M8::moved, u32(moved))", "store_shared(base + M8::moved, u32(first))"),
    Bug("mla_fp8_accumulate", "swap_middle_bytes(words.x[i])", "words.x[i]"),
    Bug("mla_fp8_accumulate", "if (valid < kTileTokens) mla_fp8_clear_tail", "if (false) mla_fp8_clear_tail"),
    Bug("mla_fp8_accumulate", "  fence_async_proxy();  // before", "  // before"),
    Bug("mla_fp8_accumulate", "o[chunk][i / 2 * 4 + i % 2] *= scale;", ""),
    Bug("mla_fp8_accumulate", "half + step > 0 || tile > first_tile", "true"),
    Bug("mla_fp8_accumulate", "mla_release<C>(base + M8::empty(stage.index));", ""),
    Bug("mla_fp8_fetch", "i64(group) * 8, 32", "i64(group) * 4, 32"),
    Bug("mla_fp8_fetch", "min(segment.first_tile + kEarlyTiles<C>, segment.last_tile) - 1", "segment.last_tile"),
    Bug("mla_layout", "C::cluster_tokens + token]", "C::cluster_tokens]"),
    Bug("mla_schedule", "kRowTokens + kRowTokens - 1]", "kRowTokens]"),
    Bug("mla_merge", "return C::row_tokens > 1 && is_minus_infinity(top) ? 0.0f : top;", "return top;"),
]  # fmt: skip


def revealing_case(seed: int) -> Case:
    """From the second tile of a row on, tokens and their scores outgrow those before."""
    case = hostile_case(SMALL, seed)
    assert case.cache.k_scale is not None
    case.cache.k_scale[case.batch.page_table[:, 2:].flatten().long()] += 30
    return dataclasses.replace(case, q=case.q * 2.0**-26)


def test_there_is_no_bug(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    check_attend(hopper_ops(SMALL, folder, monkeypatch, Gpu(3, seed, "random")), revealing_case(seed), BOUND)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_bug_is_noticed(bug: Bug, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    root = planted(tmp_path, [bug])
    ops = hopper_ops(SMALL, folder, monkeypatch, Gpu(3, seed, "random"), root)
    with pytest.raises((AssertionError, KernelFault)):
        check_attend(ops, revealing_case(seed), BOUND)


TEAM_BUGS = [
    Bug("mla_layout", " + int(blockIdx.x) / C::cluster % C::team;", ";"),
    Bug("mla_layout", "/ (C::cluster * C::team)", "/ C::cluster"),
]


@pytest.mark.parametrize("bug", TEAM_BUGS, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", FP8])
def test_a_bug_of_a_team_is_noticed(
    dtype: str, bug: Bug, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    shape = mla(64, 32, kv_dtype=dtype, query_tokens=3)
    ops = hopper_ops(shape, folder, monkeypatch, Gpu(6, seed, "random"), planted(tmp_path, [bug]))
    with pytest.raises((AssertionError, KernelFault)):
        check_attend(ops, hostile_case(shape, seed), BOUND)
