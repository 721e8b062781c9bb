"""Prefill to decode: a context rank's KV goes, resharded, to the ranks that own it. Both ends read plan.transfers.

Between peers (Plan.shares) the KV takes one way, from where it was computed into the pages that keep it: the receiver
tells its pages, the sender writes into them and replies. Else it is a message that passes through the hosts. What is
told and replied goes over the hosts too; a reply is empty, or says why nothing could be written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from helixc_runtime.events import Emitter
from helixc_runtime.job import Request
from helixc_runtime.kv import KvCache, Row
from helixc_runtime.manifest import REPLY_BYTES, Model, Plan, Rank, Transfer, local_length, scale_bytes
from helixc_runtime.page_writer import PageWriter, owned
from helixc_runtime.scheduler import attends, serving


class HandoffError(RuntimeError):
    """A peer could not write a prompt's KV, and writes no more."""


class HandoffLost(RuntimeError):
    """A peer is gone or silent. It may still write into the pages it was told."""


class Transport(Protocol):
    """Moves one tensor between two global ranks. Messages of one pair carry the request's index as their tag."""

    def isend(self, x: Tensor, rank: int, tag: int) -> Sending:
        """Start sending; `x` must not change until the result's `wait` returns."""
        ...

    def recv(self, x: Tensor, rank: int, tag: int, patience: float | None = None) -> Tensor:
        """Fill `x`, blocking for at most `patience` seconds. Raises RuntimeError then, or if the other rank is gone."""
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
    """Over the world's gloo group; tensors of a GPU pass through the host. Any thread may use it."""

    def isend(self, x: Tensor, rank: int, tag: int) -> Sending:
        buffer = x.cpu().contiguous()
        work = dist.isend(buffer, rank, tag=tag)
        assert work is not None
        return _Sending(work, buffer)

    def recv(self, x: Tensor, rank: int, tag: int, patience: float | None = None) -> Tensor:
        buffer = torch.empty(x.shape, dtype=x.dtype)
        if patience is None:
            dist.recv(buffer, rank, tag=tag)
        else:
            work = dist.irecv(buffer, rank, tag=tag)
            assert work is not None
            work.wait(timedelta(seconds=patience))
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
    target = plan.ranks[serving(plan, "generation", request).ranks[t.target]]
    return torch.stack(owned(plan, rank, t, cached, target))


class Outbox:
    """What a context rank hands over, of one prompt at a time, while it prefills the next one."""

    def __init__(
        self, plan: Plan, rank: Rank, transport: Transport, writer: PageWriter | None, emit: Emitter, patience: float
    ) -> None:
        """`writer`: None where the rank has no peers. `patience`: seconds that writing to one peer may take."""
        self._plan, self._rank, self._transport, self._writer = plan, rank, transport, writer
        self._emit, self._patience = emit, patience
        self._under_way: list[Sending] = []
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "handoff") if writer else None

    def send(self, request: Request, cached: list[Tensor]) -> None:
        """Start to hand over the KV of all this rank's layers, which must stay as it is."""
        peers = []
        for t, target in outgoing(self._plan, self._rank, request):
            if self._plan.shares(self._rank, self._plan.ranks[target]):
                peers.append((t, self._plan.ranks[target]))
                continue
            message = pack(self._plan, self._rank, request, t, cached)
            self._under_way.append(self._transport.isend(message, target, request.index))
            self._emit.emit("handoff", request=request.index, bytes=message.nbytes, way="host")
        if peers:
            assert self._writer and self._thread
            self._writer.follow()
            self._writing = self._thread.submit(self._write_all, request, peers, cached)

    def settle(self) -> None:
        """Wait until all that was sent is taken. Raises HandoffError or HandoffLost."""
        for sending in self._under_way:
            sending.wait()
        self._under_way.clear()
        if self._writing:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """No more is sent."""
        if self._thread:
            self._thread.shutdown()

    @torch.inference_mode()
    def _write_all(self, request: Request, peers: list[tuple[Transfer, Rank]], cached: list[Tensor]) -> None:
        failed = []
        for t, target in peers:  # each of them waits for a reply, whatever becomes of the others
            try:
                self._write(request, t, target, cached)
            except (HandoffError, HandoffLost) as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def _write(self, request: Request, t: Transfer, target: Rank, cached: list[Tensor]) -> None:
        pages = torch.empty(self._plan.most_pages(self._plan.instance_of(target)), dtype=torch.int32)
        pair = _named(request, self._rank, target)
        try:
            self._transport.recv(pages, target.rank, request.index)  # it may be long until the receiver has room
            failure = self._copy(request, t, target, cached, pages)
            self._transport.isend(_reply(failure), target.rank, request.index).wait()
        except HandoffLost:
            raise
        except RuntimeError as error:
            raise HandoffLost(f"{pair}: peer lost: {error}") from error
        if failure:
            raise HandoffError(f"{pair}: {failure}")

    def _copy(self, request: Request, t: Transfer, target: Rank, cached: list[Tensor], pages: Tensor) -> str:
        """What went wrong; empty if all is written. Raises HandoffLost if it may still be written."""
        assert self._writer
        tokens = _tokens(self._plan, request, t)
        try:
            self._writer.write(t, target, cached, pages, tokens)
            self._writer.wait(self._patience)
        except TimeoutError as error:
            raise HandoffLost(f"{_named(request, self._rank, target)}: {error}") from error
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        self._emit.emit("handoff", request=request.index, bytes=self._plan.token_bytes(t) * tokens, way="peer")
        return ""


def receive(
    plan: Plan, rank: Rank, request: Request, row: Row, cache: KvCache, transport: Transport, patience: float
) -> None:
    """Receive all of a request's KV that this rank owns, into the row's pages.

    Peers have `patience` seconds to write. Raises HandoffError, once none of them writes any more, or HandoffLost.
    """
    arriving = list(incoming(plan, rank, request))
    peers = [source for _, source in arriving if plan.shares(plan.ranks[source], rank)]
    told = _tell(plan, rank, request, row, cache, transport, peers)
    for t, source in arriving:
        if source in peers:
            continue
        kv = transport.recv(_empty(plan.model, t, _tokens(plan, request, t), cache.device), source, request.index)
        heads = slice(t.kv_heads[0] - rank.kv_heads[0], t.kv_heads[1] - rank.kv_heads[0])
        for i, layer in enumerate(range(*t.layers)):
            cache.write_prompt(row, layer - rank.layers[0], heads, kv[i])
    failed = []
    for source in peers:
        reply, pair = torch.empty(REPLY_BYTES, dtype=torch.uint8), _named(request, plan.ranks[source], rank)
        try:
            transport.recv(reply, source, request.index, patience)
        except RuntimeError as error:
            raise HandoffLost(f"{pair}: peer lost, or silent for {patience:g} s: {error}") from error
        if said := bytes(reply.tolist()).rstrip(b"\0").decode(errors="replace"):
            failed.append(f"{pair}: {said}")
    for sending in told:
        sending.wait()
    if failed:
        raise HandoffError("; ".join(failed))


def _tell(
    plan: Plan, rank: Rank, request: Request, row: Row, cache: KvCache, transport: Transport, peers: Sequence[int]
) -> list[Sending]:
    """The row's pages to everyone who is to write into them."""
    if not peers:
        return []
    if cache.device.type == "cuda":
        # A step that is under way may still write into pages that were given back: it comes before what peers write.
        torch.cuda.synchronize(cache.device)
    pages = torch.full((plan.most_pages(plan.instance_of(rank)),), -1, dtype=torch.int32)
    own = torch.tensor(cache.pages(row), dtype=torch.int32)
    pages[: len(own)] = own
    return [transport.isend(pages, source, request.index) for source in peers]


def _reply(text: str) -> Tensor:
    """[REPLY_BYTES] uint8: text that is as long as fits, padded with zeros."""
    return torch.tensor(list(text.encode()[:REPLY_BYTES].ljust(REPLY_BYTES, b"\0")), dtype=torch.uint8)


def _named(request: Request, source: Rank, target: Rank) -> str:
    return f"the KV of request {request.index}, from rank {source.rank} to rank {target.rank}"


def _empty(model: Model, t: Transfer, tokens: int, device: torch.device) -> Tensor:
    """An uninitialised message, shaped as `pack` makes it."""
    layers, heads = t.layers[1] - t.layers[0], t.kv_heads[1] - t.kv_heads[0]
    scale = scale_bytes(model.kv_dtype)
    dtype, width = torch.uint8 if scale else getattr(torch, model.kv_dtype), model.arch.head_dim + scale
    shape = (layers, tokens, width) if model.arch.mla else (layers, 2, heads, tokens, width)
    return torch.empty(shape, dtype=dtype, device=device)
