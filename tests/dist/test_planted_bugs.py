"""The mistakes of the field, planted one by one: the comparison with transformers must see each."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.tiny_checkpoint import make_checkpoint
from helixc_runtime import kv
from helixc_runtime.manifest import Plan
from helixc_runtime.ops import DecodeBatch, LayerCache, Partial
from helixc_runtime.ops_torch import TorchOps
from tests.deployments import plan_of, role
from tests.dist.exactness import Comparison, compare, random_prompts
from tests.dist.harness import request
from tests.mutation.planting import Mutation, cut, on_pieces


def shifted_owner() -> None:
    """Decoded tokens go one block further than where the handoff put the prompt."""
    right = kv.owner
    kv.owner = lambda position, block, cp: right(position + block, block, cp)  # type: ignore[assignment]


def base_2_lse() -> None:
    right = TorchOps.attend

    def attend(self: TorchOps, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
        partial = right(self, q, cache, batch)
        return Partial(partial.o, partial.lse / math.log(2))

    TorchOps.attend = attend  # type: ignore[method-assign]


def inactive_rank_skips_its_query() -> None:
    right = TorchOps.attend

    def attend(self: TorchOps, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
        return right(self, q, cache, replace(batch, lengths=batch.lengths * batch.owned.to(torch.int32)))

    TorchOps.attend = attend  # type: ignore[method-assign]


def poisoned_memory() -> None:
    """Unused KV memory and the partials of empty shards hold NaN: allowed, and nothing may come of it."""
    empty, right = torch.empty, TorchOps.attend

    def attend(self: TorchOps, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
        partial = right(self, q, cache, batch)
        return Partial(partial.o.masked_fill(torch.isneginf(partial.lse).unsqueeze(-1), math.nan), partial.lse)

    def pool(shape: tuple[int, ...], **options: object) -> Tensor:
        return empty(shape, **options).fill_(math.nan)  # type: ignore[call-overload, no-any-return]

    kv.torch = type("Poisoned", (), {**vars(torch), "empty": staticmethod(pool)})  # type: ignore[attr-defined]
    TorchOps.attend = attend  # type: ignore[method-assign]


def nan_times_zero() -> None:
    """Poisoned memory, and a combine that multiplies by the weight zero instead of masking."""
    poisoned_memory()

    def combine(self: TorchOps, o: Tensor, lse: Tensor) -> Partial:
        weight = torch.softmax(lse, dim=0)
        return Partial((weight.unsqueeze(-1) * o).sum(0), torch.logsumexp(lse, dim=0))

    TorchOps.combine = combine  # type: ignore[method-assign]


def run(
    tmp_path: Path, change: Callable[[Plan], Plan] = lambda plan: plan, sabotage: Callable[[], None] | None = None
) -> Comparison:
    seed = random.randrange(2**31)
    checkpoint = make_checkpoint("llama", tmp_path / "checkpoint", seed=seed, layers=2)
    plan = change(plan_of(str(checkpoint), role(), role(tp=2, cp=2)))
    requests = [request(i, prompt, 12) for i, prompt in enumerate(random_prompts([2, 3, 30], seed))]
    return compare(checkpoint, plan, requests, tmp_path, sabotage)


def test_without_a_bug_it_is_exact(tmp_path: Path) -> None:
    assert run(tmp_path).exact


def test_nan_in_unused_memory_is_harmless(tmp_path: Path) -> None:
    assert run(tmp_path, sabotage=poisoned_memory).exact


@pytest.mark.parametrize(
    "sabotage", [shifted_owner, base_2_lse, inactive_rank_skips_its_query, nan_times_zero], ids=lambda f: f.__name__
)
def test_runtime_bug_is_seen(sabotage: Callable[[], None], tmp_path: Path) -> None:
    found = run(tmp_path, sabotage=sabotage)
    assert not found.exact
    assert not found.difference < 1e-2, "far above rounding, so that the tolerance is no matter of taste"


LAYOUT_BUGS: dict[str, Mutation] = {
    # The row shard of o_proj that a tp-innermost rank order would load: silently wrong for tp > 1 and cp > 1.
    "tp innermost": on_pieces("o")(lambda rank, piece: cut(piece, 1, 4, rank.cp_rank * 2 + rank.tp_rank)),
    # A loader that indexes FFN shards by the attention mapping's tp_rank: the sum holds shards twice.
    "ffn by tp_rank": on_pieces("mlp_gate", "embed")(lambda rank, piece: cut(piece, 0, 4, rank.tp_rank)),
}


@pytest.mark.parametrize("change", LAYOUT_BUGS.values(), ids=LAYOUT_BUGS.keys())
def test_layout_bug_is_seen(change: Mutation, tmp_path: Path) -> None:
    found = run(tmp_path, change=change)
    assert not found.exact
    assert not found.difference < 1e-2
