"""The attention problem one rank solves: what both implementations of Ops, and the kernel selection, are built from."""

from __future__ import annotations

from dataclasses import dataclass

from helixc_runtime.manifest import Dtype, KvDtype, Model, Range, Rank, Space, scale_bytes

LATENT_NORM_EPS = 1e-6  # of q_a and kv_a norms: fixed in the published models, whatever rms_norm_eps says
MAX_SPLITS = 64  # split-KV partials of one row, of the portable kernels
PIECE_COLUMNS = 64  # of a head that an exchange which merges splits sends apart: kPieceColumns of merge_exchange.cuh
MAX_PROCESSORS = 148  # multiprocessors of the largest GPU: Hopper's kernels cut no row into more


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Local heads and dims of one rank.

    `kv_heads` KV heads of width `head_dim` are read by `heads` query heads; partials are `partial_dim` wide. For MLA
    the values are the first `partial_dim` columns of the one latent key, and only MLA has partial_dim != head_dim.
    """

    heads: int
    kv_heads: int
    head_dim: int
    partial_dim: int
    rope_dim: int
    interleaved: bool
    scale: float  # of the scores, softmax_scale
    block: int  # tokens a page
    dtype: Dtype
    kv_dtype: KvDtype
    query_tokens: int = 1  # new tokens a row attends with at once
    qk_norm: bool = False  # GQA: an RMSNorm of each query and key head. MLA always norms its latent
    norm_eps: float = 1e-6  # of that norm
    value_dim: int | None = None  # columns of a partial's head after W_UV, if it is exchanged so

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide among {self.kv_heads} KV heads")
        if self.is_mla and self.kv_heads != 1:
            raise ValueError(f"MLA has one latent KV head, got {self.kv_heads}")
        if self.is_mla and self.qk_norm:
            raise ValueError("MLA has no q/k norms")
        if self.rope_dim % 2 or self.rope_dim > self.head_dim or self.partial_dim > self.head_dim:
            raise ValueError(f"rope_dim {self.rope_dim}, partial_dim {self.partial_dim}, head_dim {self.head_dim}")

    @property
    def is_mla(self) -> bool:
        return self.partial_dim != self.head_dim

    @property
    def exchanged_dim(self) -> int:
        """Columns of a partial's head as the cp ranks exchange and combine it."""
        return self.partial_dim if self.value_dim is None else self.value_dim

    @property
    def scale_bytes(self) -> int:
        """Of the scale of one cached token and KV head: 0 unless the cache is FP8."""
        return scale_bytes(self.kv_dtype)

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.heads // self.kv_heads


def attention_shape(model: Model, rank: Rank, block: int) -> AttentionShape:
    """The shape of `rank` in a deployment with `block` tokens a page."""
    return shape_of_heads(model, rank.q_heads, rank.kv_heads, rank.exchange_space, block)


def shape_of_heads(model: Model, q_heads: Range, kv_heads: Range, space: Space, block: int) -> AttentionShape:
    """The shape of a rank with these heads, which exchanges in `space`."""
    arch = model.arch
    return AttentionShape(
        heads=q_heads[1] - q_heads[0],
        kv_heads=kv_heads[1] - kv_heads[0],
        head_dim=arch.head_dim,
        partial_dim=arch.partial_dim,
        rope_dim=arch.rope_dim,
        interleaved=arch.rope.interleaved,
        scale=arch.softmax_scale,
        block=block,
        dtype=model.dtype,
        kv_dtype=model.kv_dtype,
        qk_norm=arch.qk_norm,
        norm_eps=LATENT_NORM_EPS if arch.mla else arch.norm_eps,
        value_dim=arch.mla.v_head_dim if arch.mla and space == "value" else None,
    )
