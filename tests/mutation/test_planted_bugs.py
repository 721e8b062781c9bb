"""Planted bugs: verify must name the rule that each breaks. The terminal summary lists them all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from helixc.plan import verify as proof
from helixc.plan.collectives import collectives
from helixc.plan.mapping import Coordinates, Mapping
from helixc.plan.simulate import simulate
from helixc.plan.verify import InvalidPlan, find_flaws, verify
from helixc_runtime.manifest import Plan
from tests.mutation.bugs import BUGS, Bug, build

planted = cache(build)
Record = Callable[[str, object], None]


@pytest.mark.parametrize("name", ["mla", "gqa", "dp", "value"])
def test_the_plan_itself_is_proven(name: str) -> None:
    assert find_flaws(planted(name)) == []


def test_no_bug_is_listed_twice() -> None:
    assert len(BUGS) >= 25
    assert len({bug.what for bug in BUGS}) == len(BUGS)
    damaged = {bug.plant(planted(bug.plan)) for bug in BUGS}
    assert len(damaged) == len(BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_each_planted_bug_is_named(bug: Bug, record_property: Record) -> None:
    damaged = bug.plant(planted(bug.plan))
    named = dict.fromkeys(flaw.rule for flaw in find_flaws(damaged))
    record_property("planted", bug.what)
    record_property("named by", ", ".join(named) or "nobody")
    assert bug.rule in named, find_flaws(damaged)
    with pytest.raises(InvalidPlan, match=bug.rule):
        verify(damaged)


# --- Bugs in the compiler's and the runtime's own formulas ------------------------------------------------------


@pytest.mark.parametrize("name", ["owner", "local_length", "local_slot", "global_position"])
def test_a_shifted_ownership_formula(name: str, monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:
    right = getattr(proof, name)
    monkeypatch.setattr(proof, name, lambda position, *rest: right(position + 4, *rest))
    named(planted("mla"), "owners", f"{name} one block further", record_property)


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("contiguous shards", lambda position, block, cp: min(position // (2 * block), cp - 1)),
        ("tokens dealt one by one", lambda position, block, cp: position % cp),
        ("the last rank owns what is decoded", lambda position, block, cp: cp - 1),
    ],
)
def test_another_rule_of_ownership(
    what: str, wrong: Callable[[int, int, int], int], monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    monkeypatch.setattr(proof, "owner", wrong)
    named(planted("mla"), "owners", f"owner: {what}", record_property)


def swapped(self: Mapping, rank: int) -> Coordinates:
    """tp innermost, consistently: every range and group follows it."""
    pp, ffn_tp = divmod(rank, self.ffn_tp)
    cp, tp = divmod(ffn_tp, self.tp)
    return Coordinates(pp, tp, cp, ffn_tp, *divmod(ffn_tp, self.moe_ep))


def experts_by_attention(self: Mapping, rank: int) -> Coordinates:
    pp, ffn_tp = divmod(rank, self.ffn_tp)
    tp, cp = divmod(ffn_tp, self.cp)
    return Coordinates(pp, tp, cp, ffn_tp, cp, tp)


@pytest.mark.parametrize(
    ("what", "wrong"), [("tp innermost", swapped), ("experts by attention rank", experts_by_attention)]
)
def test_a_compiler_that_maps_ranks_wrongly(
    what: str, wrong: object, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    monkeypatch.setattr(Mapping, "coordinates", wrong)
    named(build("mla"), "numbering", f"compiler: {what}", record_property)


def named(plan: Plan, rule: str, what: str, record_property: Record) -> None:
    found = dict.fromkeys(flaw.rule for flaw in find_flaws(plan))
    record_property("planted", what)
    record_property("named by", ", ".join(found) or "nobody")
    assert rule in found


# --- What running the plan adds ---------------------------------------------------------------------------------


def test_the_step_finds_tp_innermost_by_arithmetic_alone() -> None:
    """The bug of the field: o_proj rows in another order than the exchange leaves the heads."""
    bug = next(bug for bug in BUGS if bug.what == "o_proj rows of the tp-innermost order")
    found = list(simulate(bug.plant(planted("mla"))))
    assert any("heads [4, 5, 6, 7] meet o_proj rows from 1024 on" in flaw for flaw in found), found[:5]


def test_the_step_counts_what_a_replicated_ffn_sums() -> None:
    bug = next(bug for bug in BUGS if bug.what == "FFN shards by the attention's tp rank")
    (first, *_) = [flaw for flaw in simulate(bug.plant(planted("mla"))) if "mlp: inner" in flaw]
    assert "inner columns 0-2735 twice" in first, first
    assert "missing" in first


def test_a_deadlock_is_followed_from_rank_to_rank() -> None:
    bug = next(bug for bug in BUGS if bug.what == "one rank sums over the attention's tp group")
    (first, *_) = collectives(bug.plant(planted("mla")))
    assert first.startswith("generation instance 0, decode: ")
    assert (
        "wait forever: rank 4 in all_reduce over 4,6 (embedding), waits for rank 6 in all_reduce over 4,5,6,7" in first
    )
