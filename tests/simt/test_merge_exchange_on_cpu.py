"""The exchange of partials that are still in splits, among GPUs that are threads of this process."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helixc.codegen.problem import merge_exchange
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ops import Partial
from tests.gpu.exchange_cases import Part, check_results, random_part
from tests.gpu.kernel_cases import mla
from tests.simt.bugs import Bug, planted
from tests.simt.cpu_kernel import CpuKernel, Gpu
from tests.simt.test_exchange_on_cpu import Gpus

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

MAX_ROWS = 3  # of the schedule
FEW, SOME, MANY = 20, 40, 90  # splits that a warp has under way at once; for all its warps; and more than four have


def some_of_each(draw: random.Random) -> list[int]:
    """Splits of MAX_ROWS rows: a whole one before others, few splits and many."""
    return [0, draw.randint(2, FEW), draw.choice((draw.randint(FEW + 1, SOME), MANY))]


def random_counts(rows: int, draw: random.Random) -> list[int]:
    """Splits of each row; 0: it is whole."""
    some = [0, 0, 0, 2, 3, draw.randint(4, FEW), draw.randint(4, FEW), draw.randint(FEW + 1, SOME)]
    return [MANY if draw.random() < 0.05 else draw.choice(some) for _ in range(rows)]


class MergeExchange(Gpus):
    """The exchange of one attention shape; each GPU has its own number of thread blocks that merge."""

    def __init__(
        self,
        shape: AttentionShape,
        cp: int,
        folder: Path,
        mergers: list[int],
        root: Path | None = None,
        most_rows: int = MAX_ROWS,
    ) -> None:
        spec = merge_exchange(shape, cp, "sm_90a")
        self.most_rows = most_rows
        self.shape, self.mergers, self.tokens = shape, mergers, int(dict(spec.params)["row_tokens"])
        units = most_rows * self.tokens * shape.heads // cp
        super().__init__(spec, cp, 2 * cp * units * (shape.partial_dim // 2 + 8), folder, root)

    def __call__(self, rank: int, index: int, part: Part, *, without: bool = False) -> Tensor:
        """`without`: as for a partial that is whole."""
        rows, heads = len(part.whole.o), self.shape.heads // self.members
        out = torch.full((rows, heads, self.shape.partial_dim), torch.nan, dtype=torch.bfloat16)
        splits: list[Tensor | None] = [part.o, part.lse, part.rows, part.count]
        mergers = 0 if without else self.mergers[rank]
        if without:
            splits = [None, None, None, torch.zeros(1, dtype=torch.int32)]
        blocks = mergers - (-rows * heads // (self.threads // 32))
        sizes = [rows, self.most_rows * self.tokens, mergers]
        self.launch(rank, index, blocks, [out, *part.whole, *splits], sizes)
        return out


def check_exchanges(gpus: MergeExchange, steps: int, calls: int, seed: int, slow: int = 20) -> list[bytes]:
    """`steps` steps of `calls` exchanges each, ranks delayed at random: every result, and no word left over."""
    draw, shape, cp = random.Random(seed), gpus.shape, gpus.members
    work = []
    for number in range(steps * calls):
        rows = draw.randint(1, gpus.most_rows)
        counts = [random_counts(rows, draw) if number else some_of_each(draw) for _ in range(cp)]
        work.append([random_part(shape, gpus.tokens, of_rank, draw) for of_rank in counts])
    gpus.slow_down(seed % cp, slow)
    delays = [[draw.choice((0, 0, 0, 0.003)) for _ in work] for _ in range(cp)]
    results: list[list[Tensor]] = [[] for _ in range(cp)]

    def body(rank: int) -> None:
        for number, parts in enumerate(work):
            time.sleep(delays[rank][number])
            results[rank].append(gpus(rank, number % calls, parts[rank]))
            gpus.progress[rank, 0] += calls * (number % calls == calls - 1)

    gpus.together(body)
    assert gpus.at_rest()
    for number, parts in enumerate(work):
        check_results(shape, parts, [of_rank[number] for of_rank in results])
    return [got.view(torch.uint8).numpy().tobytes() for of_rank in results for got in of_rank]


@pytest.fixture
def seed(seed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Also of the order of events on the GPUs."""
    monkeypatch.setattr(CpuKernel, "gpu", Gpu(4, seed), raising=False)
    return seed


SHAPES = {
    "h8 cp2": (mla(8, 32), 2),
    "h24 cp3": (mla(24, 32), 3),
    "h72 cp2": (mla(72, 64), 2),  # thread blocks of four warps
    "h16 cp4, 2 tokens": (mla(16, 32, query_tokens=2), 4),
    "h8 cp8, fp8": (mla(8, 32, kv_dtype="float8_e4m3fn"), 8),
}


@pytest.mark.parametrize(("shape", "cp"), SHAPES.values(), ids=SHAPES.keys())
def test_exchanges_in_a_row(shape: AttentionShape, cp: int, tmp_path: Path, seed: int) -> None:
    """Whatever rows each rank has split, and with few thread blocks on each GPU at once; twice the same bits."""
    draw, bits = random.Random(seed), set()
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        mergers = [draw.choice([1, 2, 7, 64, 300]) for _ in range(cp)]
        gpus = MergeExchange(shape, cp, folder, mergers)
        bits.add(tuple(check_exchanges(gpus, steps=2, calls=2, seed=seed)))
    assert len(bits) == 1, "the result depends on the order of events"


def test_a_whole_partial(tmp_path: Path, seed: int) -> None:
    """One rank's splits were merged before, as those of its other exchanges are not."""
    shape, draw = mla(16, 32), random.Random(seed)
    gpus = MergeExchange(shape, 2, tmp_path, [5, 5])
    parts = [random_part(shape, 1, [3, 0, 5], draw) for _ in range(2)]
    o, lse = parts[0].merged
    first = replace(parts[0], whole=Partial(o.bfloat16(), lse.float()))
    results: dict[int, Tensor] = {}

    def body(rank: int) -> None:
        results[rank] = gpus(rank, 0, (first, parts[1])[rank], without=rank == 0)

    gpus.together(body)
    assert gpus.at_rest()
    check_results(shape, parts, [results[0], results[1]])


def check_many_rows(folder: Path, seed: int, root: Path | None = None) -> None:
    """More split rows than a warp has lanes."""
    shape, draw = mla(8, 32), random.Random(seed)
    counts = [draw.choice([2, 2, 2, 2, 2, 2, 2, 0]) for _ in range(45)]
    gpus = MergeExchange(shape, 2, folder, [64, 100], root, most_rows=len(counts))
    gpus.limit_s = 20.0 if root is None else 1.0
    parts = [random_part(shape, 1, draw.sample(counts, len(counts)), draw) for _ in range(2)]
    results: dict[int, Tensor] = {}

    def body(rank: int) -> None:
        results[rank] = gpus(rank, 0, parts[rank])

    gpus.together(body)
    assert gpus.at_rest()
    check_results(shape, parts, [results[0], results[1]])


def test_many_rows(tmp_path: Path, seed: int) -> None:
    check_many_rows(tmp_path, seed)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("before = __shfl_sync(0xffffffffu, through, kWarp - 1);", ""),
        ("i < count; i += kWarp) found", "i < min(count, kWarp); i += kWarp) found"),
    ],
)
def test_a_row_that_is_overlooked_is_noticed(right: str, wrong: str, tmp_path: Path, seed: int) -> None:
    root = planted(tmp_path, [Bug("merge_exchange", right, wrong)])
    with pytest.raises(AssertionError):
        check_many_rows(tmp_path, seed, root)


def test_a_peer_that_is_gone_is_named(tmp_path: Path, seed: int) -> None:
    shape = mla(24, 32)
    gpus = MergeExchange(shape, 3, tmp_path, [9, 9, 9])
    gpus.limit_s = 2.0
    gpus.progress += 40
    draw = random.Random(seed)
    parts = [random_part(shape, 1, [0, 2], draw) for _ in range(3)]
    started = time.monotonic()

    def body(rank: int) -> None:
        gpus(rank, 2, parts[rank])

    gpus.together(body, range(2))
    assert time.monotonic() - started < 10
    assert gpus.status.tolist() == [[1, 2, 40, 102], [1, 2, 40, 102], [0, 0, 0, 0]]


BUGS = [
    # Who merges what.
    Bug("merge_exchange", "of_source(row.first), of_source(row.count)", "row.first, of_source(row.count)"),
    Bug("merge_exchange", "found |= splits.rows[i].row == row;", "found |= i == row;"),
    Bug("merge_exchange", "batch += mergers)", "batch += mergers + 1)"),
    Bug("merge_exchange", "int(unit / (C::heads * C::row_tokens))", "int(unit / C::heads)"),
    Bug("merge_exchange", "warp * Batch::kSlots : 0", "warp : 0"),
    Bug("merge_exchange", "? Batch::kSlots * Batch::kWarps : Batch::kSlots;", "? Batch::kSlots : Batch::kSlots;"),
    # The merge.
    Bug("mla_merge", "sum.top = largest, sum.total *= weight;", "sum.total *= weight;"),
    Bug("mla_merge", "sum.values[c] *= weight;", ";"),
    Bug("merge_exchange", "merge_over_lanes<kPieceLanes>(sum);", ""),
    Bug("merge_exchange", "if (many) merge_over_warps<C>(sum, shared);", ""),
    Bug("merge_exchange", "sum.total += weight * shared.totals[w];", "sum.total += shared.totals[w];"),
    Bug("merge_exchange", "__syncthreads();  // before the next batch's sums", ""),
    Bug("merge_exchange", "const float lse = sum.top + logf(sum.total)", "const float lse = sum.top"),
    # What is sent.
    Bug("merge_exchange", "member = head / C::heads;", "member = (head / C::heads + 1) % C::members;"),
    Bug("merge_exchange", "unit = token * C::heads + head % C::heads;", "unit = row * C::heads + head % C::heads;"),
    Bug("merge_exchange", "if (!is_minus_infinity(lse)) {", "{"),
    Bug("merge_exchange", "piece * kPieceLanes + lane, sendable(packed)", "piece * kPieceLanes + lane, packed"),
    Bug("merge_exchange", "+ piece, sendable(u32(", ", sendable(u32("),
    Bug("merge_exchange", "(warp == 0 || !many)", "true"),
    # What is received.
    Bug("exchange", "for (int step = whole ? 1 : 0; step", "for (int step = 1; step"),
    Bug("exchange", "step < C::members && whole; ++step", "step < C::members; ++step"),
    Bug("exchange", "if (lane < C::pieces) forget(own);", "if (lane == 0) forget(own);"),
    Bug("exchange", "u32* own = lse + lane % C::pieces;", "u32* own = lse;"),
    Bug("exchange", "if (lane < C::pieces) {", "if (lane == 0) {"),
    Bug("exchange", "+ unit * C::pieces;", "+ unit;"),
]


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_wrong_exchange_is_noticed(bug: Bug, tmp_path: Path, seed: int) -> None:
    root = planted(tmp_path, [bug])
    gpus = MergeExchange(mla(16, 32, query_tokens=2), 2, tmp_path, [3, 50], root)
    gpus.limit_s = 0.3
    with pytest.raises(AssertionError):
        check_exchanges(gpus, steps=2, calls=2, seed=seed, slow=200)
