"""What the two processes of test_exchange.py do."""

from __future__ import annotations

import os
import random
import signal
import time

import torch
from torch import Tensor

from bench.pair import Side
from helixc_runtime.comm import PeerTimeout
from helixc_runtime.ops import Norm, Partial, SplitPartial
from helixc_runtime.ops_torch import TorchOps
from tests.gpu.kernel_cases import relative_error

LAYERS = 3
SPLITS = 24  # at most, of all rows of a layer
LOGITS = 5003  # of each rank; odd, so that rows start anywhere


class Step:
    """A captured step of `rows` rows: LAYERS times an exchange and two reductions, then an argmax.

    Its inputs change in place.
    """

    def __init__(self, side: Side, rows: int, norm: Norm) -> None:
        shape, hidden = side.ops.shape, side.plan.model.arch.hidden_size
        self.side, self.rows, self.norm = side, rows, norm
        kind = {"dtype": torch.bfloat16, "device": side.device}
        self.o = torch.zeros(LAYERS, rows, shape.heads, shape.partial_dim, **kind)
        self.lse = torch.zeros(LAYERS, rows, shape.heads, device=side.device)
        self.part_o = torch.zeros(LAYERS, SPLITS, shape.heads, shape.partial_dim, **kind)
        self.part_lse = torch.zeros(LAYERS, SPLITS, shape.heads, device=side.device)
        self.split = torch.zeros(LAYERS, SPLITS, 4, dtype=torch.int32, device=side.device)
        self.count = torch.zeros(LAYERS, 1, dtype=torch.int32, device=side.device)
        self.x = torch.zeros(LAYERS, 2, rows, hidden, **kind)
        self.residual = torch.zeros(rows, hidden, **kind)
        self.logits = torch.zeros(rows, LOGITS, **kind)
        self.outputs: list[Tensor] = []
        self.drawn = 0
        self.run()  # loads what is loaded once
        side.meet()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.run()

    def run(self) -> None:
        comm, ops = self.side.comm, self.side.ops
        self.outputs = []
        comm.begin_step()
        for layer in range(LAYERS):
            merged = comm.exchange(self.partial(layer), ops, f"layer {layer} partials")
            first = comm.reduce(self.x[layer, 0], self.residual, None, self.norm, ops, f"layer {layer} o_proj")
            second = comm.reduce(self.x[layer, 1], None, self.norm.weight, None, ops, f"layer {layer} FFN")
            self.outputs += [merged, *first, second[0]]
        self.outputs.append(comm.argmax(self.logits, self.side.index * LOGITS, ops, "tokens"))
        comm.end_step()

    def partial(self, layer: int) -> SplitPartial:
        own = (each[layer] for each in (self.part_o, self.part_lse, self.split, self.count))
        return SplitPartial(Partial(self.o[layer], self.lse[layer]), *own, merge=lambda: None)

    def draw(self, generator: torch.Generator) -> list[Tensor]:
        """New inputs, and what must come of them in float64: both sides draw what both of them send."""
        side, wanted, source = self.side, [], random.Random(generator.initial_seed() + self.drawn)
        self.drawn += 1
        heads = self.o.shape[2] // 2
        mine = slice(side.index * heads, (side.index + 1) * heads)

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device=side.device).to(like.dtype)

        self.residual.copy_(normal(self.residual))
        for layer in range(LAYERS):
            parts = [(normal(self.o[layer]), 4 * normal(self.lse[layer])) for _ in range(2)]
            splits = [(normal(self.part_o[layer]), 4 * normal(self.part_lse[layer])) for _ in range(2)]
            whole = []  # of both sides, in float64
            for member, ((o, lse), (part_o, part_lse)) in enumerate(zip(parts, splits, strict=True)):
                empty = torch.rand(self.rows, generator=generator, device=side.device) < 0.2
                o.masked_fill_(empty.view(-1, 1, 1), torch.nan)
                lse.masked_fill_(empty.unsqueeze(1), -torch.inf)
                whole.append((o.double(), lse.double()))
                rows = random_split_rows(self.rows, source)
                for row, begin, count in rows:
                    own = slice(begin, begin + count)
                    each = (t[own].double().unsqueeze(1) for t in (part_o, part_lse))
                    whole[-1][0][row], whole[-1][1][row] = (t[0] for t in TorchOps(side.ops.shape).combine(*each))
                    o[row], lse[row] = torch.nan, torch.nan
                if member == side.index:
                    self.part_o[layer], self.part_lse[layer] = part_o, part_lse
                    self.count[layer] = len(rows)
                    for place, given in enumerate(rows):
                        self.split[layer, place, :3] = torch.tensor(given, dtype=torch.int32)
            sums = [[normal(self.residual) for _ in range(2)] for _ in range(2)]
            self.o[layer], self.lse[layer] = parts[side.index]
            self.x[layer, 0], self.x[layer, 1] = sums[side.index]
            o, lse = (torch.stack([part[i][:, mine] for part in whole]) for i in (0, 1))
            first, second = (sums[0][i].double() + sums[1][i].double() for i in range(2))
            weight, oracle = self.norm.weight.double(), TorchOps(side.ops.shape)
            exact = oracle.add_norm(first, self.residual.double(), None, Norm(weight, self.norm.eps))
            wanted += [oracle.combine(o, lse).o, *exact, second + weight]
        logits = [normal(self.logits) for _ in range(2)]  # of so many that equal ones are common
        self.logits.copy_(logits[side.index])
        wanted.append(torch.cat(logits, dim=1).float().argmax(-1).double())
        return wanted


def random_split_rows(rows: int, source: random.Random) -> list[tuple[int, int, int]]:
    """(row, first split, splits) of some rows, in their order."""
    found, given = [], 0
    for row in range(rows):
        count = source.choice([0, 0, 0, 2, 3, 5, SPLITS]) if rows < SPLITS else source.choice([0] * 9 + [2, 3])
        if count and given + count <= SPLITS:
            found.append((row, given, count))
            given += count
    return found


def make_norm(side: Side) -> Norm:
    generator = torch.Generator(side.device).manual_seed(side.seed)
    hidden = side.plan.model.arch.hidden_size
    weight = torch.randn(hidden, generator=generator, device=side.device).bfloat16()
    return Norm(weight, side.plan.model.arch.norm_eps)


def random_steps(side: Side, sizes: list[int], count: int) -> float:
    """The largest relative error of `count` replayed steps of random sizes and content, with random delays."""
    norm = make_norm(side)
    steps = {rows: Step(side, rows, norm) for rows in sizes}
    generator = torch.Generator(side.device).manual_seed(side.seed)
    common, own = random.Random(side.seed), random.Random(side.seed + 1 + side.index)
    worst = torch.zeros((), dtype=torch.float64, device=side.device)
    for _ in range(count):
        step = steps[common.choice(sizes)]
        wanted = step.draw(generator)
        if own.random() < 0.3:
            torch.cuda._sleep(own.randrange(200_000))  # cycles
        if own.random() < 0.02:
            time.sleep(own.random() * 0.005)
        step.graph.replay()
        for got, want in zip(step.outputs, wanted, strict=True):
            error = (got.double() - want).norm() / want.norm().clamp(min=1e-9)
            if got.dtype == torch.int64:
                error = 1e9 * (got != want).any()
            worst = torch.maximum(worst, error.nan_to_num(nan=1e9))
    side.meet()
    side.comm.check()
    return float(worst)


def with_a_fault(side: Side, fault: str) -> tuple[str, float]:
    """Rank 1 stops to take part after some steps; how rank 0 learns of it, and after how many seconds."""
    step = Step(side, 4, make_norm(side))
    for _ in range(5):
        step.graph.replay()
    side.meet()
    side.comm.check()
    if side.index == 1:
        if fault in ("SIGKILL", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, fault))
        time.sleep(float(fault))
    started = time.monotonic()
    try:
        step.graph.replay()
        torch.cuda.synchronize(side.device)
        side.comm.check()
    except PeerTimeout as error:
        return str(error), time.monotonic() - started
    return "nothing was noticed", time.monotonic() - started


def eager_equals_captured(side: Side) -> float:
    """The same inputs, launched and replayed, in turn: the largest difference, which must be none."""
    step = Step(side, 7, make_norm(side))
    generator = torch.Generator(side.device).manual_seed(side.seed)
    worst = 0.0
    for _ in range(20):
        step.draw(generator)
        step.graph.replay()
        captured, eager = [output.clone() for output in step.outputs], step.outputs
        step.run()
        worst = max(worst, *(float(relative_error(a, b)) for a, b in zip(captured, step.outputs, strict=True)))
        step.outputs = eager
    side.meet()
    return worst
