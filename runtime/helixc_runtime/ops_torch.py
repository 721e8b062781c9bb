"""Ops in plain torch: the oracle of the cubins, and what a launch on the CPU runs.

Arithmetic is float32, or float64 where an input is float64. What must not be read is sliced or masked away, never
multiplied by zero: unused memory may hold NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ffn_shape import FfnShape
from helixc_runtime.models.layers import embed, gated_mlp, linear, mix, rms_norm
from helixc_runtime.models.rotary import Rotary, rotate
from helixc_runtime.ops import (
    DecodeBatch,
    GatedMlp,
    LayerCache,
    Mixture,
    MlaProjections,
    MlaUnabsorbed,
    Norm,
    Partial,
    Projections,
)
from helixc_runtime.quantize import dequantize, quantize
from helixc_runtime.shape_checks import (
    check_add_norm,
    check_append,
    check_attend,
    check_combine,
    check_linear,
    check_mixture,
    check_mlp,
)

if TYPE_CHECKING:
    from helixc_runtime.kv import KvCache


class TorchOps:
    """Ops for one rank's `shape`, on any device and any floating dtype; `shape.dtype` is not enforced.

    Without the shape of the FFN, `ffn`, there is no mixture.
    """

    def __init__(self, shape: AttentionShape, ffn: FfnShape | None = None) -> None:
        self.shape, self.ffn = shape, ffn

    def make_batch(self, cache: KvCache, positions: Tensor, attends: Tensor, rotary: Rotary) -> DecodeBatch:
        """See Ops.make_batch."""
        return cache.batch(positions.clamp(min=0), (positions >= 0) & (attends == 1), rotary)

    def embed(self, tokens: Tensor, table: Tensor, first: int) -> Tensor:
        """See Ops.embed."""
        return embed(tokens, table, first)

    def begin_step(self, batch: DecodeBatch) -> None:
        """See Ops.begin_step: there is nothing to prepare."""

    def append(self, new: Projections, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        """See Ops.append. Raises ValueError on a shape mismatch."""
        check_append(self.shape, new, cache, batch)
        q, k, v = self._assemble(new)
        owned = batch.owned.nonzero().squeeze(1)
        slots = batch.slots[owned]
        _store(cache.k, cache.k_scale, self._rotate(k, batch)[owned], slots)
        if cache.v is not None and v is not None:
            _store(cache.v, cache.v_scale, v[owned], slots)
        return self._rotate(q, batch)

    def attend(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
        """See Ops.attend. Raises ValueError on a shape mismatch, or a length beyond the row's page table."""
        check_attend(self.shape, q, cache, batch)
        heads, width, tokens = self.shape.heads, self.shape.partial_dim, self.shape.query_tokens
        compute = _compute_dtype(q, cache.k)
        o = torch.zeros(len(q), heads, width, dtype=compute, device=q.device)
        lse = torch.full((len(q), heads), -torch.inf, dtype=compute, device=q.device)
        for row, bounds in enumerate(batch.lengths.view(-1, tokens).tolist()):
            k, v = (t.to(compute) for t in self._gather(cache, batch.page_table[row], bounds))
            for token, length in enumerate(bounds, start=row * tokens):
                if length:
                    o[token], lse[token] = self._attend_token(q[token].to(compute), k[:, :length], v[:, :length])
        return Partial(o.to(q.dtype), lse)

    def attend_split(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
        """See Ops.attend_split: nothing is left in splits."""
        return self.attend(q, cache, batch)

    def combine(self, o: Tensor, lse: Tensor) -> Partial:
        """See Ops.combine. Raises ValueError on a shape mismatch."""
        check_combine(self.shape, o, lse)
        compute = _compute_dtype(o, lse)
        lse = lse.to(compute)
        empty = torch.isneginf(lse)  # [N, B, H]
        largest = lse.amax(dim=0)
        anchor = largest.masked_fill(torch.isneginf(largest), 0.0)  # all parts empty: -inf - -inf would be NaN
        weight = torch.exp(lse - anchor)
        total = weight.sum(dim=0)  # [B, H]; 0 where every part is empty
        parts = o.to(compute).masked_fill(empty.unsqueeze(-1), 0.0)
        merged = (weight.unsqueeze(-1) * parts).sum(dim=0) / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
        return Partial(merged.to(o.dtype), anchor + torch.log(total))

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """See Ops.linear. Raises ValueError on a shape mismatch."""
        check_linear(x, weight)
        return linear(x, weight)

    def mlp(self, x: Tensor, weights: GatedMlp) -> Tensor:
        """See Ops.mlp. Raises ValueError on a shape mismatch."""
        check_mlp(x, weights)
        return gated_mlp(x, weights.gate, weights.up, weights.down)

    def mixture(self, x: Tensor, weights: Mixture) -> Tensor:
        """See Ops.mixture. Raises ValueError on a shape mismatch."""
        assert self.ffn is not None and self.ffn.moe is not None and self.ffn.experts is not None
        check_mixture(self.ffn, x, weights)
        return mix(self.ffn.moe, self.ffn.experts, weights, x)

    def argmax(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See Ops.argmax."""
        return torch.argmax(x, -1, out=out)

    def add_norm(
        self, x: Tensor, residual: Tensor | None, bias: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor]:
        """See Ops.add_norm. Raises ValueError on a shape mismatch."""
        check_add_norm(x, residual, bias, norm)
        wide = x.to(_compute_dtype(x))
        for addend in (residual, bias):
            wide = wide if addend is None else wide + addend
        out = wide.to(x.dtype)
        return out, out if norm is None else rms_norm(out, norm.weight, norm.eps)

    def _assemble(self, new: Projections) -> tuple[Tensor, Tensor, Tensor | None]:
        """q [N, H, D], k and v (None: MLA) [N, KH, D], normed and not yet rotated."""
        eps = self.shape.norm_eps
        if isinstance(new, MlaUnabsorbed):
            nope = new.k_up.shape[2]
            new = MlaProjections(linear(new.q[..., :nope], new.k_up), new.q[..., nope:], new.kv, new.norm)
        if isinstance(new, MlaProjections):
            latent, rope = new.kv[:, : self.shape.partial_dim], new.kv[:, self.shape.partial_dim :]
            k = torch.cat((rms_norm(latent, new.norm, eps), rope), dim=1).unsqueeze(1)
            return torch.cat((new.q_latent, new.q_rope), dim=-1), k, None
        q = new.q if new.q_norm is None else rms_norm(new.q, new.q_norm, eps)
        k = new.k if new.k_norm is None else rms_norm(new.k, new.k_norm, eps)
        return q, k, new.v

    def _rotate(self, x: Tensor, batch: DecodeBatch) -> Tensor:
        """Rotate the last rope_dim dims of x [N, heads, D]."""
        plain = self.shape.head_dim - self.shape.rope_dim
        tail = rotate(x[..., plain:], batch.cos, batch.sin, interleaved=self.shape.interleaved)
        return torch.cat((x[..., :plain], tail), dim=-1)

    def _gather(self, cache: LayerCache, table: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor]:
        """One row's tokens up to the last bound, L, dequantised: k [KH, L, D] and v [KH, L, P]."""
        block, length = self.shape.block, max(bounds)
        if min(bounds) < 0 or length > table.shape[0] * block:
            outside = length if min(bounds) >= 0 else min(bounds)
            raise ValueError(f"length {outside} is outside a page table of {table.shape[0]} pages of {block} tokens")
        pages = table[: -(-length // block)].long()
        if cache.v is None:
            latent = _pages(cache.k, cache.k_scale, pages).flatten(0, 1)[:length].unsqueeze(0)
            return latent, latent[..., : self.shape.partial_dim]
        stored = ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
        k, v = (_pages(t, scale, pages).transpose(0, 1).flatten(1, 2)[:, :length] for t, scale in stored)
        return k, v

    def _attend_token(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q [H, D], k [KH, L, D], v [KH, L, P] -> o [H, P], natural-log lse [H]."""
        grouped = q.view(self.shape.kv_heads, self.shape.group, -1)
        scores = torch.matmul(grouped, k.transpose(1, 2)) * self.shape.scale  # [KH, G, L]
        o = torch.matmul(torch.softmax(scores, dim=-1), v)
        return o.flatten(0, 1), torch.logsumexp(scores, dim=-1).flatten()


def _store(cache: Tensor, scales: Tensor | None, x: Tensor, slots: Tensor) -> None:
    """Write tokens x [N, KH, D] to their slots of cache [pages, block, D] (one KV head) or [pages, KH, block, D]."""
    page, offset = slots // cache.shape[-2], slots % cache.shape[-2]

    def write(target: Tensor, value: Tensor) -> None:
        heads_first = target.unsqueeze(1) if target.dim() == 3 else target
        heads_first[page, :, offset] = value

    if scales is None:
        write(cache, x.to(cache.dtype))
    else:
        elements, exponents = quantize(x)
        write(cache.view(torch.uint8), elements.view(torch.uint8))  # float8 has no indexed assignment
        write(scales, exponents)


def _pages(elements: Tensor, scales: Tensor | None, pages: Tensor) -> Tensor:
    return elements[pages] if scales is None else dequantize(elements[pages], scales[pages])


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
