"""Which slice of which checkpoint tensor a rank loads, and how many bytes that is."""

from __future__ import annotations

from collections.abc import Mapping as Ranges
from math import prod

from helixc.plan.lower import Layout
from helixc.plan.mapping import Coordinates
from helixc.plan.parameters import Axis, Dim, Parameter
from helixc_runtime.manifest import ModelArch, Piece, Range, split


def head_ranges(arch: ModelArch, layout: Layout, at: Coordinates) -> tuple[Range, Range, Range]:
    """(q_heads, kv_heads, out_heads) of a rank: before the exchange, of its cache, after the exchange."""
    tp, tp_rank = layout.attention_tp, 0 if layout.attention_dp else at.tp
    heads, kv_heads = arch.num_heads // tp, arch.num_kv_heads
    q = (tp_rank * heads, (tp_rank + 1) * heads)
    if arch.mla:
        kv = (0, 1)  # the latent is shared by all heads
    else:
        # With tp > kv heads, neighbouring tp ranks hold the same head; the checks require tp % kv_heads == 0 then.
        kv = (tp_rank * kv_heads // tp, max((tp_rank + 1) * kv_heads // tp, tp_rank * kv_heads // tp + 1))
    share = heads // layout.mapping.cp
    out = (q[0] + at.cp * share, q[0] + (at.cp + 1) * share)
    return q, kv, out


def axis_ranges(arch: ModelArch, layout: Layout, at: Coordinates) -> dict[Axis, Range]:
    """Range of a rank along every sharded axis. All but the head axes are indexed by the repurposed mapping."""
    q, kv, out = head_ranges(arch, layout, at)
    ffn, moe = layout.mapping.ffn_tp, arch.moe
    return {
        "q_heads": q,
        "kv_heads": kv,
        "out_heads": out,
        "value_heads": q if layout.exchange_space == "value" else out,
        "ffn": split(arch.intermediate_size, ffn, at.ffn_tp),
        "shared_ffn": split(moe.shared_intermediate_size if moe else 0, ffn, at.ffn_tp),
        "moe_ffn": split(moe.intermediate_size if moe else 0, layout.mapping.moe_tp, at.moe_tp),
        "vocab": split(arch.vocab_size, ffn, at.ffn_tp),
    }


def expert_range(arch: ModelArch, layout: Layout, at: Coordinates) -> Range | None:
    """Routed experts of a rank, None for a dense model."""
    return split(arch.moe.experts, layout.mapping.moe_ep, at.moe_ep) if arch.moe else None


def pieces(weights: tuple[Parameter, ...], arch: ModelArch, layout: Layout, at: Coordinates) -> tuple[Piece, ...]:
    """What a rank at coordinates `at` loads, weight by weight."""
    ranges, experts = axis_ranges(arch, layout, at), expert_range(arch, layout, at)
    lo, hi = layout.stages[at.pp]
    found = []
    for weight in weights:
        layers = None if weight.layers is None else tuple(i for i in weight.layers if lo <= i < hi)
        on_stage = {"first": at.pp == 0, "last": at.pp == layout.mapping.pp - 1, "layer": bool(layers)}
        if on_stage[weight.stage]:
            found.append(
                Piece(
                    name=weight.name,
                    tensor=weight.tensor,
                    layers=layers,
                    experts=experts if weight.per_expert else None,
                    shape=tuple(dim.size for dim in weight.dims),
                    box=tuple(_range(dim, ranges) for dim in weight.dims),
                )
            )
    return tuple(found)


def _range(dim: Dim, ranges: Ranges[Axis, Range]) -> Range:
    if dim.axis is None:
        return dim.window or (0, dim.size)
    lo, hi = ranges[dim.axis]
    return lo * dim.unit, hi * dim.unit


def elements(own: tuple[Piece, ...]) -> int:
    """How many weight elements a rank holds. A tied LM head on the embedding's rank is the embedding."""
    return sum({(p.tensor, p.layers, p.box): _elements(p) for p in own}.values())


def _elements(piece: Piece) -> int:
    copies = len(piece.layers) if piece.layers is not None else 1
    experts = piece.experts[1] - piece.experts[0] if piece.experts else 1
    return copies * experts * prod(hi - lo for lo, hi in piece.box)
