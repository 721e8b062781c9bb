"""What one rank's FFN kernels are specialised on: its share of a dense MLP, of the experts, and the router."""

from __future__ import annotations

from dataclasses import dataclass

from helixc_runtime.manifest import Dtype, Instance, Model, Moe, Range, Rank, split

GROUPED_COLUMNS = 8  # local expert columns are padded to multiples of this: 16 bytes of bfloat16 (see weights.py)
EIGHTS = (1, 2)  # tokens that the kernels of few tokens serve, in eights


_TEAM_COLUMNS = 128  # columns that keep one more warp of a team busy: kUnitColumns of skinny.cuh


def team_of(columns: int) -> int:
    """Warps that share the columns of a tile of weights and all have work: a power of two up to 8."""
    units = -(-columns // _TEAM_COLUMNS)
    return next(team for team in (8, 4, 2, 1) if team <= units or team == 1)


@dataclass(frozen=True, slots=True)
class FfnShape:
    """Local widths of one rank, in columns of its activations. 0: the rank has no such layer, or no such experts."""

    hidden: int
    dtype: Dtype
    dense_columns: int
    moe: Moe | None
    experts: Range | None  # of this rank, among all
    expert_columns: int  # of each expert, as padded
    shared_columns: int

    @property
    def local_experts(self) -> int:
        return self.experts[1] - self.experts[0] if self.experts else 0


def ffn_shape(model: Model, rank: Rank, instance: Instance) -> FfnShape:
    """The shape of `rank`, a rank of `instance`."""
    arch, moe = model.arch, model.arch.moe
    layers = range(*rank.layers)
    ffn_tp = len(rank.groups.ffn_tp)

    def share(size: int, parts: int, index: int) -> int:
        lo, hi = split(size, parts, index)
        return hi - lo

    is_dense, is_mixture = (any(arch.is_moe(layer) == kind for layer in layers) for kind in (False, True))
    dense = share(arch.intermediate_size, ffn_tp, rank.ffn_tp_rank) if is_dense else 0
    if moe is None or not is_mixture:
        return FfnShape(arch.hidden_size, model.dtype, dense, None, None, 0, 0)
    columns = share(moe.intermediate_size, instance.moe_tp, rank.moe_tp_rank)
    shared = share(moe.shared_intermediate_size, ffn_tp, rank.ffn_tp_rank)
    padded = columns + -columns % GROUPED_COLUMNS
    return FfnShape(arch.hidden_size, model.dtype, dense, moe, rank.experts, padded, shared)
