"""Ranks of one instance: coordinates in the attention mapping, and the same ranks repurposed for the FFN.

cp is innermost: rank = (pp_rank * tp + tp_rank) * cp + cp_rank. Only then is the head slice a rank holds after the
exchange the row shard of o_proj that it owns.
"""

from __future__ import annotations

from dataclasses import dataclass

from helixc_runtime.manifest import Groups, Range, split


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where a rank stands. ffn_tp, moe_tp, moe_ep are read from the repurposed mapping (tp' = tp * cp, cp' = 1)."""

    pp: int
    tp: int
    cp: int
    ffn_tp: int
    moe_tp: int
    moe_ep: int


@dataclass(frozen=True, slots=True)
class Mapping:
    """The (pp, tp, cp) grid of one instance and its repurposed (pp, moe_tp, moe_ep) grid."""

    tp: int
    cp: int
    pp: int
    moe_ep: int

    @property
    def ffn_tp(self) -> int:
        return self.tp * self.cp

    @property
    def moe_tp(self) -> int:
        return self.ffn_tp // self.moe_ep

    @property
    def world(self) -> int:
        return self.ffn_tp * self.pp

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a local rank."""
        pp, ffn_tp = divmod(rank, self.ffn_tp)
        tp, cp = divmod(ffn_tp, self.cp)
        moe_tp, moe_ep = divmod(ffn_tp, self.moe_ep)
        return Coordinates(pp, tp, cp, ffn_tp, moe_tp, moe_ep)

    def groups(self, rank: int, first: int) -> Groups:
        """Groups of a local rank, as global ranks of an instance that starts at global rank `first`."""
        at = self.coordinates(rank)
        stage = first + at.pp * self.ffn_tp
        return Groups(
            tp=_line(stage + at.cp, self.cp, self.tp),
            cp=_line(stage + at.tp * self.cp, 1, self.cp),
            pp=_line(first + at.ffn_tp, self.ffn_tp, self.pp),
            ffn_tp=_line(stage, 1, self.ffn_tp),
            moe_tp=_line(stage + at.moe_ep, self.moe_ep, self.moe_tp),
            moe_ep=_line(stage + at.moe_tp * self.moe_ep, 1, self.moe_ep),
        )


def _line(start: int, stride: int, count: int) -> tuple[int, ...]:
    return tuple(range(start, start + stride * count, stride))


def stages(layers: int, pp: int, partition: tuple[int, ...] | None) -> tuple[Range, ...]:
    """Layer range of every pipeline stage: even, the first stages get the remainder, or an explicit partition."""
    sizes = partition or tuple(hi - lo for lo, hi in (split(layers, pp, i) for i in range(pp)))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple((lo, lo + n) for lo, n in zip(starts, sizes, strict=True))
