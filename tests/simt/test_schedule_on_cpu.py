"""The schedule of MLA's partial: the kernel's own source on a CPU against the rule it follows, worker by worker."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import pytest
import torch

from helixc.codegen.build import render_all
from helixc.codegen.problem import KernelSpec
from helixc.codegen.template_root import template_root
from helixc_runtime.attend_cuda import ARGUMENTS
from tests.simt.bugs import Bug, planted
from tests.simt.cpu_kernel import CpuKernel, Gpu, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

TILE = 64
Segment = tuple[int, ...]  # row, length, first and last tile, partial, whole: as in mla_schedule.cuh
SplitRow = tuple[int, int, int]  # row, first partial, partials
Found = tuple[list[list[Segment]], list[SplitRow]]  # each worker's


def expected(lengths: list[int], workers: int) -> Found:
    """The rule: one worker after the other, near the average of what is left, and few cuts."""
    tiles = [-(-length // TILE) for length in lengths]
    left = sum(tiles)
    average = -(-left // workers)
    most_whole, most_cut = average + min(average // 16, 6), average + min(average // 48, 1)
    row = at = partials = first_partial = 0
    segments: list[list[Segment]] = []
    splits: list[SplitRow] = []
    for workers_left in range(workers, 0, -1):
        share, load = -(-left // workers_left), 0
        mine: list[Segment] = []
        segments.append(mine)
        while row < len(lengths):
            rest = take = tiles[row] - at
            if load + rest > (most_whole if at == 0 else most_cut) and workers_left > 1:
                room = share - load
                if load > 0 and room < share // 8 + 1:
                    break
                piece = -(-rest // -(-rest // most_cut))
                take = min(rest, max(piece, room) if load == 0 else room)
            if take == 0 and load > 0 and tiles[row] > 0:
                break
            whole = take == tiles[row]
            if not whole and at == 0:
                first_partial = partials
            mine.append((row, lengths[row], at, at + take, 0 if whole else partials, int(whole)))
            partials += not whole
            load, left, at = load + take, left - take, at + take
            if at < tiles[row]:
                break
            if not whole:
                splits.append((row, first_partial, partials - first_partial))
            row, at = row + 1, 0
            if load >= share and workers_left > 1:
                break
    return segments, splits


class Schedule:
    """The kernel, from the templates at `root`."""

    def __init__(self, row_tokens: int = 1, root: Path | None = None) -> None:
        spec = KernelSpec("mla_schedule", "mla_schedule", (("row_tokens", row_tokens),), "sm_90a")
        (source,) = render_all((spec,), root or template_root())
        threads = int(source.config.params["threads"])
        self.row_tokens = row_tokens
        self.kernel = CpuKernel(build(source, root), spec.name, ARGUMENTS[spec.template], threads, torch.device("cpu"))

    def __call__(self, bounds: list[int], workers: int) -> Found:
        rows = len(bounds) // self.row_tokens
        segments = torch.full((rows + 2 * workers, 8), -1, dtype=torch.int32)
        split, count = torch.full((workers, 4), -1, dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32)
        lengths = torch.tensor(bounds, dtype=torch.int32)
        tensors = (segments, split, count, lengths)
        self.kernel.launch((1, 1, 1), *(tensor.data_ptr() for tensor in tensors), rows, workers)
        written = [tuple(segment) for segment in segments.tolist()]

        def of(worker: int) -> list[Segment]:
            *_, number, more = written[worker]
            assert number >= 0, f"nothing says what worker {worker} does"
            return [segment[:6] for segment in (written[worker], *written[more : more + number - 1])][:number]

        return [of(worker) for worker in range(workers)], [tuple(row[:3]) for row in split.tolist()[: count.item()]]


def batches(seed: int) -> list[tuple[list[int], int]]:
    """Lengths and workers: what deployments have, and anything."""
    source = random.Random(seed)
    found = [
        ([length] * rows, workers)
        for rows, length, workers in itertools.product((1, 2, 8, 33, 64), (1, 4096, 8192, 65536, 1 << 20), (66, 132))
    ]
    found += [([0, 0, 0], 132), ([0], 1), ([100], 1), ([5000, 0, 1 << 18, 0], 132), ([0] * 200 + [70000], 66)]
    found += [([100, 0], 1), ([132 * TILE, 0, 0], 132)]  # nothing is left, but rows
    found += [([source.randint(0, 300) for _ in range(rows)], 132) for rows in (2100, 300)]  # beyond kCached; and below
    for _ in range(300):
        rows, most = source.randint(1, 40), 1 << source.randint(4, 18)
        long = [source.randint(0, most) for _ in range(rows)]
        short = [source.randint(0, min(most, 500)) for _ in range(rows)]
        mixed = [source.choice(pair) for pair in zip(long, short, strict=True)]
        found.append((source.choice((long, short, mixed)), source.randint(1, 140)))
    return found


def check(schedule: Schedule, seed: int) -> None:
    for lengths, workers in batches(seed):
        assert schedule(lengths, workers) == expected(lengths, workers), f"{lengths=}, {workers=}, {seed=}"


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(CpuKernel, "gpu", Gpu(132, seed, "random"), raising=False)


def test_every_worker_gets_what_the_rule_gives_it(seed: int) -> None:
    check(Schedule(), seed)


def test_a_row_is_as_long_as_its_last_query_token_sees(seed: int) -> None:
    source = random.Random(seed)
    bounds = [source.randrange(1, 5000) + token for _ in range(20) for token in range(3)]
    bounds = sorted(bounds[i : i + 3] for i in range(0, len(bounds), 3))
    rows = [sorted(row) for row in bounds]
    assert Schedule(3)([bound for row in rows for bound in row], 66) == expected([row[-1] for row in rows], 66)


BUGS = [
    Bug("mla_schedule", "then_left > 1 &&", ""),
    Bug("mla_schedule", "then_left) <= piece);", "then_left) <= piece + 1);"),
    Bug("mla_schedule", "then_rest > piece &&", "then_rest > 0 &&"),
    Bug("mla_schedule", "lane < pieces && ", ""),
    Bug("mla_schedule", "min(lane, larger)", "0"),
    Bug("mla_schedule", "whole ? 0 : partial + lane", "whole ? 0 : partial"),
    Bug("mla_schedule", "size * taking + min(taking, larger)", "size * taking"),
    Bug("mla_schedule", "worker += lane; worker < workers", "worker += lane + 1; worker < workers"),
    Bug("mla_schedule", "if (!whole && at == 0) row_first_partial", "if (!whole) row_first_partial"),
    Bug("mla_schedule", "room < share / 8 + 1", "room < 1"),
    Bug("mla_schedule", "min(average / 16, 6)", "0"),
    Bug("mla_schedule", "min(average / 48, 1)", "0"),
    Bug("mla_schedule", "  ++others;", ""),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_bug_is_noticed(bug: Bug, tmp_path: Path, seed: int) -> None:
    with pytest.raises(AssertionError):
        check(Schedule(root=planted(tmp_path, [bug])), seed)
