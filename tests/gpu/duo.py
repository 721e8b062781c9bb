"""Both ranks of a cp group in one process and on one GPU: a stream and an inbox each, in one address space.

Small enough for NVIDIA's compute-sanitizer, which knows nothing of memory that another process shares. The ranks wait
for each other, so their kernels run side by side, and all thread blocks that wait must fit on the GPU together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helixc_runtime import one_sided
from helixc_runtime.attention_shape import attention_shape
from helixc_runtime.comm import Comm, GroupName
from helixc_runtime.manifest import Plan
from helixc_runtime.one_sided import OneSidedComm
from helixc_runtime.ops_cuda import CudaOps
from helixc_runtime.peer_memory import NOTHING

ROWS, PATIENCE_S = 8, 120.0  # a sanitizer takes its time


class Duo:
    """The Comm and Ops of two ranks of `plan`, and what lies in their inboxes."""

    def __init__(self, plan: Plan, folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inboxes: dict[GroupName, list[Tensor]] = {}
        monkeypatch.setattr(one_sided, "open_inboxes", self._open)
        self.plan, self.device = plan, device
        self.shape = attention_shape(plan.model, plan.ranks[0], plan.tokens_per_block)
        self.comms = [
            OneSidedComm(rank, {}, plan.instances[0], plan.kernels, folder, device, PATIENCE_S) for rank in plan.ranks
        ]
        self.ops = [CudaOps(self.shape, plan.kernels, folder, device) for _ in plan.ranks]
        self.streams = [torch.cuda.Stream(device) for _ in plan.ranks]
        for comm in self.comms:  # torch's kernels are loaded when they first run
            comm.end_step()
            torch.zeros(1, device=device).add_(1)

    def _open(self, size: int, group: GroupName, members: int, index: int, comm: Comm, device: torch.device) -> Tensor:
        if group not in self.inboxes:
            empty = NOTHING - (1 << 32)  # as int32
            made = [torch.full((size // 4,), empty, dtype=torch.int32, device=device) for _ in range(members)]
            self.inboxes[group] = made
        return torch.tensor([inbox.data_ptr() for inbox in self.inboxes[group]], device=device)

    def step(self, body: Callable[[int, OneSidedComm, CudaOps], Sequence[Tensor]]) -> list[Sequence[Tensor]]:
        """What `body(rank, comm, ops)`, the launches of one step, gives for both ranks.

        Captured first: while one rank's kernel waits for the other's, the host must neither allocate nor load.
        """
        graphs, results = [], []
        for rank, (comm, ops, stream) in enumerate(zip(self.comms, self.ops, self.streams, strict=True)):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], stream=stream, capture_error_mode="thread_local"):
                comm.begin_step()
                results.append(body(rank, comm, ops))
                comm.end_step()
        torch.cuda.synchronize(self.device)
        for graph, stream in zip(graphs, self.streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize(self.device)
        for comm in self.comms:
            comm.check()
        return results

    def at_rest(self) -> bool:
        """Nothing lies unread."""
        return all(bool((inbox == NOTHING - (1 << 32)).all()) for pair in self.inboxes.values() for inbox in pair)
