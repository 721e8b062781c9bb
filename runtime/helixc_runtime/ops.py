"""The seam under the model: the fused operations of one decode step, for torch (the oracle) and for the cubins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Partial(NamedTuple):
    """Attention over part of the KV: `o` is normalised by its own softmax sum, `lse` is its natural log-sum-exp.

    An empty part has o = 0 and lse = -inf; its memory may hold anything where lse is -inf.
    """

    o: Tensor  # [B, H, D] dtype of the model
    lse: Tensor  # [B, H] float32


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Paged KV of one layer. MLA: k is [pages, block, latent + rope] and v is None (the first latent columns of k).

    GQA: k and v are [pages, kv_heads, block, head_dim]. Unused pages and page tails may hold anything, NaN included.
    float8_e4m3fn: the scales lie beside, uint8, shaped as k and v with a scale for each group of columns in place of
    the columns (quantize.py).
    """

    k: Tensor
    v: Tensor | None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """`query_tokens` (T) new tokens a row, in order, N = B * T in all. All tensors are on the compute device."""

    cos: Tensor  # [N, rope_dim / 2] float32, of the token's global position, attention_factor applied
    sin: Tensor  # [N, rope_dim / 2] float32
    page_table: Tensor  # [B, max_pages] int32, physical pages of this rank's shard in order
    lengths: Tensor  # [N] int32, local tokens to attend, the new ones up to this included where owned; rises in a row
    owned: Tensor  # [N] uint8, 1 where this rank stores the new token's K/V
    slots: Tensor  # [N] int64, page * block + offset of the new token; read only where owned


class Ops(Protocol):
    """Shapes: H query heads and KH KV heads of this rank, D head_dim, P partial_dim. ValueError on a mismatch."""

    def begin_step(self, batch: DecodeBatch) -> None:
        """Prepare a step: what depends on the lengths and pages alone, once for all layers.

        All tokens but those of this step's append must have been written before. `batch` must not change until the
        step's last layer is done. Inside a captured graph it is part of what is replayed, with the lengths of then.
        """
        ...

    def append(self, q: Tensor, k: Tensor, v: Tensor | None, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        """Rotate the last rope_dim dims of q [B, H, D] and k [B, KH, D] (MLA: [B, 1, D]); store k, v of owned rows.

        Returns the rotated q [B, H, D]. Rows that are not owned skip the write, and only the write.
        """
        ...

    def attend(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
        """Softmax attention of q [B, H, D] over each row's first `lengths` local tokens, scaled by softmax_scale."""
        ...

    def combine(self, o: Tensor, lse: Tensor) -> Partial:
        """Merge N partials, o [N, B, H, P] and lse [N, B, H], weighted by exp(lse - max lse), in float32.

        All-empty rows give o = 0 and lse = -inf.
        """
        ...
