"""Hopper's GQA kernels over FP8 caches and for several query tokens a row, without a GPU (see simt.h)."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import pytest
import torch

from helixc_runtime.attend_cuda import HopperGqa
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ops_cuda import CudaOps
from tests.gpu.kernel_cases import Case, check_attend, gqa, random_case
from tests.simt.bugs import Bug, planted
from tests.simt.cpu_kernel import ASYNCHRONY, Gpu, KernelFault, cpu_ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPU = torch.device("cpu")
BOUND = 5e-3  # relative Frobenius error of o in bfloat16
FP8 = "float8_e4m3fn"
SHAPES = {
    "fp8 2,2 d64 b16": gqa(2, 2, 64, 16, kv_dtype=FP8),
    "fp8 8,1 d128 b64": gqa(8, 1, 128, 64, kv_dtype=FP8),
    "fp8 16,1 d128 b16": gqa(16, 1, 128, 16, kv_dtype=FP8),
    "fp8 10,2 d64 b256": gqa(10, 2, 64, 256, kv_dtype=FP8),
    "fp8 8,2 d128 b32 4 tokens": gqa(8, 2, 128, 32, kv_dtype=FP8, query_tokens=4),
    "fp8 1,1 d64 b64 3 tokens": gqa(1, 1, 64, 64, kv_dtype=FP8, query_tokens=3),
    "fp8 6,2 d128 b128 2 tokens": gqa(6, 2, 128, 128, kv_dtype=FP8, query_tokens=2),
    "8,2 d128 b64 2 tokens": gqa(8, 2, 128, 64, query_tokens=2),
    "5,1 d64 b16 3 tokens": gqa(5, 1, 64, 16, query_tokens=3),
    "4,2 d64 b128 4 tokens": gqa(4, 2, 64, 128, query_tokens=4),
    # More queries than a thread block takes: shares of query tokens, of heads, and of both.
    "8,1 d128 b64 4 tokens": gqa(8, 1, 128, 64, query_tokens=4),
    "16,2 d64 b64 4 tokens": gqa(16, 2, 64, 64, query_tokens=4),
    "40,2 d64 b16": gqa(40, 2, 64, 16),
    "8,1 d64 b64 3 tokens": gqa(8, 1, 64, 64, query_tokens=3),  # shares of two tokens and of one
    "24,1 d64 b32 2 tokens": gqa(24, 1, 64, 32, query_tokens=2),
    "fp8 32,1 d128 b64": gqa(32, 1, 128, 64, kv_dtype=FP8),
    "fp8 40,2 d64 b64 3 tokens": gqa(40, 2, 64, 64, kv_dtype=FP8, query_tokens=3),
}
SMALL = gqa(2, 1, 64, 16, kv_dtype=FP8, query_tokens=4)


def hopper_ops(
    shape: AttentionShape, folder: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu, root: Path | None = None
) -> CudaOps:
    """CudaOps with Hopper's kernels of attend; its other kernels do nothing."""
    ops = cpu_ops(shape, 1, folder, monkeypatch, gpu, root, "sm_90a", idle=("append", "combine"))
    assert isinstance(ops._attends[0], HopperGqa)
    return ops


def hostile_case(shape: AttentionShape, seed: int) -> Case:
    """No tokens, ends around pages and tiles; heads of unlike magnitude; query tokens whose bounds are far apart."""
    draw = random.Random(seed)
    lengths = [0, 1, 31, 32, 64, 129, draw.randint(2, 150), draw.randint(260, 520), 128, 17]
    case = random_case(shape, lengths, CPU, seed, appended=True)
    gains = torch.tensor([2.0 ** -(head % 4) for head in range(shape.heads)], dtype=torch.bfloat16)
    bounds = case.batch.lengths.view(-1, shape.query_tokens)
    for row in range(0, len(lengths), 2):
        bounds[row, :-1] = torch.tensor(sorted(draw.randint(0, lengths[row]) for _ in range(shape.query_tokens - 1)))
        bounds[row, : min(row // 2 % 2, shape.query_tokens - 1)] = 0
    return dataclasses.replace(case, q=case.q * gains.unsqueeze(1))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_any_order_gives_the_oracles_result_and_the_same_bits(
    shape: AttentionShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """On GPUs that cut rows into parts, and on one that has more multiprocessors than there are tiles."""
    case, processors, bits = hostile_case(shape, seed), random.Random(seed).choice([1, 3, 7, 60]), set()
    for asynchrony in ASYNCHRONY:
        ops = hopper_ops(shape, tmp_path, monkeypatch, Gpu(processors, seed, asynchrony))
        check_attend(ops, case, BOUND)
        o, lse = ops.attend(case.q, case.cache, case.batch)
        bits.add((o.view(torch.uint8).numpy().tobytes(), lse.numpy().tobytes()))
    assert len(bits) == 1, "the result depends on the order of events"


def test_scales_far_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Queries beyond float16 and keys as small; values of which some are 2^120 times others."""
    case, ops = hostile_case(SMALL, seed), hopper_ops(SMALL, tmp_path, monkeypatch, Gpu(3, seed, "random"))
    k_scale, v_scale = case.cache.k_scale, case.cache.v_scale
    assert k_scale is not None and v_scale is not None
    k_scale -= 40  # of poisoned tokens any byte is as good
    v_scale += torch.randint(-60, 61, v_scale.shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    check_attend(ops, dataclasses.replace(case, q=case.q * 2.0**40), BOUND)


def test_nan_of_a_token_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """It reaches the queries that see the token, in V only at its column, and no others."""
    shape = dataclasses.replace(SMALL, query_tokens=1)
    case = random_case(shape, [20, 40, 200], CPU, seed, appended=True)
    assert case.cache.v is not None
    nan = torch.tensor(torch.nan).to(torch.float8_e4m3fn)
    case.cache.k[case.batch.page_table[0, 1], 0, 3, 7] = nan  # token 19
    case.cache.v[case.batch.page_table[1, 2], 0, 7, 9] = nan  # token 39
    o, lse = hopper_ops(shape, tmp_path, monkeypatch, Gpu(3, seed)).attend(case.q, case.cache, case.batch)
    assert o[0].isnan().all() and lse[0].isnan().all()
    assert o[1, :, 9].isnan().all() and int(o[1].isnan().sum()) == shape.heads
    assert not o[2].isnan().any() and not lse[1:].isnan().any()


BUGS = [
    Bug("gqa_fp8_state", "k_scale[i] = scale_to_float(at[0])", "k_scale[i] = 1.0f"),
    Bug("gqa_fp8_state", "v_scale[i] = float(at[C::tile])", "v_scale[i] = float(at[0])"),
    Bug("gqa_fp8_state", "bounds.admit(j, lane / 4 + i * 8, valid)", "lane / 4 + i * 8 < valid"),
    Bug("gqa_fp8_state", "min(14 + 254 - ", "min(30 + 254 - "),
    Bug("gqa_fp8_state", "inverse, (lane % 4 * 2 + i) * 4)", "inverse, lane % 4 * 2 + i)"),
    Bug("gqa_fp8_state", "swap_middle_bytes(values[half][step / 2].x[step % 2 * 2]);", "values[half][step / 2].x[0];"),
    Bug("gqa_fp8_state", "o[step][i] *= rescale[i % 2]", "o[step][i] *= 1.0f"),
    Bug("gqa_fp8_state", "sum[j] *= exp2_approximate(lane_largest[j] - of_lane);", ""),
    Bug("gqa_fp8_state", "total *= exp2_approximate(lane_largest[i] - most);", ""),
    Bug("gqa_fp8_state", "lane_largest[i] = kLowest", "lane_largest[i] = minus_infinity()"),
    Bug("gqa_fp8_state", "(token / Tile::line_tokens % 8)", "0"),
    Bug("gqa_fp8_state", "if (valid < Tile::slice_tokens) clear_values", "if (false) clear_values"),
    Bug("gqa_fp8_state", "valid_bits(i * 8 + lane % 4 * 2, valid)", "valid_bits(i * 8 + lane / 4, valid)"),
    Bug("gqa_partial", "(C::fp8 ? Tile::page_rows : 0)", "0"),
    Bug("gqa_partial", "args.k_scale + from", "args.v_scale + from"),
    Bug("gqa_partial", "to + C::tile, args.v_scale", "to, args.v_scale"),
    Bug("gqa_tile", "behind[i] = length - args.lengths[row * C::query_tokens + token]", "behind[i] = 0"),
    Bug("gqa_merge", "if (sum == 0.0f) return 0.0f;", ""),
    Bug("gqa_merge", "(C::kv_heads * C::group) + column % C::share_heads", "C::group + column % C::share_heads"),
    Bug("work_split", "C::query_tokens + C::query_tokens - 1]", "C::query_tokens]"),
]  # fmt: skip


BUGS_OF_SHARES = [
    Bug("gqa_merge", "% kHeadShares<C> * C::share_heads;", "% kHeadShares<C>;"),
    Bug("gqa_merge", "/ kHeadShares<C> * C::share_tokens;", "/ kHeadShares<C>;"),
    Bug("gqa_merge", "2 * (worker * kShares<C> + share_of_block<C>())", "2 * worker"),
    Bug("gqa_partial", "worker_of_block<C>() * kScheduleWords", "worker_of_block<C>() / 2 * kScheduleWords"),
    Bug("gqa_tile", "int token = first_token_of_share<C>() + of_share;", "int token = of_share;"),
    Bug("gqa_partial", "C::kv_heads * C::group * C::query_tokens;", "C::kv_heads * kQueries<C>;"),
    # Of the two blocks that share their copies.
    Bug("gqa_partial", "Tile::threads * C::cluster", "Tile::threads"),
    Bug(
        "gqa_partial",
        "for (u32 rank = 0; rank < C::cluster; ++rank) barrier_arrive_cluster(shared_address(empty), rank);",
        "barrier_arrive(empty);",
    ),
    Bug("gqa_partial", "mine == 0 ? k_map : v_map", "k_map"),
    Bug("gqa_partial", "pending < C::stages", "pending < 0"),
]

BUGS_OF_WARPS = [  # of one eight of the queries each
    Bug("gqa_state", "const int column = eight * 8 + lane / 4;", "const int column = lane / 4;"),
    Bug("gqa_state", "const int column = eight * 8 + lane % 4 * 2 + i;", "const int column = lane % 4 * 2 + i;"),
    Bug("gqa_tile", "min((eight * 8 + lane % 4 * 2 + i) /", "min((lane % 4 * 2 + i) /"),
    Bug("gqa_merge", "warp < warps; warp += stride)", "warp < 2 * stride; warp += stride)"),
    Bug("gqa_state", "if (valid < 16) clear_values", "if (false) clear_values"),
    Bug("gqa_state", "valid_bits(i / 2 * 8 + lane % 4 * 2, valid)", "valid_bits(i % 2 * 8 + lane % 4 * 2, valid)"),
]

BUG_OF_UNEVEN_SHARES = Bug("gqa_merge", "C::share_heads < C::query_tokens;", "C::share_heads < C::query_tokens - 1;")


@pytest.mark.parametrize(
    ("shape", "processors", "bug"),
    [(dataclasses.replace(SMALL, heads=4, kv_heads=2), 3, bug) for bug in BUGS]
    + [(gqa(21, 1, 64, 64, kv_dtype=FP8, query_tokens=4), 20, bug) for bug in BUGS_OF_SHARES]
    + [(gqa(6, 1, 64, 32, query_tokens=2), 60, bug) for bug in BUGS_OF_WARPS]
    + [(gqa(8, 1, 64, 64, query_tokens=3), 4, BUG_OF_UNEVEN_SHARES)],
    ids=str,
)
def test_a_bug_is_noticed(
    shape: AttentionShape, processors: int, bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    case, root = hostile_case(shape, seed), planted(tmp_path, [bug])
    for asynchrony in (*ASYNCHRONY, "random", "random", "random"):
        ops = hopper_ops(shape, tmp_path, monkeypatch, Gpu(processors, seed, asynchrony), root)
        try:
            check_attend(ops, case, BOUND)
        except (AssertionError, KernelFault) as error:
            print(error)
            return
    pytest.fail("the kernels passed")
