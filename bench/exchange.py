"""Exchange and reduction between two GPUs: `python bench/exchange.py [--out FILE] [--stress N]`.

Two processes, a GPU each. Every time is that of one call among LAUNCHES in a CUDA graph that both replay at once,
inputs rotated; medians of rank 0. The peer is NCCL on inputs that lie as it wants them, with torch's arithmetic after
it, and with ours. Where attention leaves splits, their merge within the exchange is compared with the merge before it:
alone, on splits in the L2 as attention leaves them, and with the attention before it.

`--only OP` measures a part. `--stress N` runs N exchanges with random delays instead, each checked by its content, and
writes nothing.
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

from bench.gpu_timing import earlier_rows, machine  # noqa: E402
from bench.pair import Side, compiled, pair_plan, run_pair, values  # noqa: E402
from helixc.codegen.problem import exchange  # noqa: E402
from helixc_runtime.attention_shape import attention_shape  # noqa: E402
from helixc_runtime.cubin import device_arch  # noqa: E402
from helixc_runtime.manifest import Kernel  # noqa: E402
from helixc_runtime.one_sided import OneSidedComm  # noqa: E402
from helixc_runtime.ops import DecodeBatch, LayerCache, Norm, Partial  # noqa: E402
from helixc_runtime.ops_torch import TorchOps  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "exchange.json"
GOALS_US = {1: 6.0, 4: 7.0, 16: 11.0, 64: 24.0}  # exchange and combine of 128 heads x 512, by rows
OPS = ("exchange", "merge_exchange", "reduce")
REDUCE_ROWS = (1, 8, 64, 256, 1024)
MODELS = {"deepseek-v3": 7168, "deepseek-v3-lite": 2048}  # hidden size
LOCAL_TOKENS = {  # of one rank's rows, of which attention makes splits; of the last two, none
    "1x64k": [1 << 16],
    "1x4k": [1 << 12],
    "3x32k": [1 << 15] * 3,
    "8x32k": [1 << 15] * 8,
    "32x8k": [1 << 13] * 32,
    "1x64, no splits": [64],
    "64x64, no splits": [64] * 64,
}
SETS, LAUNCHES, REPLAYS = 4, 120, 15
STRESS_SETS, STRESS_LAUNCHES = 5, 200  # an odd number of sets: each goes through both halves of the inboxes

Calls = dict[str, Callable[[int], object]]  # by name: the call on its i-th set of inputs


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results. Returns 1 if the stress run found a wrong exchange."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--only", choices=OPS, action="append", help="measure these, and keep what there is of the others"
    )
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
            shape = attention_shape(plan.model, plan.ranks[0], plan.tokens_per_block)
            (plain,) = compiled([exchange(shape, 2, arch)], folder)
            rows += values(run_pair(measure, plan, folder, plain, options.only, deadline=300))[0]
    result = machine() | {"rows": rows}
    if options.only:
        kept = [row for row in earlier_rows(options.out, result) if row["op"] not in options.only]
        result["rows"] = sorted(kept + rows, key=lambda row: OPS.index(row["op"]))
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    missed = [row for row in rows if row["op"] == "exchange" and row["ours_us"] > row["goal_us"]]
    print(f"goals missed: {len(missed)}")
    return 0


# --- Times ------------------------------------------------------------------------------------------------------


def measure(side: Side, plain: Kernel, only: Sequence[str] | None) -> list[dict[str, Any]]:
    """All rows of one model. `plain`: the exchange that merges no splits."""
    found, hidden, heads = [], side.plan.model.arch.hidden_size, side.ops.shape.heads
    ops = [op for op in OPS if op in (only or OPS)]
    if "exchange" in ops and heads == 128:
        for rows, goal in GOALS_US.items():
            times = medians(side, exchanges(side, rows))
            found.append({"op": "exchange", "rows": rows, "heads": 128, "width": 512, **times, "goal_us": goal})
            report(side, found[-1])
    if "merge_exchange" in ops:
        kernels = (plain, *(kernel for kernel in side.plan.kernels if kernel.template != "merge_exchange"))
        instance, rank = side.plan.instances[0], side.plan.ranks[side.index]
        separate = OneSidedComm(rank, side.comm.groups, instance, kernels, side.folder, side.device, 20.0)
        cache = random_cache(side, max(map(sum, LOCAL_TOKENS.values())))
        for case, lengths in LOCAL_TOKENS.items():
            times = merges(side, separate, cache, lengths)
            found.append({"op": "merge_exchange", "case": case, "heads": heads, **times})
            report(side, found[-1])
    if "reduce" in ops:
        for rows in REDUCE_ROWS:
            found.append({"op": "reduce", "rows": rows, "hidden": hidden, **medians(side, reductions(side, rows))})
            report(side, found[-1])
    return found


def report(side: Side, row: dict[str, Any]) -> None:
    if side.index == 0:
        print(json.dumps(row), flush=True)


def exchanges(side: Side, rows: int) -> Calls:
    """An exchange and the merge of what arrives."""
    shape, group = side.ops.shape, side.comm.groups.get("cp")
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


def merges(side: Side, separate: OneSidedComm, cache: LayerCache, lengths: list[int]) -> dict[str, float]:
    """Microseconds of merge and exchange, alone and behind attention, by one kernel and by two."""
    device, ops, block = side.device, side.ops, side.plan.tokens_per_block
    tokens = torch.tensor(lengths, dtype=torch.int32, device=device)
    pages = torch.arange(sum(lengths) // block, dtype=torch.int32, device=device)
    table = torch.zeros(len(lengths), max(lengths) // block, dtype=torch.int32, device=device)
    for row, own in enumerate(pages.split([n // block for n in lengths])):
        table[row, : len(own)] = own
    batch = DecodeBatch(tokens, tokens, table, tokens, tokens, tokens)  # attention reads lengths and pages only
    q = normal(side, len(lengths), ops.shape.heads, ops.shape.head_dim)
    ops.begin_step(batch)
    split = ops.attend_split(q, cache, batch)

    def by_two(i: int) -> object:
        return separate.exchange(split, ops, "partials")

    def by_one(i: int) -> object:
        return side.comm.exchange(split, ops, "partials")

    for comm in (side.comm, separate):
        comm.begin_step()
    one, two = (comm.exchange(split, ops, "partials").double() for comm in (side.comm, separate))
    assert (one - two).norm() <= 5e-3 * two.norm(), "one kernel gives another result than two"
    for comm in (side.comm, separate):
        comm.end_step()

    def attend_by_two(i: int) -> object:
        return separate.exchange(ops.attend_split(q, cache, batch), ops, "partials")

    def attend_by_one(i: int) -> object:
        return side.comm.exchange(ops.attend_split(q, cache, batch), ops, "partials")

    calls: Calls = {"one": by_one, "two": by_two, "attend_one": attend_by_one, "attend_two": attend_by_two}
    return medians(side, calls, separate)


def random_cache(side: Side, tokens: int) -> LayerCache:
    """Pages for so many tokens of one layer."""
    shape = side.ops.shape
    return LayerCache(normal(side, tokens // shape.block, shape.block, shape.head_dim), None)


def reductions(side: Side, rows: int) -> Calls:
    """The sum of both ranks, added to the residual stream and normed."""
    hidden, eps = side.plan.model.arch.hidden_size, side.plan.model.arch.norm_eps
    x, residual = ([normal(side, rows, hidden) for _ in range(SETS)] for _ in range(2))
    norm, group = Norm(normal(side, hidden), eps), side.comm.groups.get("ffn_tp")

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


def medians(side: Side, calls: Calls, *comms: OneSidedComm) -> dict[str, float]:
    """Microseconds of one call of each, replayed in turn. `comms`: what they use beside the side's own."""
    graphs = {name: captured(side, call, SETS, LAUNCHES, *comms) for name, call in calls.items()}
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
    for comm in (side.comm, *comms):
        comm.check()
    return {f"{name}_us": round(statistics.median(times[1:]), 2) for name, times in seen.items()}


def captured(
    side: Side, call: Callable[[int], object], sets: int, launches: int, *comms: OneSidedComm
) -> torch.cuda.CUDAGraph:
    """A graph of so many calls, one step to the side's Comm and to `comms`."""

    def step(count: int) -> None:
        for comm in (side.comm, *comms):
            comm.begin_step()
        for i in range(count):
            call(i % sets)
        for comm in (side.comm, *comms):
            comm.end_step()

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
