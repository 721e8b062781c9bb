"""Shape checks at the Ops seam: every mismatch is a ValueError that names the argument and both shapes."""

from __future__ import annotations

from torch import Tensor

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ops import DecodeBatch, LayerCache


def expect_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has `shape`; None stands for any size."""
    matches = tensor.dim() == len(shape) and all(
        want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")


def check_append(
    shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor | None, cache: LayerCache, batch: DecodeBatch
) -> None:
    """Raise ValueError unless the arguments of Ops.append fit `shape`."""
    expect_shape("q", q, (None, shape.heads, shape.head_dim))
    rows = q.shape[0]
    expect_shape("k", k, (rows, shape.kv_heads, shape.head_dim))
    if (v is None) != shape.is_mla:
        raise ValueError("v must be None for MLA" if shape.is_mla else "v is missing")
    if v is not None:
        expect_shape("v", v, (rows, shape.kv_heads, shape.head_dim))
    for name, angles in (("cos", batch.cos), ("sin", batch.sin)):
        expect_shape(name, angles, (rows, shape.rope_dim // 2))
    expect_shape("owned", batch.owned, (rows,))
    expect_shape("slots", batch.slots, (rows,))
    check_cache(shape, cache)


def check_attend(shape: AttentionShape, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> None:
    """Raise ValueError unless the arguments of Ops.attend fit `shape`."""
    expect_shape("q", q, (None, shape.heads, shape.head_dim))
    expect_shape("page_table", batch.page_table, (q.shape[0], None))
    expect_shape("lengths", batch.lengths, (q.shape[0],))
    check_cache(shape, cache)


def check_combine(shape: AttentionShape, o: Tensor, lse: Tensor) -> None:
    """Raise ValueError unless the arguments of Ops.combine fit `shape`."""
    expect_shape("o", o, (None, None, None, shape.partial_dim))
    expect_shape("lse", lse, tuple(o.shape[:3]))
    if o.shape[0] == 0:
        raise ValueError("combine needs at least one partial")


def check_cache(shape: AttentionShape, cache: LayerCache) -> None:
    """Raise ValueError unless `cache` has the pages of `shape`."""
    if (cache.v is None) != shape.is_mla:
        raise ValueError("the cache's v must be None for MLA" if shape.is_mla else "the cache has no v")
    if cache.v is None:
        expect_shape("cache.k", cache.k, (None, shape.block, shape.head_dim))
        return
    pages = (cache.k.shape[0], shape.kv_heads, shape.block, shape.head_dim)
    expect_shape("cache.k", cache.k, pages)
    expect_shape("cache.v", cache.v, pages)
