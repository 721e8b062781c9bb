"""How much of one rank's weights another rank already holds: volumes of boxes in the checkpoint's tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from math import prod

from helixc_runtime.manifest import Piece, Range

Box = tuple[Range, ...]


def missing_elements(wanted: Iterable[Piece], held: Iterable[Piece]) -> int:
    """Elements of the checkpoint in `wanted` and not in `held`; what two pieces share counts once."""
    found: dict[tuple[str, int | None], list[Box]] = defaultdict(list)
    for tensor, box in _boxes(held):
        found[tensor].append(box)
    total = 0
    for tensor, box in _boxes(wanted):
        total += uncovered(box, found[tensor])
        found[tensor].append(box)
    return total


def uncovered(box: Box, others: Sequence[Box]) -> int:
    """How many elements of `box` lie in none of `others`."""
    if any(lo >= hi for lo, hi in box):
        return 0
    for number, other in enumerate(others):
        if all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)):
            return sum(uncovered(part, others[number + 1 :]) for part in _outside(box, other))
    return prod(hi - lo for lo, hi in box)


def _boxes(pieces: Iterable[Piece]) -> Iterator[tuple[tuple[str, int | None], Box]]:
    """((tensor, layer), box) of every tensor a piece reads; the experts are the box's first dim."""
    for piece in pieces:
        for layer in piece.layers if piece.layers is not None else (None,):
            yield (piece.tensor, layer), (piece.experts or (0, 1), *piece.box)


def _outside(box: Box, other: Box) -> Iterator[Box]:
    """Disjoint boxes that make up what of `box` is outside `other`."""
    for dim, ((lo, hi), (cut_lo, cut_hi)) in enumerate(zip(box, other, strict=True)):
        if lo < cut_lo:
            yield (*box[:dim], (lo, cut_lo), *box[dim + 1 :])
        if cut_hi < hi:
            yield (*box[:dim], (cut_hi, hi), *box[dim + 1 :])
        box = (*box[:dim], (max(lo, cut_lo), min(hi, cut_hi)), *box[dim + 1 :])
