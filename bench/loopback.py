"""Comms of a rank that runs alone: every peer answers with what this rank sends it, at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from helixc_runtime.artifact import Artifact
from helixc_runtime.comm import Comm, Connection, GroupName, TorchComm
from helixc_runtime.manifest import Rank
from helixc_runtime.one_sided import OneSidedComm, message_bytes
from helixc_runtime.ops import Partial
from helixc_runtime.ops_cuda import EXCHANGES
from helixc_runtime.peer_memory import NOTHING


class Loopback(OneSidedComm):
    """The kernels of OneSidedComm, on a GPU alone.

    Each peer's inbox is this rank's own, so many messages further on that what is sent to the peer lands where the
    peer's message is awaited.
    """

    def __init__(self, *arguments: Any) -> None:
        """As OneSidedComm."""
        self.inboxes: list[Tensor] = []
        super().__init__(*arguments)

    def open_inboxes(self, message: int, group: GroupName, members: int, index: int) -> Tensor:
        empty, device = NOTHING - (1 << 32), self._device  # as int32
        self.inboxes.append(torch.full((2 * members * message // 4,), empty, dtype=torch.int32, device=device))
        return self.inboxes[-1].data_ptr() + message * (torch.arange(members, device=device) - index)

    def messages(self, rows: int) -> list[tuple[str, int, int]]:
        """Of one step of so many rows: exchange, reduce or argmax, bytes to a peer, and how many of them."""
        kinds = [(kind.kernel, kind.sent) for kind in self._kinds]
        return [("exchange" if k.template in EXCHANGES else k.template, message_bytes(k, rows), n) for k, n in kinds]


class Echo(TorchComm):
    """The same for the CPU."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank, {})

    def all_reduce(self, x: Tensor, group: GroupName) -> Tensor:
        return x.mul_(len(getattr(self.rank.groups, group)))

    def all_gather(self, x: Tensor, group: GroupName) -> Tensor:
        return x.expand(len(getattr(self.rank.groups, group)), *x.shape)

    def all_to_all(self, partial: Partial) -> Partial:
        cp = len(self.rank.groups.cp)
        return Partial(*(t.view(len(t), cp, -1, *t.shape[2:]).transpose(0, 1).contiguous() for t in partial))


def alone(artifact: Artifact, rank: Rank, device: torch.device, patience: float) -> Comm:
    """What make_comm makes, for a rank without its peers."""
    if device.type == "cpu":
        return Echo(rank)
    return Loopback(
        rank, {}, artifact.plan.instance_of(rank), artifact.plan.kernels_of(rank), artifact.directory, device, patience
    )


@contextmanager
def world_of_one() -> Iterator[Connection]:
    """torch.distributed with nobody else."""
    store = TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield Connection({}, dist.new_group([0]), store)
    finally:
        dist.destroy_process_group()
