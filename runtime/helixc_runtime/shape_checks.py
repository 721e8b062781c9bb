"""Shape checks at the Ops seam: every mismatch is a ValueError that names the argument and both shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ffn_shape import FfnShape
from helixc_runtime.ops import (
    DecodeBatch,
    GatedMlp,
    GqaProjections,
    LayerCache,
    Mixture,
    MlaProjections,
    MlaUnabsorbed,
    Norm,
    Projections,
)


def expect_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has `shape`; None stands for any size."""
    found = tensor.shape
    if found == shape:  # in the way of every launch: no time for more
        return
    if len(found) == len(shape):
        for want, size in zip(shape, found, strict=True):
            if want is not None and want != size:
                break
        else:
            return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(f"{name} has shape {list(found)}, expected [{wanted}]")


def check_append(shape: AttentionShape, new: Projections, cache: LayerCache, batch: DecodeBatch) -> None:
    """Raise ValueError unless the arguments of Ops.append fit `shape`."""
    if isinstance(new, GqaProjections) == shape.is_mla:
        raise ValueError(f"got {type(new).__name__} for {'MLA' if shape.is_mla else 'GQA'}")
    tokens = len(batch.slots)
    if isinstance(new, MlaProjections):
        expect_shape("q_latent", new.q_latent, (tokens, shape.heads, shape.partial_dim))
        expect_shape("q_rope", new.q_rope, (tokens, shape.heads, shape.rope_dim))
        expect_shape("kv", new.kv, (tokens, shape.head_dim))
        expect_shape("norm", new.norm, (shape.partial_dim,))
    elif isinstance(new, MlaUnabsorbed):
        expect_shape("k_up", new.k_up, (shape.heads, shape.partial_dim, None))
        expect_shape("q", new.q, (tokens, shape.heads, new.k_up.shape[2] + shape.rope_dim))
        expect_shape("kv", new.kv, (tokens, shape.head_dim))
        expect_shape("norm", new.norm, (shape.partial_dim,))
    else:
        _check_gqa(shape, new, tokens)
    for name, angles in (("cos", batch.cos), ("sin", batch.sin)):
        expect_shape(name, angles, (tokens, shape.rope_dim // 2))
    expect_shape("owned", batch.owned, (tokens,))
    expect_shape("slots", batch.slots, (tokens,))
    check_cache(shape, cache)


def _check_gqa(shape: AttentionShape, new: GqaProjections, tokens: int) -> None:
    expect_shape("q", new.q, (tokens, shape.heads, shape.head_dim))
    expect_shape("k", new.k, (tokens, shape.kv_heads, shape.head_dim))
    expect_shape("v", new.v, (tokens, shape.kv_heads, shape.head_dim))
    for name, weight in (("q_norm", new.q_norm), ("k_norm", new.k_norm)):
        if (weight is not None) != shape.qk_norm:
            raise ValueError(f"{name} must be {'a weight' if shape.qk_norm else 'None'} for this shape")
        if weight is not None:
            expect_shape(name, weight, (shape.head_dim,))


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
    expect_shape("o", o, (None, None, None, shape.exchanged_dim))
    expect_shape("lse", lse, tuple(o.shape[:3]))
    if o.shape[0] == 0:
        raise ValueError("combine needs at least one partial")


def check_add_norm(x: Tensor, residual: Tensor | None, bias: Tensor | None, norm: Norm | None) -> None:
    """Raise ValueError unless the arguments of Ops.add_norm fit each other."""
    expect_shape("x", x, (None, None))
    if residual is not None:
        expect_shape("residual", residual, tuple(x.shape))
    for name, row in (("bias", bias), ("norm", norm and norm.weight)):
        if row is not None:
            expect_shape(name, row, (x.shape[1],))


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
            expect_shape(f"cache.{name}_scale", scales, (*elements.shape[:-1], 1))


def check_linear(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless the arguments of Ops.linear fit each other."""
    if weight.dim() not in (2, 3):
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [out, in] or [heads, out, in]")
    expect_shape("x", x, (None, *weight.shape[:-2], weight.shape[-1]))


def check_mlp(x: Tensor, weights: GatedMlp) -> None:
    """Raise ValueError unless the arguments of Ops.mlp fit each other."""
    expect_shape("gate", weights.gate, (None, None))
    columns, hidden = weights.gate.shape
    expect_shape("x", x, (None, hidden))
    expect_shape("up", weights.up, (columns, hidden))
    expect_shape("down", weights.down, (hidden, columns))


def check_mixture(shape: FfnShape, x: Tensor, weights: Mixture) -> None:
    """Raise ValueError unless the arguments of Ops.mixture fit `shape`."""
    assert shape.moe is not None
    hidden, local, columns = shape.hidden, shape.local_experts, shape.expert_columns
    expect_shape("x", x, (None, hidden))
    expect_shape("router", weights.router, (shape.moe.experts, hidden))
    if weights.bias is not None:
        expect_shape("bias", weights.bias, (shape.moe.experts,))
    expect_shape("experts.gate", weights.experts.gate, (local, columns, hidden))
    expect_shape("experts.up", weights.experts.up, (local, columns, hidden))
    expect_shape("experts.down", weights.experts.down, (local, hidden, columns))
    if (weights.shared is not None) != (shape.moe.shared_intermediate_size > 0):
        raise ValueError("the mixture must have shared experts if the model has, and only then")
    if weights.shared is not None:
        check_mlp(x, weights.shared)
        expect_shape("shared.gate", weights.shared.gate, (shape.shared_columns, hidden))


def indices_of(x: Tensor, out: Tensor | None) -> Tensor:
    """`out`, or new memory for it: an index for each row of `x`. Raises ValueError if it is not [len(x)] int64."""
    if out is None:
        return torch.empty(len(x), dtype=torch.int64, device=x.device)
    expect_shape("out", out, (len(x),))
    if out.dtype != torch.int64 or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype}, strides {out.stride()}, expected contiguous torch.int64")
    return out
