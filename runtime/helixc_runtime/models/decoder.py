"""One pipeline stage of a decoder-only model, sharded over the ranks of that stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from helixc_runtime.comm import Comm
from helixc_runtime.manifest import WITHOUT_HOP, Hop, ModelArch, Range, Rank, split
from helixc_runtime.models.attention import Keep, Linear, make_attention, unchanged
from helixc_runtime.models.layers import embed, mixture, mixture_weights, mlp, mlp_weights, rms_norm
from helixc_runtime.models.pipeline import Pipeline
from helixc_runtime.models.rotary import Rotary
from helixc_runtime.ops import DecodeBatch, LayerCache, Norm, Ops
from helixc_runtime.weights import Weights

Attend = Callable[[int, Tensor], Tensor]  # (layer, normed hidden [N, hidden]) -> this rank's summand


@dataclass(frozen=True, slots=True)
class Decoder:
    """Layers `rank.layers` of the model, with the embedding on the first stage and the LM head on the last."""

    arch: ModelArch
    rank: Rank
    weights: Weights
    comm: Comm
    device: torch.device
    dtype: torch.dtype
    hop: Hop = WITHOUT_HOP

    @property
    def is_first(self) -> bool:
        return self.rank.layers[0] == 0

    @property
    def is_last(self) -> bool:
        return self.rank.layers[1] == self.arch.num_layers

    def rotary(self) -> Rotary:
        """The model's rotary embedding on this device."""
        return Rotary(self.arch.rope, self.arch.rope_dim, self.device)

    def prefill(
        self,
        tokens: Tensor,
        rotary: Rotary,
        *,
        attends: bool,
        on_layer: Callable[[int], None] = lambda _: None,
        keep: Keep = unchanged,
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [L, hidden] after this stage for one prompt, tokens [L], and the KV of its layers.

        `attends` False: another data-parallel rank has this request; this one only takes part in the FFN. `keep`: see
        Attention.prefill.
        """
        attention = make_attention(self.arch, self.weights, rotary, self.rank.exchange_space)
        angles = rotary.angles(torch.arange(tokens.shape[0], device=self.device))
        cached: list[Tensor] = []

        def attend(layer: int, x: Tensor) -> Tensor:
            on_layer(layer)
            if not attends:
                return torch.zeros_like(x)
            out, kv = attention.prefill(layer, x, angles, keep)
            cached.append(kv)
            return out

        x = self._embedded(tokens) if self.is_first else self._received(len(tokens))
        for layer in range(*self.rank.layers):
            x = self._layer(layer, x, attend)
        self._pass_on(x)
        return x, cached

    def decode(self, tokens: Tensor, caches: list[LayerCache], batch: DecodeBatch, rotary: Rotary, ops: Ops) -> Tensor:
        """What this stage makes of one new token a row, tokens [B]: [B, hidden], for `head` on the last stage.

        Rows that this rank does not attend for, other data-parallel ranks' and padding, are empty in `batch`: they
        add zeros to the layer's sum.
        """
        attention = make_attention(self.arch, self.weights, rotary, self.rank.exchange_space)
        pipeline = Pipeline(self.hop, len(self.rank.groups.cp), batch, ops, self.comm)
        first, end = self.rank.layers
        norm = self._norm("input_norm", first)
        if self.is_first:
            x, normed = self.comm.reduce(self._own_rows(tokens, ops.embed), None, None, norm, ops, "embedding")
        else:
            x, normed = ops.add_norm(self._received(len(tokens)), None, None, norm)
        for layer in range(first, end):
            attended = attention.decode(layer, normed, caches[layer - first], batch, ops, pipeline)
            bias, norm = self.weights.get("o_bias", layer), self._norm("post_norm", layer)
            x, normed = self.comm.reduce(attended, x, bias, norm, ops, f"layer {layer} o_proj")
            computed = self._ffn_step(layer, normed, ops)
            x, normed = self.comm.reduce(computed, x, None, self._norm_after(layer), ops, f"layer {layer} FFN")
        self._pass_on(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [N, hidden] after the last layer."""
        return self.head(rms_norm(hidden, self.weights("norm"), self.arch.norm_eps))

    def head(self, normed: Tensor, linear: Linear = F.linear) -> Tensor:
        """Logits [N, vocab] float32, the same on every rank of the last stage, of normed hidden states [N, hidden]."""
        local = linear(normed, self.weights("head"))
        parts = len(self.rank.groups.ffn_tp)
        sizes = [hi - lo for lo, hi in (split(self.arch.vocab_size, parts, i) for i in range(parts))]
        gathered = self.comm.all_gather(F.pad(local, (0, max(sizes) - local.shape[1])), "ffn_tp")
        return torch.cat([part[:, :size] for part, size in zip(gathered, sizes, strict=True)], dim=1).float()

    def greedy(self, normed: Tensor, ops: Ops, out: Tensor | None = None) -> Tensor:
        """head(normed).argmax(-1), [N] int64, for which no logit has to leave its rank. In `out`, if given."""
        first, _ = self._own_vocabulary()
        return self.comm.argmax(ops.linear(normed, self.weights("head")), first, ops, "tokens", out)

    def _layer(self, layer: int, x: Tensor, attend: Attend) -> Tensor:
        """One layer of a prompt."""
        attended = attend(layer, rms_norm(x, self.weights("input_norm", layer), self.arch.norm_eps))
        x = x + self.comm.all_reduce(attended, "ffn_tp")
        if (bias := self.weights.get("o_bias", layer)) is not None:
            x = x + bias
        normed = rms_norm(x, self.weights("post_norm", layer), self.arch.norm_eps)
        return x + self.comm.all_reduce(self._ffn(layer, normed), "ffn_tp")

    def _norm(self, name: str, layer: int | None = None) -> Norm:
        return Norm(self.weights(name, layer), self.arch.norm_eps)

    def _norm_after(self, layer: int) -> Norm | None:
        """The norm of what `layer` gives. A stage that is not the last leaves it to the next."""
        if layer + 1 < self.rank.layers[1]:
            return self._norm("input_norm", layer + 1)
        return self._norm("norm") if self.is_last else None

    def _received(self, rows: int) -> Tensor:
        """Hidden states [rows, hidden] of the stage before."""
        empty = torch.empty(rows, self.arch.hidden_size, dtype=self.dtype, device=self.device)
        return self.comm.recv(empty, self.rank.groups.pp[self.rank.pp_rank - 1])

    def _pass_on(self, x: Tensor) -> None:
        """To the next stage, if there is one."""
        if not self.is_last:
            self.comm.send(x, self.rank.groups.pp[self.rank.pp_rank + 1])

    def _ffn(self, layer: int, x: Tensor) -> Tensor:
        if self.arch.moe and self.arch.is_moe(layer):
            return mixture(self.weights, layer, self.arch.moe, self.rank, x)
        return mlp(self.weights, layer, x)

    def _ffn_step(self, layer: int, x: Tensor, ops: Ops) -> Tensor:
        """The same of a decode step's few rows."""
        if self.arch.is_moe(layer):
            return ops.mixture(x, mixture_weights(self.weights, layer))
        return ops.mlp(x, mlp_weights(self.weights, layer))

    def _embedded(self, tokens: Tensor) -> Tensor:
        return self.comm.all_reduce(self._own_rows(tokens, embed), "ffn_tp")

    def _own_rows(self, tokens: Tensor, embed: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
        """The vocabulary is sharded: rows of other ranks contribute zeros to the sum."""
        first, _ = self._own_vocabulary()
        return embed(tokens, self.weights("embed"), first)

    def _own_vocabulary(self) -> Range:
        """Tokens whose embedding and logits are this rank's."""
        return split(self.arch.vocab_size, len(self.rank.groups.ffn_tp), self.rank.ffn_tp_rank)
