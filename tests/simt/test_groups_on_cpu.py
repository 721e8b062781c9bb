"""HOP-B without a GPU: Hopper's attention kernels with the rows of a step in groups, each with its own schedule."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.manifest import Hop
from helixc_runtime.ops_cuda import CudaOps
from helixc_runtime.ops_torch import TorchOps
from tests.gpu.kernel_cases import Case, check_partial, gqa, mla, random_case, to_double
from tests.simt.cpu_kernel import Gpu, KernelFault, cpu_ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPU = torch.device("cpu")
BOUND = 5e-3  # relative Frobenius error of o in bfloat16
SHAPES = {
    "mla h16 b64": mla(16, 64),
    "mla h128 b32": mla(128, 32),
    "mla h16 b64 q2": mla(16, 64, query_tokens=2),
    "mla h64 b64 fp8": mla(64, 64, kv_dtype="float8_e4m3fn"),
    "gqa 16,2 d64 b64": gqa(16, 2, 64, 64),
    "gqa 8,1 d128 b64 fp8 q2": gqa(8, 1, 128, 64, kv_dtype="float8_e4m3fn", query_tokens=2),
}


@pytest.fixture
def ops(shape: AttentionShape, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> CudaOps:
    """On 6 multiprocessors, of which all groups but the first leave 2."""
    gpu = Gpu(6, seed, "random")
    return cpu_ops(shape, 2, tmp_path, monkeypatch, gpu, arch="sm_90a", hop=Hop(groups, groups, 2, ""))


@pytest.fixture
def case(shape: AttentionShape, seed: int) -> Case:
    draw = random.Random(seed).randrange
    return random_case(shape, [draw(3, 300), 0, 65, draw(3, 90), draw(300, 500)], CPU, seed, appended=True)


def attended(ops: CudaOps, case: Case, groups: int) -> None:
    """Two layers of a step, group by group, each against the oracle."""
    parts = list(case.batch.in_groups(groups))
    queries = case.q.split([len(part.lengths) for part in parts])
    for part in parts:
        ops.begin_step(part)
    for _ in range(2):
        for part, q in zip(parts, queries, strict=True):
            want = TorchOps(case.shape).attend(q.double(), to_double(case.cache), part)
            check_partial(ops.attend(q, case.cache, part), want, BOUND)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_groups_do_not_disturb_each_other(ops: CudaOps, case: Case, groups: int) -> None:
    attended(ops, case, groups)


@pytest.mark.parametrize("groups", [2])
@pytest.mark.parametrize("shape", [SHAPES["mla h16 b64"], SHAPES["gqa 16,2 d64 b64"]])
def test_the_schedule_of_another_group_is_seen(ops: CudaOps, case: Case, groups: int) -> None:
    ops._attends = [ops._attends[0]] * groups
    with pytest.raises((AssertionError, KernelFault)):
        attended(ops, case, groups)


@pytest.mark.parametrize("groups", [2])
@pytest.mark.parametrize("shape", [SHAPES["mla h16 b64"], SHAPES["gqa 16,2 d64 b64"]])
def test_later_groups_leave_room(ops: CudaOps, groups: int) -> None:
    first, second = (attend.workers for attend in ops._attends)  # type: ignore[attr-defined]
    assert (first, second) == (6, 4)


@pytest.mark.parametrize("groups", [2])
@pytest.mark.parametrize("shape", [SHAPES["mla h16 b64"]])
def test_a_group_that_was_not_prepared_is(ops: CudaOps, case: Case, groups: int) -> None:
    """As for a whole batch: attention of a batch that begin_step has not seen begins a step of its own."""
    first, second = case.batch.in_groups(groups)
    ops.begin_step(first)
    ops.begin_step(second)
    other = replace(second, lengths=second.lengths.flip(0), page_table=second.page_table.flip(0))
    for part in (other, second):
        q = case.q[len(first.lengths) :]
        want = TorchOps(case.shape).attend(q.double(), to_double(case.cache), part)
        check_partial(ops.attend(q, case.cache, part), want, BOUND)
