"""Hopper's attention kernels without a GPU: their own source, with its clusters, copies and products, on one CPU core.

What a kernel must not rely on (the order of warps, when copies and products are done, what fresh shared memory holds)
is drawn from the seed, or chosen against it: see simt.h.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import pytest
import torch

from helixc_runtime.attend_cuda import HopperGqa
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.cubin import CubinError
from helixc_runtime.ops_cuda import CudaOps
from helixc_runtime.ops_torch import TorchOps
from helixc_runtime.tensor_map import tensor_map
from tests.gpu.kernel_cases import Case, check_attend, check_partial, gqa, mla, random_case, to_double
from tests.simt.bugs import Bug, planted
from tests.simt.cpu_kernel import ASYNCHRONY, Gpu, KernelFault, cpu_ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPU = torch.device("cpu")
BOUND = 5e-3  # relative Frobenius error of o in bfloat16
# Shapes, and multiprocessors: fewer than there are rows, so that rows are cut and merged, and more than there is work.
SHAPES = {
    "mla h8 b64": (mla(8, 64), 3),
    "mla h16 b64": (mla(16, 64), 4),
    "mla h64 b32": (mla(64, 32), 15),
    "mla h72 b64": (mla(72, 64), 3),  # 64 queries in one block, 8 in the other
    "mla h128 b32": (mla(128, 32), 4),
    "mla h128 b64": (mla(128, 64), 6),
    "gqa 2,2 d64 b16": (gqa(2, 2, 64, 16), 5),
    "gqa 16,2 d64 b64": (gqa(16, 2, 64, 64), 4),
    "gqa 16,1 d128 b16": (gqa(16, 1, 128, 16), 3),
    "gqa 8,1 d128 b64": (gqa(8, 1, 128, 64), 12),
}


def hopper_ops(
    shape: AttentionShape, folder: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu, root: Path | None = None
) -> CudaOps:
    return cpu_ops(shape, 2, folder, monkeypatch, gpu, root, arch="sm_90a")


def lengths_of(name: str, seed: int) -> list[int]:
    draw = random.Random(seed).randrange
    return {
        "hostile": [0, 1, 63, 64, 65, 129, 0, 16],
        "one long": [draw(600, 900)],
        "many": [draw(0, 140) for _ in range(13)],
        "empty": [0, 0, 0],
    }[name]


@pytest.mark.parametrize("lengths", ["hostile", "one long", "many", "empty"])
@pytest.mark.parametrize(("shape", "processors"), SHAPES.values(), ids=SHAPES.keys())
def test_any_order_gives_the_oracles_result_and_the_same_bits(
    shape: AttentionShape,
    processors: int,
    lengths: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    case = random_case(shape, lengths_of(lengths, seed), CPU, seed)
    _store_new_tokens(case, seed)
    want = TorchOps(shape).attend(case.q.double(), to_double(case.cache), case.batch)
    bits = set()
    for number, asynchrony in enumerate(ASYNCHRONY):
        gpu = Gpu(processors, seed + number, asynchrony)
        ops = hopper_ops(shape, tmp_path, monkeypatch, gpu)
        o, lse = got = ops.attend(case.q, case.cache, case.batch)
        check_partial(got, want, BOUND)
        bits.add((o.view(torch.uint8).numpy().tobytes(), lse.numpy().tobytes()))
    assert len(bits) == 1, "the result depends on the order of events"


@pytest.mark.parametrize("name", ["mla h16 b64", "mla h128 b32", "gqa 16,2 d64 b64"])
def test_steps_share_the_workspace(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """As a captured graph does: the same buffers and the same launches, with the lengths and pages of each step."""
    shape, processors = SHAPES[name]
    ops = hopper_ops(shape, tmp_path, monkeypatch, Gpu(processors, seed, "random"))
    steps = [[500, 0, 77], [64, 65, 407], [0, 0, 0], [1, 499, 500], [130, 131, 129]]
    shared = random_case(shape, [500, 500, 500], CPU, seed)  # as many pages as any step has
    for number, lengths in enumerate(steps):
        step = random_case(shape, lengths, CPU, seed + number)
        _store_new_tokens(step, seed)
        width = step.batch.page_table.shape[1]
        shared.batch.page_table[:, :width] = step.batch.page_table
        shared.batch.lengths.copy_(step.batch.lengths)
        shared.q.copy_(step.q)
        for to, source in ((shared.cache.k, step.cache.k), (shared.cache.v, step.cache.v)):
            if to is not None and source is not None:
                to.fill_(torch.nan)[: len(source)] = source
        ops.begin_step(shared.batch)
        for _ in range(2):  # layers
            check_attend(ops, shared, BOUND)
        if isinstance(ops._attends[0], HopperGqa):
            for part in (ops._attends[0].part_o, ops._attends[0].part_lse):
                assert (part.view(torch.int32) == -(1 << 31)).all(), "a word of the parts is not -0.0 again"


MLA_BUGS = [
    # Barriers: waits that are missing, at the wrong phase, or for the wrong number of bytes.
    Bug("mla_softmax", "barrier_wait(base + M::full(stage, region), stage.parity_of(region));", ""),
    Bug("mla_softmax", "barrier_wait(base + M::full(stage, region), stage.parity);", ""),
    Bug("mla_accumulate", "barrier_wait(base + M::p_full(stage), stage.parity);", ""),
    Bug("mla_fetch", "barrier_wait(empty, stage.parity_of(region) ^ 1);", ""),
    Bug("mla_fetch", "M::empty(stage, region), stage.parity ^ 1);", "M::empty(stage, region), stage.parity);"),
    Bug("mla_fetch", "if (!held) barrier_wait(base + M::q_empty, ~number & 1);", ""),
    Bug("mla_fetch", "barrier_expect(full, copies * bytes);", "barrier_expect(full, 2 * bytes);"),
    Bug("mla_fetch", "u32(end - first) * (query_groups<C> * 1024)", "u32(end - first) * M::kChunk"),
    Bug("mla_fetch", "u32(first) + opaque(threadIdx.x)", "opaque(threadIdx.x)", processors=20),
    Bug("mla_fetch", "C::queries / 8 : 8;", "C::queries / 16 : 8;"),
    Bug("mla_fetch", "stage.before()", "stage"),
    Bug("mla_fetch", "if (segment.first_tile == segment.last_tile) continue;\n    wait", "wait"),
    Bug("mla_fetch", "        ++fetched;", "        fetched = 1;"),
    # Slots: passed back too early, too often, by too few, or not at all.
    Bug("mla_layout", "slot = 0, parity ^= 1;", "slot = 0;"),
    Bug("mla_layout", "last_parity ^= last_slot;", "last_parity ^= 1;"),
    Bug("mla_layout", "kLastSlots = 2;", "kLastSlots = 1;"),
    Bug("mla_layout", "rescale + 256 * stage.slot", "rescale"),
    Bug("mla_partial", "(region == kRotary ? 256 : 128)", "128"),
    Bug("mla_softmax", "  mla_release<C>(base + M::empty(stage, kRotary));  // which", "  // which"),
    Bug("mla_softmax", "  if (lane == 0) barrier_arrive(base + M::turn(stage));", ""),
    Bug("mla_accumulate", "mla_release<C>(base + M::empty(stage, kRotary));", ""),
    Bug("mla_accumulate", "if (!last) mla_release<C>(base + M::empty(stage, kLast));", ""),
    # Weights: never there, there too early, over what is still needed, or of another tile.
    Bug("mla_softmax", "      mla_pass_turn(held);\n    }", "    }"),
    Bug(
        "mla_softmax",
        "held = base + M::turn(stage);\n        stage.pass_tile();",
        "stage.pass_tile(); held = base + M::turn(stage);",
    ),
    Bug("mla_softmax", "  held = 0;", ""),
    Bug("mla_softmax", "barrier_arrive(base + M::p_full(stage));\n}", "barrier_arrive(base + M::turn(stage));\n}"),
    # Products: read, or their operands passed back, before they are complete.
    Bug("mla_accumulate", "wgmma_wait<1>();", ""),
    Bug("mla_accumulate", "wgmma_wait<0>();\n        if (!last)", "if (!last)"),
    Bug("mla_accumulate", "wgmma_wait<0>();\n      if (last)", "if (last)"),
    Bug("mla_softmax", "wgmma_wait<0>();", ""),
    Bug("mla_accumulate", "wgmma_begin();", ""),
    # What ordinary stores and the tensor cores see of each other.
    Bug("mla_softmax", "fence_async_proxy();", ""),
    Bug("mla_accumulate", "fence_async_proxy();\n  if", "if"),
    Bug("mla_accumulate", "named_barrier(1 + side, 128);  // all", "// all"),
    # Masks, layouts, numbers.
    Bug("mla_softmax", "if (!__any_sync(0xffffffffu, outgrown)) return;", "if (!outgrown) return;"),
    Bug("mla_softmax", "if (!__any_sync(0xffffffffu, outgrown)) return;", "return;"),
    Bug("mla_softmax", "mla_mask(s, bound - tile * kTileTokens);", ""),
    Bug("mla_accumulate", "if (valid < kTileTokens) mla_clear_tail<C>(values, side, valid);", ""),
    Bug("mla_layout", "column ^ (row % 8 * 16)", "column ^ (row % 4 * 16)"),
    Bug("mla_accumulate", "v(values, 1024, 2048)", "v(values, 2048, 1024)"),
    Bug("mla_merge", "__expf(weight[i] - finite<C>(largest));", "__expf(weight[i] - sum.top);"),
    Bug("mla_merge", "weight * sums.totals[begin + w]", "sums.totals[begin + w]", processors=20),  # many parts of a row
    Bug("mla_merge", "if (kSlots > 1) merge_over_lanes<kLanes>(mine);", ""),
]
GQA_BUGS = [
    Bug("gqa_partial", "barrier_wait(&shared.full[stage], phase);", ""),
    Bug("gqa_partial", "barrier_wait(&shared.empty[stage], phase);", ""),
    Bug("gqa_partial", "u32(boxes * 2 *", "u32(Tile::boxes * 2 *"),
    Bug("gqa_partial", "named_barrier_diverged<1, Tile::threads>();  // no warp", "// no warp"),
    Bug(
        "gqa_partial",
        "state.store(shared, stage, slice, eight, lane);\n    named_barrier_diverged<1, Tile::threads>();",
        "state.store(shared, stage, slice, eight, lane);",
    ),
    Bug("gqa_state", "if (valid < 16) clear_values", "if (false) clear_values"),
    Bug("gqa_state", "bounds.admit(i % 2, lane / 4 + i / 2 * 8, valid) ?", "true ?"),
    Bug("gqa_state", "u32((lane / 16) ^ (lane % 8)) * 16", "u32(lane / 16) * 16"),
    Bug("gqa_merge", "merge.sum += sums[i] * weight;", "merge.sum += sums[i];"),
    Bug("gqa_merge", "reinterpret_cast<u32*>(lse)[at] = kUnwritten;", ""),
    Bug("gqa_partial", "args.space.clear(second + i);", ""),
    Bug("gqa_partial", "others[round].poll(args.space, second + i);", ""),
    Bug("gqa_partial", "merge = Merge::of_two(merge, others[round].state());", "merge = others[round].state();"),
    Bug("gqa_partial", "if (more || C::cluster == 2) {", "if (C::cluster == 2) {", processors=1),
    Bug("gqa_partial", "oldest = 0, oldest_phase ^= 1;", "oldest = 0;", processors=1),
    Bug("gqa_partial", "barrier_wait(&shared.full[oldest], oldest_phase);", "barrier_wait(&shared.full[oldest], 1);"),
    Bug("gqa_schedule", "parts.count > 2 ? items : 0", "parts.count > 1 ? items : 0"),
    # On seven multiprocessors two units have more than two parts, and one thread block merges a slice of both.
    Bug("gqa_merge", "mine < of_first ? mine : mine - of_first)", "mine)", processors=7),
    Bug("gqa_merge", "if (present >> i & 1) space.clear(at[i]);", "", processors=7),
    Bug("gqa_merge", "missing >> i & 1 && parts[i].written()", "missing >> i & 1", processors=7),
    Bug("gqa_schedule", "parts.first_is_later_slot,", "0,", processors=7),
    Bug("gqa_partial", "plan.count == 2 && plan.first", "plan.first", processors=7),
]

CLUSTER_BUGS = [
    Bug("mla_softmax", "named_barrier(3, 128);", ""),
    Bug(
        "mla_layout",
        "for (u32 rank = 0; rank < C::cluster; ++rank) barrier_arrive_cluster(empty, rank);",
        "barrier_arrive(empty);",
    ),
    Bug("mla_fetch", "kEvictFirst, 3)", "kEvictFirst, 1)"),
    Bug("mla_fetch", "pending < Stage::kSlots;", "pending < 0;"),
]


_ATTEMPTS = 30  # what needs a rare order of events is noticed in one of two or three


@pytest.mark.parametrize("bug", MLA_BUGS, ids=str)
def test_a_bug_of_the_mla_kernels_is_noticed(
    bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    assert _noticed(bug, mla(16, 64), [0, 70, 630, 129, 30, 64, 9], tmp_path, monkeypatch, seed)


@pytest.mark.parametrize("bug", CLUSTER_BUGS, ids=str)
def test_a_bug_of_the_clusters_is_noticed(bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    assert _noticed(bug, mla(128, 32), [0, 70, 450, 129, 30], tmp_path, monkeypatch, seed)


@pytest.mark.parametrize("bug", GQA_BUGS, ids=str)
def test_a_bug_of_the_gqa_kernels_is_noticed(
    bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    assert _noticed(bug, gqa(8, 1, 128, 16), [0, 70, 450, 330, 30], tmp_path, monkeypatch, seed)


def _noticed(
    bug: Bug, shape: AttentionShape, lengths: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> bool:
    case = random_case(shape, lengths, CPU, seed)
    _store_new_tokens(case, seed)
    case.q[:, ::2] *= 16  # heads whose largest score still grows by much after the first tokens
    root = planted(folder, [bug])
    other = dataclasses.replace(case, q=case.q.flip(1))  # after it, the workspace is as a launch left it
    steps = [
        (step, TorchOps(shape).attend(step.q.double(), to_double(step.cache), step.batch)) for step in (case, other)
    ]
    for attempt in range(_ATTEMPTS):
        gpu = Gpu(bug.processors, seed + attempt, ("late", "random", "early")[attempt % 3])
        ops = hopper_ops(shape, folder, monkeypatch, gpu, root)
        try:
            for step, want in steps:
                check_partial(ops.attend(step.q, step.cache, step.batch), want, BOUND)
        except (AssertionError, KernelFault) as error:
            print(f"{gpu.asynchrony}, attempt {attempt}: {error}")
            return True
    return False


def test_the_copy_engine_refuses_what_the_driver_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper_ops(gqa(8, 1, 128, 64), tmp_path, monkeypatch, Gpu(1))
    matrix = torch.zeros(64, 128, dtype=torch.bfloat16)
    tensor_map(matrix, (128, 64), (256,), (64, 64))
    for dims, strides, box in (
        ((128, 64), (256,), (128, 64)),  # wider than the swizzle
        ((128, 64), (250,), (64, 64)),  # rows that are not aligned
        ((128, 64), (256,), (64, 512)),  # a box too tall
        ((128, 0), (256,), (64, 64)),  # nothing
    ):
        with pytest.raises(CubinError, match="CUDA_ERROR_INVALID_VALUE"):
            tensor_map(matrix, dims, strides, box)
    with pytest.raises(CubinError, match="CUDA_ERROR_INVALID_VALUE"):
        tensor_map(matrix.view(-1)[1:], (64,), (), (64,))


def test_a_deadlock_says_who_waits_for_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = Bug("mla_fetch", "barrier_expect(full, copies * bytes);", "barrier_expect(full, copies * bytes + 16);")
    case = random_case(mla(16, 64), [64], CPU, 1)
    ops = hopper_ops(case.shape, tmp_path, monkeypatch, Gpu(1), planted(tmp_path, [bug]))
    waiting = r"deadlock:(?s:.*)block 0,0,0 warp 4 lanes ffffffff: phase with parity 0 of mbarrier .* 16 bytes missing"
    with pytest.raises(KernelFault, match=waiting):
        ops.attend(case.q, case.cache, case.batch)


def _store_new_tokens(case: Case, seed: int) -> None:
    """The tokens that append would store: attention is to find all of a row's tokens."""
    generator = torch.Generator().manual_seed(seed)
    for row in case.batch.owned.nonzero().flatten():
        slot = int(case.batch.slots[row])
        page, offset = slot // case.shape.block, slot % case.shape.block
        for cache in (case.cache.k, case.cache.v):
            if cache is not None:
                cache[page, ..., offset, :] = torch.randn(cache[page, ..., offset, :].shape, generator=generator).to(
                    cache.dtype
                )
