"""Helix parallelism by counting things one at a time.

Written from the text of the specification (docs/helix.md) alone: it deals ranks, layers, blocks, heads and rows out by
hand like cards, keeps them in plain tuples and sets, and has no closed formula to share with the compiler. It is slow,
obvious, and the judge of the property tests beside it.
"""

from dataclasses import dataclass
from functools import cache
from itertools import count, cycle, islice

import numpy as np


@dataclass(frozen=True)
class Seat:
    """One GPU of an instance: its rank there, where it sits in the attention grid, and in the FFN's."""

    rank: int
    pp: int
    tp: int
    cp: int
    ffn: int
    moe_tp: int
    moe_ep: int


def seats(tp: int, cp: int, pp: int, ep: int) -> list[Seat]:
    """Every seat of an instance in rank order: cp turns fastest, then tp, then pp.

    A stage's seats, in that same order, are the FFN's ranks; those sit in rows of `ep`.
    """
    numbers = count()
    found = []
    for stage in range(pp):
        ffn_places = iter([(row, column) for row in range(tp * cp // ep) for column in range(ep)])
        ffn_numbers = count()
        for heads in range(tp):
            for shard in range(cp):
                moe_tp, moe_ep = next(ffn_places)
                found.append(Seat(next(numbers), stage, heads, shard, next(ffn_numbers), moe_tp, moe_ep))
    return found


def alike(everyone: list[Seat], one: Seat, *names: str) -> list[int]:
    """The ranks of the seats which agree with `one` in all of `names`: a group, in rank order."""
    return [seat.rank for seat in everyone if all(getattr(seat, n) == getattr(one, n) for n in names)]


def groups(everyone: list[Seat], one: Seat) -> dict[str, list[int]]:
    """The members of each group that `one` belongs to, by the group's name in the specification."""
    return {
        "cp": alike(everyone, one, "pp", "tp"),
        "tp": alike(everyone, one, "pp", "cp"),
        "pp": alike(everyone, one, "tp", "cp"),
        "ffn_tp": alike(everyone, one, "pp"),
        "moe_tp": alike(everyone, one, "pp", "moe_ep"),
        "moe_ep": alike(everyone, one, "pp", "moe_tp"),
    }


def first_ranks(worlds: list[int]) -> list[int]:
    """The first global rank of each instance: instances stand in a queue."""
    firsts, taken = [], 0
    for world in worlds:
        firsts.append(taken)
        taken += world
    return firsts


def stage_layers(layers: int, pp: int, partition: list[int] | None = None) -> list[list[int]]:
    """The layers of each stage: dealt out round by round to size the stages, then numbered in order."""
    sizes = list(partition) if partition else [0] * pp
    if not partition:
        for stage, _ in zip(cycle(range(pp)), range(layers), strict=False):
            sizes[stage] += 1
    numbers = iter(range(layers))
    return [list(islice(numbers, size)) for size in sizes]


def cut(things: int, parts: int, index: int) -> list[int]:
    """The `index`-th of `parts` equal runs of the numbers below `things`; all parts are checked equal."""
    assert things % parts == 0, f"{things} cannot be cut into {parts} equal runs"
    pile = iter(range(things))
    return [list(islice(pile, things // parts)) for _ in range(parts)][index]


def query_heads(seat: Seat, heads: int, tp: int) -> list[int]:
    """The heads whose queries a seat computes: its tp share, all of them on every cp rank."""
    return cut(heads, tp, seat.tp)


def kept_heads(seat: Seat, heads: int, tp: int, cp: int) -> list[int]:
    """The heads a seat is left with after the exchange: its cp share of its tp share."""
    mine = query_heads(seat, heads, tp)
    return [mine[i] for i in cut(len(mine), cp, seat.cp)]


def kv_heads_of(seat: Seat, kv_heads: int, tp: int) -> list[int]:
    """The KV heads whose keys and values a seat's K and V projections make."""
    return cut(kv_heads, tp, seat.tp)


def kv_head_of(head: int, heads: int, kv_heads: int) -> int:
    """The KV head that query head `head` attends: query heads stand in line behind their KV heads."""
    return _line(heads, kv_heads)[head]


@cache
def _line(heads: int, kv_heads: int) -> list[int]:
    return [kv for kv in range(kv_heads) for _ in range(heads // kv_heads)]


def tape(length: int, block: int, cp: int) -> "np.ndarray[tuple[int], np.dtype[np.int16]]":
    """The owner of each of the first `length` positions: whole blocks dealt to the cp ranks in turn."""
    one_deal = np.array([rank for rank in range(cp) for _ in range(block)], dtype=np.int16)
    return np.resize(one_deal, length) if length else np.zeros(0, dtype=np.int16)


def owned(length: int, block: int, cp: int) -> list[int]:
    """How many of the first `length` positions each cp rank owns, by counting the tape."""
    return [int(n) for n in np.bincount(tape(length, block, cp), minlength=cp)]


def local_slots(length: int, block: int, cp: int) -> list[tuple[int, int]]:
    """(owner, slot in the owner's cache) of each position: each rank fills its own cache in order."""
    filled = [0] * cp
    slots = []
    for owner in tape(length, block, cp).tolist():
        slots.append((owner, filled[owner]))
        filled[owner] += 1
    return slots


@dataclass(frozen=True)
class Piece:
    """One (layer, KV head, block) of a prompt's cache; `head` is 0 for a latent, which has no heads."""

    layer: int
    head: int
    block: int


def context_holders(
    everyone: list[Seat], layers: list[list[int]], kv_heads: int | None, tp: int, blocks: int
) -> dict[Piece, set[int]]:
    """Who has each piece after prefill, by rank; with `kv_heads` None every tp rank holds the latent."""
    held: dict[Piece, set[int]] = {}
    for seat in everyone:
        heads = [0] if kv_heads is None else kv_heads_of(seat, kv_heads, tp)
        for layer in layers[seat.pp]:
            for head in heads:
                for block in range(blocks):
                    held.setdefault(Piece(layer, head, block), set()).add(seat.rank)
    return held


def generation_needs(
    everyone: list[Seat], layers: list[list[int]], kv_heads: int | None, tp: int, cp: int, blocks: int
) -> dict[int, set[Piece]]:
    """The pieces each rank must have before it decodes: its layers, its heads, the blocks it owns."""
    needs: dict[int, set[Piece]] = {}
    owners = tape(blocks, 1, cp).tolist()
    for seat in everyone:
        heads = [0] if kv_heads is None else kv_heads_of(seat, kv_heads, tp)
        mine = [block for block, owner in enumerate(owners) if owner == seat.cp]
        needs[seat.rank] = {Piece(layer, head, b) for layer in layers[seat.pp] for head in heads for b in mine}
    return needs
