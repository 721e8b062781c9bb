"""Not only the bugs somebody thought of: any one number of the layout changed at random must be found."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import Any, get_args

from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from helixc.plan.verify import find_flaws
from helixc_runtime.manifest import Groups, Instance, Plan, Rank, Space
from tests.mutation.bugs import build

many = settings(deadline=None, max_examples=250, suppress_health_check=list(HealthCheck))
plans = st.sampled_from(("mla", "gqa", "dp")).map(cache(build))

# Not layout: where a rank runs is free as long as nobody else does, and what it needs follows from the rest.
_FREE = {"role", "instance", "node", "device", "memory", "kernels"}
_RANK_FIELDS = sorted({field.name for field in fields(Rank)} - _FREE)
_INSTANCE_FIELDS = ("ranks", "tp", "cp", "pp", "moe_tp", "moe_ep")


def another(draw: st.DrawFn, value: Any) -> Any:
    """A value of the same form, one of its numbers or names changed, dropped, repeated or moved."""
    if isinstance(value, Groups):
        name = draw(st.sampled_from([field.name for field in fields(Groups)]))
        return replace(value, **{name: another(draw, getattr(value, name))})
    if isinstance(value, str):
        return draw(st.sampled_from([space for space in get_args(Space) if space != value]))
    if isinstance(value, int):
        return value + draw(st.sampled_from((-2, -1, 1, 2)))
    assert isinstance(value, tuple)
    at = draw(st.integers(0, len(value) - 1))
    kinds = ["other"] if len(value) == 2 else ["other", "drop", "repeat"]
    kind = draw(st.sampled_from([*kinds, "swap"]))
    if kind == "other":
        return (*value[:at], another(draw, value[at]), *value[at + 1 :])
    if kind == "drop":
        return (*value[:at], *value[at + 1 :])
    if kind == "repeat":
        return (*value[:at], value[at], *value[at:])
    to = draw(st.integers(0, len(value) - 1))
    moved = list(value)
    moved[at], moved[to] = moved[to], moved[at]
    return tuple(moved)


def replaced(items: tuple[Any, ...], at: int, item: Any) -> tuple[Any, ...]:
    return (*items[:at], item, *items[at + 1 :])


class Damaged:
    """A plan and what was done to it."""

    def __init__(self, what: str, plan: Plan) -> None:
        self.what, self.plan = what, plan

    def __repr__(self) -> str:
        return self.what


@st.composite
def damaged_ranks(draw: st.DrawFn) -> Damaged:
    plan = draw(plans)
    at = draw(st.integers(0, len(plan.ranks) - 1))
    name = draw(st.sampled_from(_RANK_FIELDS))
    value = getattr(plan.ranks[at], name)
    assume(value is not None)
    assume(name != "exchange_space" or len(plan.ranks[at].groups.cp) > 1)  # else nothing is exchanged
    event(name)
    other = another(draw, value)
    assume(other != value)
    ranks = replaced(plan.ranks, at, replace(plan.ranks[at], **{name: other}))
    return Damaged(f"{plan.name} rank {at}: {name} {value} -> {other}", replace(plan, ranks=ranks))


@st.composite
def damaged_instances(draw: st.DrawFn) -> Damaged:
    plan = draw(plans)
    at = draw(st.integers(0, len(plan.instances) - 1))
    name = draw(st.sampled_from(_INSTANCE_FIELDS))
    instance: Instance = plan.instances[at]
    event(name)
    value = getattr(instance, name)
    other = another(draw, value)
    assume(other != value)
    instances = replaced(plan.instances, at, replace(instance, **{name: other}))
    return Damaged(f"{plan.name} instance {at}: {name} {value} -> {other}", replace(plan, instances=instances))


@st.composite
def damaged_pieces(draw: st.DrawFn) -> Damaged:
    """One slice of one rank, in its box, its layers or its experts."""
    plan = draw(plans)
    at = draw(st.integers(0, len(plan.ranks) - 1))
    shard = plan.shards[plan.ranks[at].shard]
    number = draw(st.integers(0, len(shard) - 1))
    piece = shard[number]
    name = draw(st.sampled_from(("box", "layers", "experts")))
    value = getattr(piece, name)
    assume(value is not None)
    event(f"{name} of {piece.name}")
    other = another(draw, value)
    assume(other != value)
    own = replaced(shard, number, replace(piece, **{name: other}))
    rank = replace(plan.ranks[at], shard=len(plan.shards))
    damaged = replace(plan, shards=(*plan.shards, own), ranks=replaced(plan.ranks, at, rank))
    return Damaged(f"{plan.name} rank {at}: {piece.name} {name} {value} -> {other}", damaged)


@st.composite
def damaged_transfers(draw: st.DrawFn) -> Damaged:
    plan = draw(plans)
    at = draw(st.integers(0, len(plan.transfers) - 1))
    name = draw(st.sampled_from(("target", "layers", "kv_heads", "cp_rank", "drop", "repeat")))
    event(f"transfers: {name}")
    t = plan.transfers[at]
    if name in ("drop", "repeat"):
        found = (*plan.transfers[:at], *([t, t] if name == "repeat" else []), *plan.transfers[at + 1 :])
        return Damaged(f"{plan.name}: {name} {t}", replace(plan, transfers=found))
    other = replace(t, **{name: another(draw, getattr(t, name))})
    assume(other != t)
    return Damaged(f"{plan.name}: {t} -> {other}", replace(plan, transfers=replaced(plan.transfers, at, other)))


@many
@given(damaged_ranks() | damaged_instances() | damaged_pieces() | damaged_transfers())
def test_any_damage_is_found(damaged: Damaged) -> None:
    assert find_flaws(damaged.plan) != []
