"""Exchange and reduction between two GPUs: `python bench/exchange.py [--out FILE] [--stress N]`.

Two processes, a GPU each. Every time is that of one call among LAUNCHES in a CUDA graph that both replay at once,
inputs rotated; medians of rank 0. The peer is NCCL on inputs that lie as it wants them, with torch's arithmetic after
it, and with ours. `--stress N` runs N exchanges with random delays instead, each checked by its content, and writes
nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "runtime")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from bench.gpu_timing import machine  # noqa: E402
from bench.pair import Side, pair_plan, run_pair, values  # noqa: E402
from helixc_runtime.cubin import device_arch  # noqa: E402
from helixc_runtime.ops import Norm, Partial  # noqa: E402
from helixc_runtime.ops_torch import TorchOps  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "exchange.json"
GOALS_US = {1: 6.0, 4: 7.0, 16: 11.0, 64: 24.0}  # exchange and combine of 128 heads x 512, by rows
REDUCE_ROWS = (1, 8, 64, 256, 1024)
MODELS = {"deepseek-v3": 7168, "deepseek-v3-lite": 2048}  # hidden size
SETS, LAUNCHES, REPLAYS = 4, 120, 15
STRESS_SETS, STRESS_LAUNCHES = 5, 200  # an odd number of sets: each goes through both halves of the inboxes

Calls = dict[str, Callable[[int], object]]  # by name: the call on its i-th set of inputs


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results. Returns 1 if the stress run found a wrong exchange."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--stress", type=int, metavar="N", help="run so many exchanges and check their content")
    options = parser.parse_args(arguments)
    arch = device_arch(torch.device("cuda", 0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.stress:
            plan, seed = pair_plan("deepseek-v3", folder, arch, max(GOALS_US)), random.randrange(1 << 30)
            wrong = values(run_pair(stress, plan, folder, options.stress, seed=seed, deadline=560))
            print(f"{options.stress:,} exchanges, {sum(wrong)} wrong, {seed=}")
            return int(any(wrong))
        rows = []
        for model in MODELS:
            plan = pair_plan(model, folder, arch, max(REDUCE_ROWS))
            rows += values(run_pair(measure, plan, folder, deadline=300))[0]
    result = machine() | {"rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    missed = [row for row in rows if row["op"] == "exchange" and row["ours_us"] > row["goal_us"]]
    print(f"goals missed: {len(missed)}")
    return 0


# --- Times ------------------------------------------------------------------------------------------------------


def measure(side: Side) -> list[dict[str, Any]]:
    """All rows of one model."""
    found, hidden = [], side.plan.model.arch.hidden_size
    if side.ops.shape.heads == 128:
        for rows, goal in GOALS_US.items():
            times = medians(side, exchanges(side, rows))
            found.append({"op": "exchange", "rows": rows, "heads": 128, "width": 512, **times, "goal_us": goal})
            report(side, found[-1])
    for rows in REDUCE_ROWS:
        found.append({"op": "reduce", "rows": rows, "hidden": hidden, **medians(side, reductions(side, rows))})
        report(side, found[-1])
    return found


def report(side: Side, row: dict[str, Any]) -> None:
    if side.index == 0:
        print(json.dumps(row), flush=True)


def exchanges(side: Side, rows: int) -> Calls:
    """An exchange and the merge of what arrives."""
    shape, group = side.ops.shape, side.comm.groups["cp"]
    parts = [random_partial(side, rows) for _ in range(SETS)]
    o, lse = (torch.empty_like(t.view(2, rows, shape.heads // 2, *t.shape[2:])) for t in parts[0])

    def nccl(i: int) -> None:
        for received, sent in zip((o, lse), parts[i], strict=True):
            dist.all_to_all_single(received.view(2, -1), sent.view(2, -1), group=group)

    def with_torch(i: int) -> Tensor:
        nccl(i)
        return (torch.softmax(lse, 0).unsqueeze(-1) * o).sum(0)

    def with_ours(i: int) -> object:
        nccl(i)
        return side.ops.combine(o, lse)

    return {
        "ours": lambda i: side.comm.exchange(parts[i], side.ops, "partials"),
        "nccl": with_torch,
        "nccl_our_combine": with_ours,
    }


def reductions(side: Side, rows: int) -> Calls:
    """The sum of both ranks, added to the residual stream and normed."""
    hidden, eps = side.plan.model.arch.hidden_size, side.plan.model.arch.norm_eps
    x, residual = ([normal(side, rows, hidden) for _ in range(SETS)] for _ in range(2))
    norm, group = Norm(normal(side, hidden), eps), side.comm.groups["ffn_tp"]

    def nccl(i: int) -> None:
        dist.all_reduce(x[i], group=group)
        F.rms_norm(residual[i] + x[i], (hidden,), norm.weight, eps)

    def with_ours(i: int) -> object:
        dist.all_reduce(x[i], group=group)
        return side.ops.add_norm(x[i], residual[i], None, norm)

    return {
        "ours": lambda i: side.comm.reduce(x[i], residual[i], None, norm, side.ops, "sum"),
        "nccl": nccl,
        "nccl_our_norm": with_ours,
    }


def normal(side: Side, *size: int) -> Tensor:
    return torch.randn(*size, device=side.device, dtype=torch.bfloat16)


def random_partial(side: Side, rows: int) -> Partial:
    shape = side.ops.shape
    return Partial(
        normal(side, rows, shape.heads, shape.partial_dim), torch.randn(rows, shape.heads, device=side.device)
    )


def medians(side: Side, calls: Calls) -> dict[str, float]:
    """Microseconds of one call of each, replayed in turn."""
    graphs = {name: captured(side, call, SETS, LAUNCHES) for name, call in calls.items()}
    seen: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPLAYS):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            side.meet()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seen[name].append(start.elapsed_time(end) * 1000 / LAUNCHES)
    side.comm.check()
    return {f"{name}_us": round(statistics.median(times[1:]), 2) for name, times in seen.items()}


def captured(side: Side, call: Callable[[int], object], sets: int, launches: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls, one step to Comm."""

    def step(count: int) -> None:
        side.comm.begin_step()
        for i in range(count):
            call(i % sets)
        side.comm.end_step()

    step(sets)
    side.meet()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step(launches)
    side.meet()
    return graph


# --- Stress -----------------------------------------------------------------------------------------------------


def stress(side: Side, exchanges: int) -> int:
    """How many of so many exchanges, with random delays in and between replays, gave anything but the right bits."""
    source = random.Random(side.seed + 1 + side.index)
    generator = torch.Generator(side.device).manual_seed(side.seed)
    wrong, started = torch.zeros((), dtype=torch.int64, device=side.device), time.monotonic()
    stressed = [Stress(side, rows, wrong, source, generator) for rows in (1, 3, 16)]
    common = random.Random(side.seed)
    for replay in range(-(-exchanges // STRESS_LAUNCHES)):
        if source.random() < 0.01:
            time.sleep(source.random() * 0.005)
        common.choice(stressed).graph.replay()
        if replay % 200 == 0:
            torch.cuda.synchronize(side.device)
            side.comm.check()
    side.meet()
    side.comm.check()
    if side.index == 0:
        print(f"{time.monotonic() - started:.0f} s")
    return int(wrong)


class Stress:
    """A graph of STRESS_LAUNCHES exchanges, one in eight behind a delay; what comes of each is compared with the first
    that were made of the same inputs, and those with float64.
    """

    def __init__(self, side: Side, rows: int, wrong: Tensor, source: random.Random, generator: torch.Generator) -> None:
        self.parts: list[Partial] = []
        self.first: list[Tensor] = []
        shape, heads = side.ops.shape, side.ops.shape.heads // 2
        mine = slice(side.index * heads, (side.index + 1) * heads)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=side.device)

        for _ in range(STRESS_SETS):
            heads_of_rows = (rows, shape.heads)
            both = [
                Partial(normal(*heads_of_rows, shape.partial_dim).bfloat16(), normal(*heads_of_rows)) for _ in range(2)
            ]
            side.comm.begin_step()
            self.parts.append(both[side.index])
            self.first.append(side.comm.exchange(self.parts[-1], side.ops, "first"))
            side.comm.end_step()
            o, lse = (torch.stack([part[i][:, mine].double() for part in both]) for i in (0, 1))
            exact = TorchOps(shape).combine(o, lse).o
            wrong += ((self.first[-1].double() - exact).norm() > 5e-3 * exact.norm()).long()

        def call(i: int) -> None:
            if source.random() < 0.125:
                torch.cuda._sleep(source.randrange(20_000))  # cycles
            wrong.add_((side.comm.exchange(self.parts[i], side.ops, "stress") != self.first[i]).any())

        self.graph = captured(side, call, STRESS_SETS, STRESS_LAUNCHES)


if __name__ == "__main__":
    sys.exit(main())
