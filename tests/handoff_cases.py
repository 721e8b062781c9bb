"""A prompt's KV of any deployment, drawn at random, and what the caches of its owners have to hold afterwards."""

from __future__ import annotations

import queue
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helixc.model import read_model
from helixc.plan.lower import lower
from helixc.plan.place import place
from helixc.spec.spec import Hardware
from helixc_runtime.handoff import Outbox, receive
from helixc_runtime.job import Request
from helixc_runtime.kv import KvCache, Row
from helixc_runtime.manifest import Plan, Rank, global_position, local_length
from helixc_runtime.page_writer import PageKernel, PageWriter
from helixc_runtime.quantize import quantize
from tests.deployments import role, spec

CPU = torch.device("cpu")
LAYOUTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("deepseek-v3-lite", {"tp": 2}, {"cp": 3}),
    ("llama-3.1-8b", {"tp": 2, "pp": 2}, {"tp": 4, "cp": 2}),
    ("llama-3.1-8b", {"tp": 4}, {"tp": 2, "cp": 2, "pp": 2}),
    ("llama-3.1-8b", {}, {"tp": 16, "cp": 2}),  # each KV head twice
]


@dataclass(frozen=True)
class Case:
    """`whole`: of every layer, MLA [L, latent + rope], GQA [2, KH, L, D], laid out as prefill's."""

    plan: Plan
    request: Request
    whole: list[Tensor]
    seed: int

    def computed_by(self, rank: Rank) -> list[Tensor]:
        """What context rank `rank` has of it."""
        own = self.whole[slice(*rank.layers)]
        return own if self.plan.model.arch.mla else [kv[:, slice(*rank.kv_heads)] for kv in own]

    def ranks(self, role: str) -> list[Rank]:
        return [rank for rank in self.plan.ranks if rank.role == role]

    def cache(self, rank: Rank, device: torch.device = CPU) -> tuple[KvCache, Row]:
        """Of generation rank `rank`: pages in any order, and the prompt's row, which has some."""
        block, length = self.plan.tokens_per_block, len(self.request.token_ids)
        width = self.plan.most_pages(self.plan.instance_of(rank))
        cache, row = KvCache(self.plan.model, rank, block, 2, width, device, shared=True), Row(3, 1, length, 5, [0])
        cache.arena.memory.fill_(255)  # NaN, whatever the dtype
        other = Row(1, 0, random.Random(self.seed).randint(1, 30), 1)
        cache.reserve(other)
        cache.reserve(row)
        cache.release(other)
        return cache, row


def random_case(
    layout: tuple[str, dict[str, Any], dict[str, Any]],
    kv_dtype: Any,
    seed: int,
    gpus_per_node: int = 100,
    dtype: Any = "bfloat16",
    lengths: tuple[int, int] = (1, 70),
    blocks: tuple[int, ...] = (1, 4, 16),
) -> Case:
    """A prompt of a layout, with blocks of some size. Ranks of up to `gpus_per_node` GPUs in turn are peers."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    (name, context, generation), block, length = layout, pick.choice(blocks), pick.randint(*lengths)
    roles = (
        role(kv_dtype=kv_dtype, **context),
        role(kv_dtype=kv_dtype, block=block, max_seq_len=lengths[1] + 30, **generation),
    )
    arch = replace(read_model(name), num_layers=4, moe=None)
    described = spec(name, *roles, dtype=dtype, hardware=Hardware(None, gpus_per_node, False))
    plan = place(lower(described, arch), lambda *_: ())
    request = Request(3, tuple(range(length)), 5, 0.0, 1.0, 0, True)
    return Case(plan, request, prompt_kv(plan, length, generator), seed)


def prompt_kv(plan: Plan, length: int, generator: torch.Generator) -> list[Tensor]:
    """The KV of a whole prompt in every layer; magnitudes differ."""
    arch = plan.model.arch
    shape = (length, arch.head_dim) if arch.mla else (2, length, arch.num_kv_heads, arch.head_dim)
    sizes = torch.rand(shape, generator=generator) * 6 - 3
    drawn = [torch.randn(shape, generator=generator) * 10**sizes for _ in range(arch.num_layers)]
    return [
        kv.to(getattr(torch, plan.model.dtype)) if arch.mla else kv.to(getattr(torch, plan.model.dtype)).transpose(1, 2)
        for kv in drawn
    ]


def check_launches(case: Case, plan: Plan, folder: Path, device: torch.device = CPU) -> None:
    """Every sender's launches into every target's arena, bit by bit; `plan`: the case's, its kernels in `folder`."""
    caches = {rank.rank: case.cache(rank, device) for rank in case.ranks("generation")}
    context, generation = plan.instances
    for t in plan.transfers:
        source, target = plan.ranks[context.ranks[t.source]], plan.ranks[generation.ranks[t.target]]
        cache, row = caches[target.rank]
        tokens = local_length(len(case.request.token_ids), plan.tokens_per_block, generation.cp, t.cp_rank)
        if tokens:
            pages = torch.tensor(cache.pages(row), dtype=torch.int32)
            cached = [kv.to(device) for kv in case.computed_by(source)]
            kernel = PageKernel(plan, source, plan.kernels, folder, device)
            kept = kernel.launch(t, target, cache.arena.memory.data_ptr(), cached, pages, tokens)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            assert kept
    for rank, (cache, row) in caches.items():
        check_cache(case, plan.ranks[rank], cache, row)


def check_cache(case: Case, rank: Rank, cache: KvCache, row: Row) -> int:
    """Every owned position of every layer and head is as it was computed, bit by bit, and nothing else was written.

    The bytes that were compared.
    """
    plan, count, cp = case.plan, cache.stored(row), len(rank.groups.cp)
    positions = torch.tensor([global_position(s, cache.block, cp, rank.cp_rank) for s in range(count)]).long()
    table, held, mla = torch.tensor(cache.pages(row)), 0, plan.model.arch.mla is not None
    for stored, whole in zip(cache.layers, case.whole[slice(*rank.layers)], strict=True):
        kv = whole[..., positions, :]
        vectors = [kv] if mla else list(kv[:, slice(*rank.kv_heads)])
        for vector, elements, scales in zip(
            vectors, (stored.k, stored.v), (stored.k_scale, stored.v_scale), strict=False
        ):
            assert elements is not None
            fp8 = plan.model.kv_dtype == "float8_e4m3fn"
            right = quantize(vector) if fp8 else (vector.to(getattr(torch, plan.model.kv_dtype)),)
            for pool, part in zip((elements, scales), right, strict=False):
                assert pool is not None
                pool, expected = pool.cpu().view(torch.uint8), part.contiguous().view(torch.uint8)
                assert torch.equal(in_order(pool, table, count), expected), f"{case.seed=} {plan.name=}"
                written = (pool != 255).any(dim=-1)
                assert int(written.sum()) <= expected[..., 0].numel(), f"written elsewhere: {case.seed=} {plan.name=}"
                held += part.nbytes
    return held


def in_order(pool: Tensor, table: Tensor, count: int) -> Tensor:
    """The first `count` tokens of a request: [tokens, width], of GQA [heads, tokens, width]."""
    pages = pool[table]
    if pool.dim() == 3:
        return pages.flatten(0, 1)[:count]
    return pages.transpose(0, 1).flatten(1, 2)[:, :count]


class Post:
    """Messages between ranks that are threads of one process."""

    def __init__(self) -> None:
        self._boxes: dict[tuple[int, int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)
        self._lock = threading.Lock()

    def box(self, source: int, target: int, tag: int) -> queue.Queue[Tensor]:
        with self._lock:
            return self._boxes[source, target, tag]


class Mailbox:
    """handoff.Transport of rank `own`."""

    def __init__(self, post: Post, own: int, impatient: float = 30.0) -> None:
        self.post, self.own, self.impatient = post, own, impatient

    def isend(self, x: Tensor, rank: int, tag: int) -> Any:
        self.post.box(self.own, rank, tag).put(x.clone())
        return _Sent()

    def recv(self, x: Tensor, rank: int, tag: int, patience: float | None = None) -> Tensor:
        try:
            message = self.post.box(rank, self.own, tag).get(timeout=min(patience or self.impatient, self.impatient))
        except queue.Empty:
            raise RuntimeError("nothing has come") from None
        assert (message.shape, message.dtype) == (x.shape, x.dtype), "both ends name the same bytes"
        return x.copy_(message)


class _Sent:
    def wait(self) -> None: ...


class Told:
    """An Emitter that adds up what was handed over, by the way it took."""

    def __init__(self) -> None:
        self.moved: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def emit(self, event: str, **fields: Any) -> None:
        assert event == "handoff"
        with self._lock:
            self.moved[fields["way"]] += fields["bytes"]


def hand_over(
    case: Case,
    make_writer: Callable[[Plan, Rank, Callable[[int], str]], PageWriter],
    patience: float = 30.0,
    senders: Sequence[int] | None = None,
) -> tuple[dict[int, tuple[KvCache, Row]], dict[str, int], dict[int, BaseException]]:
    """All ranks as threads: (cache and row of each generation rank, bytes by way, what each rank raised).

    Context ranks other than `senders` never send.
    """
    post, told, errors = Post(), Told(), dict[int, BaseException]()
    caches = {rank.rank: case.cache(rank) for rank in case.ranks("generation")}

    def handle_of(rank: int) -> str:
        return caches[rank][0].arena.handle()

    def body(rank: Rank) -> None:
        transport = Mailbox(post, rank.rank)
        try:
            if rank.role == "generation":
                cache, row = caches[rank.rank]
                receive(case.plan, rank, case.request, row, cache, transport, patience)
            elif senders is None or rank.rank in senders:
                writer: Any = make_writer(case.plan, rank, handle_of)
                told_to: Any = told
                outbox = Outbox(case.plan, rank, transport, writer, told_to, patience)
                outbox.send(case.request, case.computed_by(rank))
                try:
                    outbox.settle()
                finally:
                    outbox.close()
        except BaseException as error:
            errors[rank.rank] = error

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in case.plan.ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    return caches, told.moved, errors
