"""The batch kernel's own source, and CudaOps' launch of it, against KvCache.batch, without a GPU."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helixc.codegen.problem import batch
from helixc_runtime.attention_shape import attention_shape
from helixc_runtime.kv import KvCache
from helixc_runtime.manifest import Model, Rank
from helixc_runtime.models.rotary import Rotary
from helixc_runtime.ops_torch import TorchOps
from tests.deployments import plan_of, role
from tests.simt.bugs import Bug, planted
from tests.simt.cpu_kernel import cpu_ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPU, ARCH = torch.device("cpu"), "sm_100a"
ROWS, WIDTH = 40, 9


def small_cache(model: Model, rank: Rank, block: int) -> KvCache:
    """A cache whose table matters and whose pages do not."""
    rank = replace(rank, memory=replace(rank.memory, kv_capacity_tokens=1))
    return KvCache(model, rank, block, ROWS + 8, WIDTH, CPU)


def check_batches(
    model: str,
    cp: int,
    block: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    root: Path | None = None,
) -> None:
    """Rows in use and not, attended for and not, at the borders of blocks and anywhere, on every cp rank."""
    plan, source = plan_of(model, None, role(cp=cp, block=block)), random.Random(seed)
    most = WIDTH * block * cp
    kinds = (
        lambda: -1,
        lambda: source.randrange(most),
        lambda: source.randrange(1, WIDTH * cp) * block + source.choice((-1, 0, 1)),
    )
    positions = torch.tensor([source.choice(kinds)() for _ in range(ROWS)])
    attends = torch.tensor([source.randrange(2) for _ in range(ROWS)])
    rope = replace(plan.model.arch.rope, attention_factor=1.25)
    rotary = Rotary(rope, plan.model.arch.rope_dim, CPU)
    for rank in plan.ranks:
        shape = attention_shape(plan.model, rank, block)
        more = [batch(shape, 1.25, ARCH)]
        ops = cpu_ops(shape, cp, folder, monkeypatch, 4, root, ARCH, only_append=True, more=more)
        cache = KvCache(
            plan.model, replace(rank, memory=replace(rank.memory, kv_capacity_tokens=1)), block, 48, WIDTH, CPU
        )
        cache.table.copy_(torch.randint(1 << 30, cache.table.shape))
        got, want = (each.make_batch(cache, positions, attends, rotary) for each in (ops, TorchOps(shape)))
        assert torch.equal(got.lengths, want.lengths)
        assert torch.equal(got.owned, want.owned)
        owned = want.owned.bool()
        assert torch.equal(got.slots[owned], want.slots[owned])
        assert torch.equal(got.page_table, want.page_table)
        angles = positions.clamp(min=0).float().unsqueeze(1) * rotary.frequencies
        for found, exact in ((got.cos, angles.double().cos()), (got.sin, angles.double().sin())):
            assert (found - 1.25 * exact).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("model", "cp", "block"), [("qwen3-8b", 1, 4), ("deepseek-v3", 3, 32), ("llama-3.1-8b", 8, 64), ("qwen3-8b", 5, 7)]
)
def test_batches(model: str, cp: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    check_batches(model, cp, block, tmp_path, monkeypatch, seed)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(position + 1) % cycle", "position % cycle"),
        ("position / C::block % cp == cp_rank", "position / C::block % cp == 0"),
        ("rest < C::block ? rest : C::block", "rest"),
        ("rest < 0 ? 0 :", "false ? 0 :"),
        ("given >= 0 && attends[row]", "attends[row]"),
        ("given >= 0 && attends[row]", "given >= 0"),
        ("row * max_pages + position / cycle", "row * max_pages + position / C::block"),
        ("float(2 * (turns - rint(turns)))", "float(turns - rint(turns))"),
        ("cosines[row * angles + i] = cosine * C::factor", "cosines[row * angles + i] = cosine"),
    ],
)
def test_a_wrong_batch_is_noticed(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    root = planted(tmp_path, [Bug("*", right, wrong)])
    with pytest.raises(AssertionError):
        check_batches("llama-3.1-8b", 3, 4, tmp_path, monkeypatch, seed, root)


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("qwen3-8b", None, role(max_seq_len=64))
    shape = attention_shape(plan.model, plan.ranks[0], 4)
    ops = cpu_ops(shape, 1, tmp_path, monkeypatch, 4, None, ARCH, only_append=True, more=[batch(shape, 1.0, ARCH)])
    cache, ones = small_cache(plan.model, plan.ranks[0], 4), torch.ones(3, dtype=torch.int64)
    rotary = Rotary(plan.model.arch.rope, shape.rope_dim, CPU)
    other = Rotary(replace(plan.model.arch.rope, attention_factor=2.0), shape.rope_dim, CPU)
    for positions, attends, by, message in (
        (ones, ones[1:], rotary, r"attends has shape \[2\], expected \[3\]"),
        (ones.int(), ones, rotary, "positions is int32, expected int64"),
        (ones, ones.bool(), rotary, "attends is bool, expected int64"),
        (ones, ones, other, r"no kernel makes a batch with angles times 2\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.make_batch(cache, positions, attends, by)
