"""A million exchanges and sums of two ranks in one process on one GPU, with random delays; all contents checked.

What a rank sends is made of whole numbers that follow from how many messages there have been, on the device, within the
captured graph. All arithmetic on them is exact, so that a message that is lost, late or torn differs.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.pair import pair_plan
from helixc_runtime.ops import Partial
from tests.gpu.duo import ROWS, Duo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

MESSAGES, OF_A_STEP, STEPS_UNCHECKED = 1_000_000, 64, 500
SIZES = (1, 3, ROWS)  # rows of a step
DELAYED = 2  # graphs of each size, with other delays
LONGEST = 20_000  # clock cycles of a delay


class Sender:
    """One rank's steps: a graph for each size and pattern of delays. `turn` steps have been, `wrong` numbers came."""

    def __init__(self, duo: Duo, rank: int, draw: random.Random) -> None:
        self.duo, self.rank = duo, rank
        self.turn, self.wrong = (torch.zeros((), dtype=torch.int64, device=duo.device) for _ in range(2))
        self.graphs = {rows: [self.captured(rows, draw) for _ in range(DELAYED)] for rows in SIZES}

    def captured(self, rows: int, draw: random.Random) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.duo.streams[self.rank], capture_error_mode="thread_local"):
            self.step(rows, {draw.randrange(OF_A_STEP): draw.randrange(LONGEST) for _ in range(3)})
        return graph

    def step(self, rows: int, delays: dict[int, int]) -> None:
        """`delays`: clock cycles before some of the step's messages."""
        duo, comm, ops = self.duo, self.duo.comms[self.rank], self.duo.ops[self.rank]
        shape, hidden = duo.shape, duo.plan.model.arch.hidden_size
        partials = [self.numbers(rank, rows, shape.heads, shape.partial_dim) for rank in (0, 1)]
        addends = [self.numbers(rank, rows, hidden) for rank in (0, 1)]
        lse = torch.full((rows, shape.heads), 3.0, device=duo.device)
        merged, sums = [], []
        comm.begin_step()
        for i in range(OF_A_STEP):
            if i in delays:
                torch.cuda._sleep(delays[i])
            merged.append(comm.exchange(Partial(partials[self.rank][i], lse), ops, f"exchange {i}"))
            sums.append(comm.reduce(addends[self.rank][i], None, None, None, ops, f"sum {i}")[0])
        comm.end_step()
        heads = shape.heads // 2
        mine = slice(self.rank * heads, (self.rank + 1) * heads)
        mean = (partials[0][:, :, mine] + partials[1][:, :, mine]) / 2
        for got, want in ((merged, mean), (sums, addends[0] + addends[1])):
            self.wrong += (torch.stack(got) != want).sum()
        self.turn += 1

    def numbers(self, rank: int, *shape: int) -> Tensor:
        """[OF_A_STEP, *shape] bfloat16 from 0 to 60: what `rank` sends in the messages of this turn."""
        size = OF_A_STEP * torch.Size(shape).numel()
        each = torch.arange(size, dtype=torch.int32, device=self.duo.device).view(OF_A_STEP, *shape)
        return ((each * 17 + self.turn.int() * 7 + rank * 29) % 61).bfloat16()


@pytest.mark.parametrize("model", ["deepseek-v3-lite", "llama-3.1-8b"])
def test_a_million_messages(model: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pair_plan(model, tmp_path, "sm_90a", ROWS)
    duo = Duo(plan, tmp_path, torch.device("cuda", torch.cuda.current_device()), monkeypatch)
    draw = random.Random(seed)
    senders = [Sender(duo, rank, draw) for rank in (0, 1)]

    def run(steps: int) -> list[int]:
        for _ in range(steps):
            rows = draw.choice(SIZES)
            for sender in draw.sample(senders, 2):
                with torch.cuda.stream(duo.streams[sender.rank]):
                    draw.choice(sender.graphs[rows]).replay()
        torch.cuda.synchronize(duo.device)
        for comm in duo.comms:
            comm.check()
        return [int(sender.wrong) for sender in senders]

    for _ in range(0, MESSAGES, OF_A_STEP * STEPS_UNCHECKED):
        assert run(STEPS_UNCHECKED) == [0, 0], f"{seed=}"
    assert duo.at_rest()
    senders[1].turn += 1  # of another turn than rank 0's
    assert min(run(1)) > 0
