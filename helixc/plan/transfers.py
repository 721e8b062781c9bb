"""Prefill to decode: which context rank sends which KV to which generation rank.

Every generation rank receives each (layer, KV head) of its cache from exactly one context rank. Where several context
ranks hold the same head (MLA's latent, duplicated KV heads) the senders are dealt round-robin over the receivers.
"""

from __future__ import annotations

from collections.abc import Iterator

from helixc.plan.lower import Layout
from helixc.plan.mapping import Coordinates
from helixc.plan.shards import head_ranges
from helixc_runtime.manifest import ModelArch, Range, Transfer


def transfers(arch: ModelArch, context: Layout, generation: Layout) -> tuple[Transfer, ...]:
    """All transfers between one context and one generation instance, by local rank, ordered by target."""
    found: list[Transfer] = []
    for target in range(generation.mapping.world):
        to = generation.mapping.coordinates(target)
        _, wanted, _ = head_ranges(arch, generation, to)
        for stage, layers in enumerate(context.stages):
            common = _overlap(layers, generation.stages[to.pp])
            if common is None:
                continue
            for tp_rank, heads in _senders(arch, context, wanted, target):
                source = (stage * context.mapping.tp + tp_rank) * context.mapping.cp
                found.append(Transfer(source, target, common, heads, to.cp))
    return tuple(found)


def _senders(arch: ModelArch, context: Layout, wanted: Range, target: int) -> Iterator[tuple[int, Range]]:
    """(context tp rank, heads it sends): under attention DP any of them, as the request has it, else one a head."""
    held = {t: head_ranges(arch, context, _at_tp(context, t))[1] for t in range(context.mapping.tp)}
    if context.attention_dp:
        yield from ((t, wanted) for t in held)
        return
    by_heads: dict[Range, list[int]] = {}
    for tp_rank, heads in held.items():
        by_heads.setdefault(heads, []).append(tp_rank)
    for heads, tp_ranks in by_heads.items():
        common = _overlap(heads, wanted)
        if common is not None:
            yield tp_ranks[target % len(tp_ranks)], common


def _at_tp(layout: Layout, tp_rank: int) -> Coordinates:
    return layout.mapping.coordinates(tp_rank * layout.mapping.cp)


def _overlap(a: Range, b: Range) -> Range | None:
    lo, hi = max(a[0], b[0]), min(a[1], b[1])
    return (lo, hi) if lo < hi else None
