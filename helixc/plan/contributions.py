"""Sums, written as what was added: the algebra of the symbolic step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from helixc_runtime.manifest import Range


def not_once(terms: Iterable[Range], whole: Range) -> str | None:
    """How the sum of `terms`, each the elements lo..hi-1, differs from each element of `whole` once.

    E.g. "0-3 twice, 8-11 missing"; None if it does not.
    """
    return ", ".join(_faults(list(terms), whole)) or None


def _faults(terms: list[Range], whole: Range) -> Iterator[str]:
    steps: dict[int, int] = {}
    for lo, hi in terms:
        if lo < hi:
            steps[lo] = steps.get(lo, 0) + 1
            steps[hi] = steps.get(hi, 0) - 1
    count = 0
    for at, end in pairwise(sorted({*steps, *whole})):
        count += steps.get(at, 0)
        inside = whole[0] <= at < whole[1]
        if inside and count != 1:
            yield f"{_span(at, end)} {_times(count)}"
        if not inside and count:
            yield f"{_span(at, end)}, which does not exist"


def _times(count: int) -> str:
    return {0: "missing", 2: "twice"}.get(count, f"{count} times")


def _span(lo: int, hi: int) -> str:
    return str(lo) if hi == lo + 1 else f"{lo}-{hi - 1}"
