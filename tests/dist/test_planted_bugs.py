"""The mistakes of the field, planted one by one: the comparison with transformers must see each."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.tiny_checkpoint import make_checkpoint
from helixc_runtime import kv
from helixc_runtime.comm import TorchComm
from helixc_runtime.manifest import Plan
from helixc_runtime.models.pipeline import AttendGroup, Pipeline
from helixc_runtime.ops import DecodeBatch, LayerCache, Ops, Partial
from helixc_runtime.ops_torch import TorchOps
from helixc_runtime.weights import Weights
from tests.deployments import plan_of, role
from tests.dist.exactness import Comparison, compare, random_prompts
from tests.dist.harness import request
from tests.mutation.planting import Mutation, cut, on_pieces


GROUPS = 2


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


def w_uv_of_the_heads_held() -> None:
    """W_UV before the exchange, of the heads of after it: those for another rank meet this rank's matrices."""
    right = Weights.__call__

    def weight(self: Weights, name: str, layer: int | None = None) -> Tensor:
        found = right(self, name, layer)
        return found[:6].repeat(2, 1, 1) if name == "v_up" and len(found) == 12 else found  # not a context rank's 24

    Weights.__call__ = weight  # type: ignore[method-assign]


def rows_of_another_group() -> None:
    """Every group attends with the lengths and pages of the first rows."""
    right = DecodeBatch.in_groups

    def in_groups(self: DecodeBatch, groups: int) -> Iterator[DecodeBatch]:
        for group in right(self, groups):
            rows = len(group.lengths)
            yield replace(group, lengths=self.lengths[:rows], page_table=self.page_table[:rows])

    DecodeBatch.in_groups = in_groups  # type: ignore[method-assign]


def groups_in_each_other_s_place() -> None:
    """What is merged of one group's rows goes where the other's belongs."""
    right = TorchComm.exchange

    def exchange(self: TorchComm, partial: Partial, ops: Ops, what: str, out: Tensor | None = None) -> Tensor:
        merged = right(self, partial, ops, what)
        if out is None:
            return merged
        whole = torch.as_strided(out, (GROUPS * len(out), *out.shape[1:]), out.stride(), storage_offset=0)
        place = out.storage_offset() // merged.numel()
        return whole[(1 - place) * len(out) :][: len(out)].copy_(merged)

    TorchComm.exchange = exchange  # type: ignore[method-assign]


def one_rank_swaps_its_exchanges() -> None:
    """cp rank 1 sends the second group first: each side takes the other's rows for those it sent."""
    right = Pipeline.run

    def run(self: Pipeline, q: Tensor, attend: AttendGroup, what: str) -> Tensor:
        if self._comm.rank.cp_rank == 0 or len(self._groups) == 1:  # type: ignore[attr-defined]
            return right(self, q, attend, what)
        first, second = self._groups
        self._groups = replace(second, group=0), replace(first, group=1)
        rows = len(first.lengths)
        swapped = right(self, torch.cat((q[rows:], q[:rows])), attend, what)
        self._groups = first, second
        return torch.cat((swapped[rows:], swapped[:rows]))

    Pipeline.run = run  # type: ignore[method-assign]


def run(
    tmp_path: Path,
    change: Callable[[Plan], Plan] = lambda plan: plan,
    sabotage: Callable[[], None] | None = None,
    *,
    values: bool = False,
    groups: int = 1,
) -> Comparison:
    """On llama or, with `values`, on latent attention with W_UV before the exchange, and without experts.

    With rows in `groups`, there are as many as each has the same number of.
    """
    seed = random.randrange(2**31)
    family, overrides = ("deepseek-v3-lite", {"first_k_dense_replace": 2}) if values else ("llama", {})
    checkpoint = make_checkpoint(family, tmp_path / "checkpoint", seed=seed, layers=2, **overrides)
    generation = role(tp=2, cp=2, exchange_space="value" if values else "auto", hop_groups=groups)
    plan = change(plan_of(str(checkpoint), role(), generation))
    lengths = [2, 3, 30] if groups == 1 else [2, 30, 17, 3]
    requests = [request(i, prompt, 12) for i, prompt in enumerate(random_prompts(lengths, seed))]
    return compare(checkpoint, plan, requests, tmp_path, sabotage)


@pytest.mark.parametrize("values", [False, True])
def test_without_a_bug_it_is_exact(values: bool, tmp_path: Path) -> None:
    assert run(tmp_path, values=values).exact


def test_without_a_bug_rows_in_groups_are_exact(tmp_path: Path) -> None:
    assert run(tmp_path, groups=GROUPS).exact


@pytest.mark.parametrize(
    "sabotage",
    [rows_of_another_group, groups_in_each_other_s_place, one_rank_swaps_its_exchanges],
    ids=lambda f: f.__name__,
)
def test_bug_of_groups_is_seen(sabotage: Callable[[], None], tmp_path: Path) -> None:
    found = run(tmp_path, sabotage=sabotage, groups=GROUPS)
    assert not found.exact
    assert not found.difference < 1e-2


@pytest.mark.parametrize("values", [False, True])
def test_nan_in_unused_memory_is_harmless(values: bool, tmp_path: Path) -> None:
    assert run(tmp_path, sabotage=poisoned_memory, values=values).exact


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


def test_w_uv_without_its_head_offset_is_seen(tmp_path: Path) -> None:
    """Values of every tp rank's heads by the matrices of the first's."""
    found = run(tmp_path, on_pieces("v_up")(lambda rank, piece: cut(piece, 0, 2, 0)), values=True)
    assert not found.exact
    assert not found.difference < 1e-2


@pytest.mark.parametrize("sabotage", [w_uv_of_the_heads_held, nan_times_zero], ids=lambda f: f.__name__)
def test_bug_in_the_exchange_of_values_is_seen(sabotage: Callable[[], None], tmp_path: Path) -> None:
    found = run(tmp_path, sabotage=sabotage, values=True)
    assert not found.exact
    assert not found.difference < 1e-2
