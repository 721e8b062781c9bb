"""Ways to damage a plan: each returns a new plan in which one thing is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from helixc_runtime.manifest import Groups, Instance, Piece, Plan, Range, Rank, Transfer

Mutation = Callable[[Plan], Plan]


def on_ranks(change: Callable[[Plan, Rank], Rank], role: str = "generation") -> Mutation:
    """Change every rank of a role."""

    def mutate(plan: Plan) -> Plan:
        return replace(plan, ranks=tuple(change(plan, r) if r.role == role else r for r in plan.ranks))

    return mutate


def on_rank(index: int, **changes: Any) -> Mutation:
    """Set fields of one rank."""
    return on_ranks_at(lambda _, rank: replace(rank, **changes), index)


def on_ranks_at(change: Callable[[Plan, Rank], Rank], *indices: int) -> Mutation:
    """Change some ranks."""

    def mutate(plan: Plan) -> Plan:
        return replace(plan, ranks=tuple(change(plan, r) if r.rank in indices else r for r in plan.ranks))

    return mutate


def on_groups(index: int, **changes: tuple[int, ...]) -> Mutation:
    """Set groups of one rank."""
    return on_ranks_at(lambda _, rank: replace(rank, groups=replace(rank.groups, **changes)), index)


def groups_by(change: Callable[[Plan, Rank], Groups]) -> Mutation:
    """Give every generation rank other groups."""
    return on_ranks(lambda plan, rank: replace(rank, groups=change(plan, rank)))


def on_pieces(*names: str) -> Callable[[Callable[[Rank, Piece], Piece | None]], Mutation]:
    """Change (None: drop) the pieces of these names of every generation rank."""

    def planted(change: Callable[[Rank, Piece], Piece | None]) -> Mutation:
        def mutate(plan: Plan) -> Plan:
            shards, ranks = list(plan.shards), list(plan.ranks)
            for i, rank in enumerate(ranks):
                if rank.role == "generation":
                    pieces = [change(rank, p) if p.name in names else p for p in plan.shards[rank.shard]]
                    shards.append(tuple(piece for piece in pieces if piece is not None))
                    ranks[i] = replace(rank, shard=len(shards) - 1)
            return replace(plan, shards=tuple(shards), ranks=tuple(ranks))

        return mutate

    return planted


def on_transfers(change: Callable[[tuple[Transfer, ...]], tuple[Transfer, ...]]) -> Mutation:
    return lambda plan: replace(plan, transfers=change(plan.transfers))


def first_transfer(**changes: Any) -> Mutation:
    """Set fields of the first transfer."""
    return on_transfers(lambda found: (replace(found[0], **changes), *found[1:]))


def on_instances(change: Callable[[tuple[Instance, ...]], tuple[Instance, ...]]) -> Mutation:
    return lambda plan: replace(plan, instances=change(plan.instances))


def boxed(piece: Piece, dim: int, found: Range) -> Piece:
    """The piece with other elements of one dim."""
    return replace(piece, box=(*piece.box[:dim], found, *piece.box[dim + 1 :]))


def cut(piece: Piece, dim: int, parts: int, index: int) -> Piece:
    """The piece with part `index` of `parts` of one dim."""
    size = piece.shape[dim] // parts
    return boxed(piece, dim, (index * size, (index + 1) * size))


def shifted(piece: Piece, dim: int, by: int) -> Piece:
    """The piece with the same number of elements, `by` further on."""
    lo, hi = piece.box[dim]
    return boxed(piece, dim, (lo + by, hi + by))
