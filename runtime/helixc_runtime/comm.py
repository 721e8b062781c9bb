"""The seam between ranks: the collectives of one decode step over torch.distributed (gloo or NCCL)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from helixc_runtime.manifest import Groups, Plan, Rank
from helixc_runtime.ops import Norm, Ops, Partial, SplitPartial

# Its name until torch 2.12 is deprecated since.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

GroupName = Literal["tp", "cp", "pp", "ffn_tp", "moe_tp", "moe_ep"]


class PeerTimeout(RuntimeError):
    """Another rank of a group did not send its part of a decode step in time."""


class Comm(Protocol):
    """What the model asks of the other ranks of its instance. All ranks of a group call in the same order."""

    def all_reduce(self, x: Tensor, group: GroupName) -> Tensor:
        """Sum of `x` over the group, in place."""
        ...

    def all_gather(self, x: Tensor, group: GroupName) -> Tensor:
        """[n, *x.shape]: every member's `x`, in group order."""
        ...

    def begin_step(self) -> None:
        """The exchanges and reductions from here to end_step are those of one decode step."""
        ...

    def exchange(self, partial: Partial | SplitPartial, ops: Ops, what: str, out: Tensor | None = None) -> Tensor:
        """Attention over the KV of all cp ranks, of the heads that this rank keeps: partial [B, H, P] -> [B, H / C, P].

        `ops` merges what no kernel merges as it arrives. `what`, such as "layer 3 partials", is for errors. `out` is
        filled and returned, if given: some rows of a batch whose other rows may be attended meanwhile. The exchanges of
        a rank must not overlap each other, on whatever streams they are.
        """
        ...

    def reduce(
        self, x: Tensor, residual: Tensor | None, bias: Tensor | None, norm: Norm | None, ops: Ops, what: str
    ) -> tuple[Tensor, Tensor]:
        """Ops.add_norm of the sum of `x` [B, hidden] over the ffn_tp group. `ops`, `what`: as for exchange."""
        ...

    def argmax(self, x: Tensor, first: int, ops: Ops, what: str, out: Tensor | None = None) -> Tensor:
        """[N] int64: of each row, which column of the ffn_tp group's is the largest; of equal ones the first.

        x [N, V] are this rank's columns, from column `first` of all. `ops`, `what`: as for exchange. `out` is filled
        and returned, if given.
        """
        ...

    def end_step(self) -> None:
        """See begin_step."""
        ...

    def check(self) -> None:
        """Raise PeerTimeout if a step that the GPU has finished waited in vain for a peer. Does not wait for it."""
        ...

    def send(self, x: Tensor, rank: int) -> None:
        """Send `x` to a global rank."""
        ...

    def recv(self, x: Tensor, rank: int) -> Tensor:
        """Fill `x` from a global rank."""
        ...


@dataclass(frozen=True, slots=True)
class Connection:
    """The process groups of one rank. `compute` moves tensors of the compute device, `control` (gloo) host tensors."""

    compute: dict[str, dist.ProcessGroup]
    control: dist.ProcessGroup  # all ranks of the instance, over gloo
    store: TCPStore  # of the whole deployment


def connect(plan: Plan, rank: Rank, device: torch.device, timeout: timedelta) -> Connection:
    """Join the world of the plan and make this rank's groups. Uses torchrun's environment variables.

    The world itself is gloo: context and generation ranks may share a GPU, which NCCL refuses in one communicator.
    """
    world = len(plan.ranks)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, world, is_master=rank.rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank.rank, world_size=world, timeout=timeout)
    made: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}

    def group(backend: str, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        key = (backend, ranks)
        if key not in made:
            made[key] = dist.new_group(list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True)
        return made[key]

    control = group("gloo", plan.instance_of(rank).ranks)
    compute = {
        field.name: group(backend_for(plan, ranks, device), ranks)
        for field in fields(Groups)
        if len(ranks := getattr(rank.groups, field.name)) > 1
    }
    return Connection(compute, control, store)


def backend_for(plan: Plan, ranks: tuple[int, ...], device: torch.device) -> Literal["gloo", "nccl"]:
    """What moves the tensors of `device` in a group: NCCL refuses ranks that share a GPU, as tests let them."""
    gpus = {(plan.ranks[rank].node, plan.ranks[rank].device) for rank in ranks}
    return "nccl" if device.type == "cuda" and len(gpus) == len(ranks) else "gloo"


class TorchComm:
    """Comm over torch.distributed. Groups of one rank cost nothing. A peer that is gone is the backend's to notice."""

    def __init__(self, rank: Rank, groups: Mapping[str, dist.ProcessGroup]) -> None:
        self.rank = rank
        self.groups = groups

    def all_reduce(self, x: Tensor, group: GroupName) -> Tensor:
        if group in self.groups:
            dist.all_reduce(x, group=self.groups[group])
        return x

    def all_gather(self, x: Tensor, group: GroupName) -> Tensor:
        if group not in self.groups:
            return x.unsqueeze(0)
        size = len(getattr(self.rank.groups, group))
        out = x.new_empty(size * x.shape[0], *x.shape[1:])
        _all_gather(out, x.contiguous(), group=self.groups[group])
        return out.view(size, *x.shape)

    def begin_step(self) -> None: ...

    def end_step(self) -> None: ...

    def check(self) -> None: ...

    def exchange(self, partial: Partial | SplitPartial, ops: Ops, what: str, out: Tensor | None = None) -> Tensor:
        received = self.all_to_all(partial.merged())
        merged = ops.combine(received.o, received.lse).o
        return merged if out is None else out.copy_(merged)

    def reduce(
        self, x: Tensor, residual: Tensor | None, bias: Tensor | None, norm: Norm | None, ops: Ops, what: str
    ) -> tuple[Tensor, Tensor]:
        return ops.add_norm(self.all_reduce(x, "ffn_tp"), residual, bias, norm)

    def argmax(self, x: Tensor, first: int, ops: Ops, what: str, out: Tensor | None = None) -> Tensor:
        if "ffn_tp" not in self.groups:
            return ops.argmax(x, out)
        largest, at = x.max(dim=-1)
        gathered = self.all_gather(torch.stack((largest.double(), (at + first).double())), "ffn_tp")  # [n, 2, N]
        owner = gathered[:, 0].argmax(0, keepdim=True)
        found = gathered[:, 1].gather(0, owner).squeeze(0).long()
        return found if out is None else out.copy_(found)

    def all_to_all(self, partial: Partial) -> Partial:
        """Over the cp group: [B, H, P] of all heads -> [C, B, H / C, P], each rank's partial of my heads."""
        cp = len(self.rank.groups.cp)
        rows, heads, width = partial.o.shape
        if cp == 1:
            return Partial(*(t.unsqueeze(0).contiguous() for t in partial))
        # O and LSE of one destination travel together, as bytes: one all-to-all a layer.
        o = _by_destination(partial.o.view(rows, cp, heads // cp, width))
        lse = _by_destination(partial.lse.view(rows, cp, heads // cp))
        sent = torch.cat([o.view(torch.uint8), lse.view(torch.uint8)], dim=1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.groups["cp"])
        split = o.shape[1] * o.element_size()
        o_all = received[:, :split].contiguous().view(o.dtype).view(cp, rows, heads // cp, width)
        lse_all = received[:, split:].contiguous().view(torch.float32).view(cp, rows, heads // cp)
        return Partial(o_all, lse_all)

    def send(self, x: Tensor, rank: int) -> None:
        dist.send(x.contiguous(), rank, group=self.groups["pp"])

    def recv(self, x: Tensor, rank: int) -> Tensor:
        dist.recv(x, rank, group=self.groups["pp"])
        return x


def _by_destination(x: Tensor) -> Tensor:
    """[B, C, ...] -> [C, B * ...], to be viewed as bytes: in fresh memory, as with one head a rank `reshape` would give
    a strided view.
    """
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).view(x.shape[1], -1)
