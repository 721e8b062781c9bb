"""A prompt's K and V on their way into the paged caches of their owners: every cache dtype, both kinds of attention."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helixc.model import read_model
from helixc.plan.lower import lower
from helixc.plan.place import place
from helixc_runtime.handoff import outgoing, pack, receive
from helixc_runtime.job import Request
from helixc_runtime.kv import KvCache, Row
from helixc_runtime.manifest import Plan, global_position
from helixc_runtime.quantize import dequantize, quantize, rounded, unpack
from helixc_runtime.quantize import pack as packed
from tests.deployments import role, spec

CPU = torch.device("cpu")
DTYPES = ("auto", "float16", "fp8")


class Mailbox:
    """A Transport to rank `own` within one process: `sent` holds messages by sender, receiver and tag."""

    def __init__(self, sent: dict[tuple[int, int, int], Tensor], own: int) -> None:
        self.sent, self.own = sent, own

    def isend(self, x: Tensor, rank: int, tag: int) -> Any:
        raise AssertionError("a receiver does not send")

    def recv(self, x: Tensor, rank: int, tag: int) -> Tensor:
        message = self.sent.pop((rank, self.own, tag))
        assert (message.shape, message.dtype) == (x.shape, x.dtype), "both ends name the same bytes"
        return x.copy_(message)


def prompt_kv(plan: Plan, length: int, generator: torch.Generator) -> list[Tensor]:
    """The KV of a whole prompt in every layer: MLA [L, latent + rope], GQA [2, KH, L, D]; magnitudes differ."""
    arch = plan.model.arch
    shape = (length, arch.head_dim) if arch.mla else (2, arch.num_kv_heads, length, arch.head_dim)
    sizes = torch.rand(shape, generator=generator) * 6 - 3
    return [torch.randn(shape, generator=generator) * 10**sizes for _ in range(arch.num_layers)]


@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "context", "generation"),
    [
        ("deepseek-v3-lite", {"tp": 2}, {"cp": 3}),
        ("llama-3.1-8b", {"tp": 2, "pp": 2}, {"tp": 4, "cp": 2}),
        ("llama-3.1-8b", {}, {"tp": 16, "cp": 2}),  # each KV head twice
    ],
)
def test_owners_hold_what_was_computed(
    name: str, context: dict[str, Any], generation: dict[str, Any], kv_dtype: Any
) -> None:
    """Every owned position of every layer and head, bit by bit, and pages in any order."""
    seed = random.randrange(2**31)
    generator = torch.Generator().manual_seed(seed)
    block, length = random.choice((1, 4, 16)), random.randint(1, 70)
    roles = role(kv_dtype=kv_dtype, **context), role(kv_dtype=kv_dtype, block=block, max_seq_len=100, **generation)
    arch = replace(read_model(name), num_layers=3, moe=None)
    plan = place(lower(spec(name, *roles, dtype="bfloat16"), arch), lambda *_: ())
    layers = plan.model.arch.num_layers
    request = Request(3, tuple(range(length)), 5, 0.0, 1.0, 0, True)
    whole = [kv.bfloat16() for kv in prompt_kv(plan, length, generator)]
    sent: dict[tuple[int, int, int], Tensor] = {}
    for rank in plan.ranks:
        if rank.role == "context":
            own = whole[slice(*rank.layers)]
            if not plan.model.arch.mla:
                own = [kv[:, slice(*rank.kv_heads)] for kv in own]
            for transfer, target in outgoing(plan, rank, request):
                sent[rank.rank, target, request.index] = pack(plan, rank, request, transfer, own)
    moved, held = sum(message.nbytes for message in sent.values()), 0
    for rank in plan.ranks:
        if rank.role != "generation":
            continue
        cache, row = KvCache(plan.model, rank, block, 2, 100, CPU), Row(3, 1, length, 5, [0])
        other = Row(1, 0, random.randint(1, 30), 1)
        cache.reserve(other)
        cache.reserve(row)
        cache.release(other)
        receive(plan, rank, request, row, cache, Mailbox(sent, rank.rank))
        count, cp = cache.stored(row), len(rank.groups.cp)
        positions = torch.tensor([global_position(s, block, cp, rank.cp_rank) for s in range(count)], dtype=torch.int64)
        table = torch.tensor(cache._tables[3])
        for layer in range(layers):
            stored = cache.layers[layer]
            kv = whole[layer][..., positions, :]
            vectors = [kv] if plan.model.arch.mla else list(kv[:, slice(*rank.kv_heads)])
            pools = ((stored.k, stored.k_scale), (stored.v, stored.v_scale))
            for vector, (elements, scales) in zip(vectors, pools, strict=False):
                assert elements is not None
                if kv_dtype == "fp8":
                    assert scales is not None
                    right = [part.view(torch.uint8) for part in quantize(vector)]
                    found = [in_order(part.view(torch.uint8), table, count) for part in (elements, scales)]
                    assert all(map(torch.equal, found, right)), f"{seed=}"
                    held += sum(part.nbytes for part in right)
                else:
                    assert scales is None and elements.dtype == getattr(torch, plan.model.kv_dtype)
                    right = [vector.to(elements.dtype)]
                    assert torch.equal(in_order(elements, table, count), right[0]), f"{seed=}"
                    held += right[0].nbytes
    assert not sent and held == moved
    copies = max(1, generation.get("tp", 1) // plan.model.arch.num_kv_heads) if not plan.model.arch.mla else 1
    assert moved == length * layers * plan.model.arch.num_kv_heads * plan.model.kv_bytes * copies


def in_order(pool: Tensor, table: Tensor, count: int) -> Tensor:
    """The first `count` tokens of a request: [tokens, width], of GQA [heads, tokens, width]."""
    pages = pool[table]
    if pool.dim() == 3:
        return pages.flatten(0, 1)[:count]
    return pages.transpose(0, 1).flatten(1, 2)[:, :count]


@pytest.mark.parametrize("width", [16, 128, 160, 576])
def test_a_packed_vector_is_taken_apart_again(width: int) -> None:
    x = torch.randn(3, 5, width) * 10 ** (torch.rand(3, 5, 1) * 8 - 4)
    message = packed(x)
    assert message.dtype == torch.uint8 and message.shape == (3, 5, width + 1)
    for found, right in zip(unpack(message, width), quantize(x), strict=True):
        assert torch.equal(found.view(torch.uint8), right.view(torch.uint8))


def test_what_a_cache_gives_back() -> None:
    x = torch.randn(7, 200)
    assert torch.equal(rounded(x, "float32"), x)
    assert torch.equal(rounded(x, "bfloat16"), x.bfloat16().float())
    assert torch.equal(rounded(x, "float8_e4m3fn"), dequantize(*quantize(x)))
    half = rounded(x.bfloat16(), "float8_e4m3fn")
    assert half.dtype == torch.bfloat16 and torch.equal(half.float(), dequantize(*quantize(x.bfloat16())))
