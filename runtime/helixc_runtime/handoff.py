"""Prefill to decode: a context rank's KV goes, resharded, to the ranks that own it. Both ends read plan.transfers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from helixc_runtime import quantize
from helixc_runtime.job import Request
from helixc_runtime.kv import KvCache, Row
from helixc_runtime.manifest import Model, Plan, Rank, Transfer, local_length, owner, scale_bytes
from helixc_runtime.scheduler import attends, serving


class Transport(Protocol):
    """Moves one tensor between two global ranks. Messages of one pair carry the request's index as their tag."""

    def isend(self, x: Tensor, rank: int, tag: int) -> Sending:
        """Start sending; `x` must not change until the result's `wait` returns."""
        ...

    def recv(self, x: Tensor, rank: int, tag: int) -> Tensor:
        """Fill `x`, blocking."""
        ...


class Sending(Protocol):
    """A send under way."""

    def wait(self) -> object: ...


@dataclass(frozen=True, slots=True)
class _Sending:
    work: dist.Work
    buffer: Tensor  # kept alive until it is sent

    def wait(self) -> None:
        self.work.wait()


class DistTransport:
    """Over the world's gloo group; tensors of a GPU pass through the host."""

    def isend(self, x: Tensor, rank: int, tag: int) -> Sending:
        buffer = x.cpu().contiguous()
        work = dist.isend(buffer, rank, tag=tag)
        assert work is not None
        return _Sending(work, buffer)

    def recv(self, x: Tensor, rank: int, tag: int) -> Tensor:
        buffer = torch.empty(x.shape, dtype=x.dtype)
        dist.recv(buffer, rank, tag=tag)
        return x.copy_(buffer)


def outgoing(plan: Plan, rank: Rank, request: Request) -> Iterator[tuple[Transfer, int]]:
    """(transfer, global rank to send to) of every message context rank `rank` sends for `request`."""
    yield from (
        (t, target)
        for t, source, target in _messages(plan, request)
        if source == rank.rank and _tokens(plan, request, t) > 0
    )


def incoming(plan: Plan, rank: Rank, request: Request) -> Iterator[tuple[Transfer, int]]:
    """(transfer, global rank to receive from) of every message generation rank `rank` gets for `request`."""
    yield from (
        (t, source)
        for t, source, target in _messages(plan, request)
        if target == rank.rank and _tokens(plan, request, t) > 0
    )


def _messages(plan: Plan, request: Request) -> Iterator[tuple[Transfer, int, int]]:
    context, generation = serving(plan, "context", request), serving(plan, "generation", request)
    for t in plan.transfers:
        source, target = plan.ranks[context.ranks[t.source]], plan.ranks[generation.ranks[t.target]]
        if attends(plan, context, source, request) and attends(plan, generation, target, request):
            yield t, source.rank, target.rank


def _tokens(plan: Plan, request: Request, t: Transfer) -> int:
    cp = serving(plan, "generation", request).cp
    return local_length(len(request.token_ids), plan.tokens_per_block, cp, t.cp_rank)


def pack(plan: Plan, rank: Rank, request: Request, t: Transfer, cached: list[Tensor]) -> Tensor:
    """One message: [layers, *kv of the owned positions], from the KV of context rank `rank`'s layers, as it is cached.

    An FP8 cache is sent as it is stored, elements and scale of each vector, so that both sides name the same bytes.
    """
    cp, length = serving(plan, "generation", request).cp, len(request.token_ids)
    positions = torch.arange(length, device=cached[0].device)
    own = positions[owner(positions, plan.tokens_per_block, cp) == t.cp_rank]
    layers = cached[t.layers[0] - rank.layers[0] : t.layers[1] - rank.layers[0]]
    heads = slice(t.kv_heads[0] - rank.kv_heads[0], t.kv_heads[1] - rank.kv_heads[0])
    kv = torch.stack([kv[own] if plan.model.arch.mla else kv[:, heads, own] for kv in layers])
    return quantize.pack(kv) if plan.model.kv_dtype == "float8_e4m3fn" else kv.to(getattr(torch, plan.model.kv_dtype))


def receive(plan: Plan, rank: Rank, request: Request, row: Row, cache: KvCache, transport: Transport) -> None:
    """Receive all of a request's KV that this rank owns, into the row's pages."""
    for t, source in incoming(plan, rank, request):
        kv = transport.recv(_empty(plan.model, t, _tokens(plan, request, t), cache.device), source, request.index)
        heads = slice(t.kv_heads[0] - rank.kv_heads[0], t.kv_heads[1] - rank.kv_heads[0])
        for i, layer in enumerate(range(*t.layers)):
            cache.write_prompt(row, layer - rank.layers[0], heads, kv[i])


def _empty(model: Model, t: Transfer, tokens: int, device: torch.device) -> Tensor:
    """An uninitialised message, shaped as `pack` makes it."""
    layers, heads = t.layers[1] - t.layers[0], t.kv_heads[1] - t.kv_heads[0]
    scale = scale_bytes(model.kv_dtype)
    dtype, width = torch.uint8 if scale else getattr(torch, model.kv_dtype), model.arch.head_dim + scale
    shape = (layers, tokens, width) if model.arch.mla else (layers, 2, heads, tokens, width)
    return torch.empty(shape, dtype=dtype, device=device)
