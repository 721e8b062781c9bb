"""Shape checks at the Ops seam: every mismatch is a ValueError that names the argument and both shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.manifest import scale_groups
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
    expect_shape("page_table", batch.page_table, (None, None))
    tokens, rows = q.shape[0], batch.page_table.shape[0]
    if tokens != rows * shape.query_tokens:
        raise ValueError(f"q has {tokens} tokens, expected {shape.query_tokens} for each of {rows} rows")
    expect_shape("lengths", batch.lengths, (tokens,))
    check_cache(shape, cache)


def check_combine(shape: AttentionShape, o: Tensor, lse: Tensor) -> None:
    """Raise ValueError unless the arguments of Ops.combine fit `shape`."""
    expect_shape("o", o, (None, None, None, shape.partial_dim))
    expect_shape("lse", lse, tuple(o.shape[:3]))
    if o.shape[0] == 0:
        raise ValueError("combine needs at least one partial")


def check_cache(shape: AttentionShape, cache: LayerCache) -> None:
    """Raise ValueError unless `cache` has the pages of `shape`, and scales if its elements are FP8."""
    if (cache.v is None) != shape.is_mla:
        raise ValueError("the cache's v must be None for MLA" if shape.is_mla else "the cache has no v")
    heads = () if shape.is_mla else (shape.kv_heads,)
    pages = (cache.k.shape[0], *heads, shape.block)
    for name, elements, scales in (("k", cache.k, cache.k_scale), ("v", cache.v, cache.v_scale)):
        if elements is not None:
            expect_shape(f"cache.{name}", elements, (*pages, shape.head_dim))
        if (scales is not None) != (elements is not None and elements.dtype == torch.float8_e4m3fn):
            raise ValueError(f"cache.{name} must have scales if it is float8_e4m3fn, and only then")
        if scales is not None and elements is not None:
            groups = scale_groups(shape.head_dim, "float8_e4m3fn")
            expect_shape(f"cache.{name}_scale", scales, (*elements.shape[:-1], groups))
