"""The difference of two plans for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from helixc.plan.diff import Change, Diff, KvChange, Layout, RankChange, RoleChange
from helixc.plan.show import listed
from helixc.table import aligned, byte_size

_WORDS = {
    "weights": "weights",
    "kv": "KV cache",
    "workspace": "workspace",
    "total": "total",
    "exchange": "exchange",
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "send": "pipeline send",
}
_TOKEN = {"context": "a prompt token", "generation": "a decoded token"}


def to_text(diff: Diff) -> str:
    """What changes, and what that costs."""
    return "\n".join(_lines(diff)) + "\n"


def _lines(diff: Diff) -> Iterator[str]:
    yield f"{diff.before} -> {diff.after}"
    if diff.alike:
        yield "nothing changes"
        return
    if not diff.same_model:
        yield "another model or dtype: nothing that is loaded is of use"
    for role in diff.roles:
        yield ""
        yield from _role(role, [rank for rank in diff.ranks if rank.role == role.role])
    yield ""
    yield from _summary(diff)


def _role(change: RoleChange, ranks: Sequence[RankChange]) -> Iterator[str]:
    before, after = (_layout(layout) for layout in (change.before, change.after))
    if change.alike and all(rank.alike for rank in ranks):
        yield f"{change.role}: {after}, nothing changes"
        return
    yield f"{change.role}: {before}" + (f" -> {after}" if before != after else ", as before")
    yield from _table("memory of the fullest rank", change.memory)
    yield from _table(f"the busiest rank's traffic for {_TOKEN[change.role]}", change.traffic)
    if ranks:
        yield from aligned(_ranks(ranks), indent="  ")


def _layout(layout: Layout | None) -> str:
    if layout is None:
        return "none"
    count = f"{layout.instances} x " if layout.instances > 1 else ""
    sizes = [("pp", layout.pp), ("tp", layout.tp), ("cp", layout.cp), ("ep", layout.moe_ep)]
    shown = " ".join(f"{name} {size}" for name, size in sizes if size > 1 or name == "tp")
    return f"{count}{shown}{' attention dp' if layout.attention_dp else ''}"


def _table(head: str, changes: dict[str, Change]) -> Iterator[str]:
    rows = [
        (_WORDS.get(name, name), byte_size(c.before), byte_size(c.after), _signed(c.after - c.before))
        for name, c in changes.items()
        if c.before or c.after
    ]
    if rows:
        yield f"  {head}"
        yield from aligned([("", "before", "after", "change"), *rows], indent="  ")


def _ranks(ranks: Sequence[RankChange]) -> Iterator[tuple[str, ...]]:
    """One row for all ranks that fare alike."""
    alike: dict[tuple[object, ...], list[RankChange]] = {}
    for rank in ranks:
        alike.setdefault((rank.was is None, rank.weights, rank.load, rank.groups), []).append(rank)
    yield "rank", "gpu", "was rank", "weights", "to load", "groups that change"
    for found in alike.values():
        first = found[0]
        yield (
            listed([rank.rank for rank in found]),
            listed_gpus(found),
            "-" if first.was is None else listed([rank.was for rank in found if rank.was is not None]),
            byte_size(first.weights),
            byte_size(first.load),
            ", ".join(first.groups) or "-",
        )


def listed_gpus(ranks: Sequence[RankChange]) -> str:
    """node:device of the first, and of the last where there are several."""
    first, last = ranks[0], ranks[-1]
    start = f"{first.node}:{first.device}"
    return start if len(ranks) == 1 else f"{start}..{last.node}:{last.device}"


def _summary(diff: Diff) -> Iterator[str]:
    load, weights = sum(rank.load for rank in diff.ranks), sum(rank.weights for rank in diff.ranks)
    busiest = max(rank.load for rank in diff.ranks)
    yield f"weights: {byte_size(load)} of {byte_size(weights)} to load, at most {byte_size(busiest)} on one rank"
    yield _kv(diff.kv)
    if diff.handoff.before or diff.handoff.after:
        yield f"handoff: {byte_size(diff.handoff.before)} a prompt token before, {byte_size(diff.handoff.after)} after"
    regrouped = [rank.rank for rank in diff.ranks if rank.groups]
    yield f"groups: {len(regrouped)} of {len(diff.ranks)} ranks talk to other GPUs than before"
    if diff.freed:
        yield f"freed: rank {listed(diff.freed)} of {diff.before}"


def _kv(kv: KvChange) -> str:
    before, after, moved = (byte_size(round(size)) for size in (kv.before, kv.after, kv.moved))
    return f"KV: an instance stores {before} a token before, {after} after; {moved} of that change GPUs"


def _signed(change: int) -> str:
    return "-" if not change else ("+" if change > 0 else "-") + byte_size(abs(change))
