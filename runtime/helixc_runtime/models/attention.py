"""Attention of one rank: prefill over a whole prompt, and Helix decode over this rank's shard of the KV.

Both return this rank's summand of the layer's output, [N, hidden], before the sum over the repurposed ranks: the rows
of o_proj it multiplies are the heads it holds after the exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from helixc_runtime.attention_shape import LATENT_NORM_EPS
from helixc_runtime.manifest import Mla, ModelArch, Space
from helixc_runtime.models.layers import rms_norm
from helixc_runtime.models.pipeline import Pipeline
from helixc_runtime.models.rotary import Rotary, rotate
from helixc_runtime.ops import DecodeBatch, GqaProjections, LayerCache, MlaUnabsorbed, Norm, Ops, Partial, SplitPartial
from helixc_runtime.weights import Weights

Linear = Callable[[Tensor, Tensor], Tensor]  # x, weight: see Ops.linear
Normed = Callable[[Tensor, Norm], Tensor]
Keep = Callable[[Tensor], Tensor]  # KV [..., width] as computed -> as a cache gives it back


def unchanged(kv: Tensor) -> Tensor:
    """The KV of a prompt as it attends to itself: not cached yet."""
    return kv


class Attention(Protocol):
    """Both kinds of attention."""

    def prefill(self, layer: int, x: Tensor, angles: tuple[Tensor, Tensor], keep: Keep) -> tuple[Tensor, Tensor]:
        """Causal attention over one prompt, x [L, hidden].

        Returns (summand [L, hidden], KV to cache: MLA [L, latent + rope], GQA [2, KH, L, D]). What `keep` makes of the
        KV, vector by vector, is what is attended and returned.
        """
        ...

    def decode(
        self, layer: int, x: Tensor, cache: LayerCache, batch: DecodeBatch, ops: Ops, pipeline: Pipeline
    ) -> Tensor:
        """One new token a row, x [B, hidden] -> summand [B, hidden]."""
        ...


def make_attention(arch: ModelArch, weights: Weights, rotary: Rotary, space: Space) -> Attention:
    """The attention `arch` has, whose partials are exchanged in `space`."""
    return MlaAttention(arch, arch.mla, weights, rotary, space) if arch.mla else GqaAttention(arch, weights, rotary)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of q [L, H, D] over k [L, KH, D] and v [L, KH, V] -> [L, H, V]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


class GqaAttention:
    """Grouped-query attention (Llama, Qwen3): heads q, KV heads kv of this rank."""

    def __init__(self, arch: ModelArch, weights: Weights, rotary: Rotary) -> None:
        self.arch, self.weights, self.rotary = arch, weights, rotary

    def prefill(self, layer: int, x: Tensor, angles: tuple[Tensor, Tensor], keep: Keep) -> tuple[Tensor, Tensor]:
        new = self._project(layer, x)
        q, k = (
            rotate(_normed(t, weight, self.arch.norm_eps), *angles, interleaved=self.rotary.interleaved)
            for t, weight in ((new.q, new.q_norm), (new.k, new.k_norm))
        )
        k, v = kv = keep(torch.stack((k, new.v)))
        out = _causal(q, k, v, self.arch.softmax_scale)  # [L, H, D]
        return F.linear(out.flatten(1), self.weights("o", layer)), kv.transpose(1, 2)

    def decode(
        self, layer: int, x: Tensor, cache: LayerCache, batch: DecodeBatch, ops: Ops, pipeline: Pipeline
    ) -> Tensor:
        q = ops.append(self._project(layer, x, ops.linear), cache, batch)
        what = f"layer {layer} partials"
        out = pipeline.run(q, lambda q, group: ops.attend_split(q, cache, group), what)  # [B, H / C, D]
        return ops.linear(out.flatten(1), self.weights("o", layer))

    def _project(self, layer: int, x: Tensor, linear: Linear = F.linear) -> GqaProjections:
        names = ("q", "k", "v")
        parts = _project_by(self.weights, names, layer, x, linear)
        q, k, v = (part.view(len(x), -1, self.arch.head_dim) for part in parts)
        if not self.arch.qk_norm:
            return GqaProjections(q, k, v)
        return GqaProjections(q, k, v, self.weights("q_norm", layer), self.weights("k_norm", layer))


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else rms_norm(x, weight, eps)


class MlaAttention:
    """Multi-head latent attention (DeepSeek). Decode is absorbed: queries go to the latent space, W_UV comes last.

    The merge of partials is linear in them, so that W_UV may come before the exchange, of all heads attended, or after
    it, of the heads that are left.
    """

    def __init__(self, arch: ModelArch, mla: Mla, weights: Weights, rotary: Rotary, space: Space) -> None:
        self.arch, self.mla, self.weights, self.rotary, self.space = arch, mla, weights, rotary, space

    def prefill(self, layer: int, x: Tensor, angles: tuple[Tensor, Tensor], keep: Keep) -> tuple[Tensor, Tensor]:
        q, kv = self._project(layer, x, F.linear, lambda low, norm: rms_norm(low, *norm))
        q_nope, q_rope = torch.split(q, [self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim], dim=-1)
        latent = rms_norm(kv[:, : self.mla.kv_lora_rank], self.weights("kv_a_norm", layer), LATENT_NORM_EPS)
        k_rope = kv[:, self.mla.kv_lora_rank :].unsqueeze(1)  # [L, 1, rope]
        q_rope, k_rope = (rotate(t, *angles, interleaved=self.rotary.interleaved) for t in (q_rope, k_rope))
        kv = keep(torch.cat((latent, k_rope.squeeze(1)), dim=-1))
        latent, k_rope = kv[:, : self.mla.kv_lora_rank], kv[:, self.mla.kv_lora_rank :].unsqueeze(1)
        k_nope = torch.einsum("lc,hdc->lhd", latent, self.weights("k_up", layer))
        v = torch.einsum("lc,hdc->lhd", latent, self.weights("v_up", layer))
        k = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1)), dim=-1)
        out = _causal(torch.cat((q_nope, q_rope), dim=-1), k, v, self.arch.softmax_scale)
        return F.linear(out.flatten(1), self.weights("o", layer)), kv

    def decode(
        self, layer: int, x: Tensor, cache: LayerCache, batch: DecodeBatch, ops: Ops, pipeline: Pipeline
    ) -> Tensor:
        q, kv = self._project(
            layer, x, ops.linear, lambda low, norm: ops.add_norm(low.contiguous(), None, None, norm)[1]
        )
        k_up = self.weights("k_up", layer).transpose(1, 2)  # [H, latent, nope]
        q = ops.append(MlaUnabsorbed(q, k_up, kv, self.weights("kv_a_norm", layer)), cache, batch)
        v_up, before = self.weights("v_up", layer), self.space == "value"

        def attend(q: Tensor, group: DecodeBatch) -> Partial | SplitPartial:
            if not before:
                return ops.attend_split(q, cache, group)
            partial = ops.attend(q, cache, group)
            # An empty part's values may be NaN, as its partial.
            return Partial(ops.linear(partial.o, v_up).contiguous(), partial.lse)

        out = pipeline.run(q, attend, f"layer {layer} partials")  # [B, H / C, v], or of latents
        out = out if before else ops.linear(out, v_up)
        return ops.linear(out.flatten(1), self.weights("o", layer))

    def _project(self, layer: int, x: Tensor, linear: Linear, normed: Normed) -> tuple[Tensor, Tensor]:
        """q [N, H, nope + rope] of all heads attended before the exchange; kv [N, latent + rope].

        kv is the latent and the shared rope key, neither normed nor rotated.
        """
        if self.mla.q_lora_rank is None:
            q, kv = _project_by(self.weights, ("q", "kv_a"), layer, x, linear)
        else:
            low, kv = _project_by(self.weights, ("q_a", "kv_a"), layer, x, linear)
            low = normed(low, Norm(self.weights("q_a_norm", layer), LATENT_NORM_EPS))
            q = linear(low, self.weights("q_b", layer))
        return q.view(len(x), -1, self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim), kv


def _project_by(weights: Weights, names: tuple[str, ...], layer: int, x: Tensor, linear: Linear) -> list[Tensor]:
    """x [N, hidden] times each of the matrices, plus its bias if it has one; one product for all."""
    sizes = [len(weights(name, layer)) for name in names]
    parts = torch.split(linear(x, weights.fused(names, layer)), sizes, dim=1)
    biases = [weights.get(f"{name}_bias", layer) for name in names]
    return [part if bias is None else part + bias for part, bias in zip(parts, biases, strict=True)]
