"""Planted bugs: verify must name the rule that each breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from helixc.plan import verify as proof
from helixc.plan.verify import InvalidPlan, find_flaws, verify
from helixc_runtime.manifest import Piece, Plan, Rank
from tests.deployments import plan_of, role

Mutation = Callable[[Plan], Plan]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of("deepseek-v3-lite", role(tp=2, pp=2), role(n=2, tp=2, cp=2, pp=2, ep=2))


@pytest.fixture(scope="module")
def gqa_plan() -> Plan:
    return plan_of("llama-3.1-8b", role(tp=4), role(tp=2, cp=2))


def on_rank(index: int, **changes: Any) -> Mutation:
    def mutate(plan: Plan) -> Plan:
        ranks = list(plan.ranks)
        ranks[index] = replace(ranks[index], **changes)
        return replace(plan, ranks=tuple(ranks))

    return mutate


def on_groups(index: int, **changes: tuple[int, ...]) -> Mutation:
    def mutate(plan: Plan) -> Plan:
        return on_rank(index, groups=replace(plan.ranks[index].groups, **changes))(plan)

    return mutate


def on_pieces(change: Callable[[Rank, Piece], Piece]) -> Mutation:
    """Change pieces of every generation rank."""

    def mutate(plan: Plan) -> Plan:
        shards, ranks = list(plan.shards), list(plan.ranks)
        for i, rank in enumerate(ranks):
            if rank.role == "generation":
                shards.append(tuple(change(rank, piece) for piece in plan.shards[rank.shard]))
                ranks[i] = replace(rank, shard=len(shards) - 1)
        return replace(plan, shards=tuple(shards), ranks=tuple(ranks))

    return mutate


def ffn_by_attention_tp_rank(rank: Rank, piece: Piece) -> Piece:
    """The loader bug of the field: FFN shards indexed by the attention mapping's tp_rank."""
    if piece.name not in ("mlp_gate", "shared_gate", "embed"):
        return piece
    size = piece.shape[0] // 4
    return replace(piece, box=((rank.tp_rank * size, (rank.tp_rank + 1) * size), *piece.box[1:]))


def o_rows_of_tp_innermost(rank: Rank, piece: Piece) -> Piece:
    """The row shard of o_proj a tp-innermost rank order would load: silently wrong for tp > 1 and cp > 1."""
    if piece.name != "o":
        return piece
    index, size = rank.cp_rank * 2 + rank.tp_rank, piece.shape[1] // 4
    return replace(piece, box=(piece.box[0], (index * size, (index + 1) * size)))


def same_experts_everywhere(rank: Rank, piece: Piece) -> Piece:
    return replace(piece, experts=(0, 32)) if piece.experts else piece


def one_row_short(rank: Rank, piece: Piece) -> Piece:
    if piece.name != "q" or rank.tp_rank == 0:
        return piece
    lo, hi = piece.box[0]
    return replace(piece, box=((lo + 1, hi), *piece.box[1:]))


def without_norm(plan: Plan) -> Plan:
    shards = tuple(tuple(p for p in shard if p.name != "input_norm") for shard in plan.shards[:-1])
    return replace(plan, shards=(*shards, plan.shards[-1]))


def tp_innermost(plan: Plan) -> Plan:
    """Relabel the generation ranks as the first Helix implementation numbered them."""
    ranks = [
        replace(r, tp_rank=r.local_rank % 4 % 2, cp_rank=r.local_rank % 4 // 2) if r.role == "generation" else r
        for r in plan.ranks
    ]
    return replace(plan, ranks=tuple(ranks))


def drop_transfer(plan: Plan) -> Plan:
    return replace(plan, transfers=plan.transfers[1:])


def swap_transfer_target(plan: Plan) -> Plan:
    first, *rest = plan.transfers
    return replace(plan, transfers=(replace(first, target=first.target ^ 1), *rest))


def transfer_from_other_stage(plan: Plan) -> Plan:
    first, *rest = plan.transfers
    return replace(plan, transfers=(replace(first, source=3 - first.source), *rest))


MUTATIONS: list[tuple[str, Mutation]] = [
    ("numbering", tp_innermost),
    ("numbering", on_rank(6, ffn_tp_rank=1)),
    ("numbering", on_rank(5, moe_ep_rank=0, moe_tp_rank=1)),
    ("groups", on_groups(4, cp=(4, 6))),
    ("groups", on_groups(5, tp=(7, 5))),
    ("groups", on_groups(4, ffn_tp=(4, 5))),
    ("groups", on_groups(9, moe_ep=(8, 10))),
    ("groups", on_groups(4, pp=(4, 12))),
    ("devices", on_rank(5, device=4)),
    ("layers", on_rank(4, layers=(0, 13))),
    ("exchange", on_rank(5, out_heads=(0, 4))),
    ("exchange", on_pieces(o_rows_of_tp_innermost)),
    ("kv-heads", on_rank(4, kv_heads=(1, 2))),
    ("owners", on_rank(5, cp_rank=0)),
    ("weights", on_pieces(ffn_by_attention_tp_rank)),
    ("weights", on_pieces(same_experts_everywhere)),
    ("weights", on_pieces(one_row_short)),
    ("weights", without_norm),
    ("transfers", drop_transfer),
    ("transfers", swap_transfer_target),
    ("transfers", transfer_from_other_stage),
]


@pytest.mark.parametrize(("rule", "mutate"), MUTATIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_each_planted_bug_is_named(plan: Plan, rule: str, mutate: Mutation) -> None:
    assert find_flaws(plan) == []
    flaws = find_flaws(mutate(plan))
    assert rule in {flaw.rule for flaw in flaws}, flaws
    with pytest.raises(InvalidPlan, match=rule):
        verify(mutate(plan))


def test_kv_head_map_when_heads_are_shared(gqa_plan: Plan) -> None:
    assert find_flaws(gqa_plan) == []
    assert "kv-heads" in {f.rule for f in find_flaws(on_rank(4, kv_heads=(4, 8))(gqa_plan))}


@pytest.mark.parametrize("name", ["owner", "local_length", "local_slot", "global_position"])
def test_a_shifted_ownership_formula_is_found(plan: Plan, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(proof, name)
    monkeypatch.setattr(proof, name, lambda position, *rest: right(position + 4, *rest))
    assert "owners" in {flaw.rule for flaw in find_flaws(plan)}
