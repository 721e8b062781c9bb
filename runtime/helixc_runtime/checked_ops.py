"""HELIXC_CHECK_NAN: Ops that look for NaN in all that goes into an operation and comes out of it."""

from __future__ import annotations

import torch
from torch import Tensor

from helixc_runtime.kv import KvCache
from helixc_runtime.models.rotary import Rotary
from helixc_runtime.ops import DecodeBatch, GatedMlp, LayerCache, Mixture, Norm, Ops, Partial, Projections

_WEIGHTS = frozenset({"k_up", "norm", "q_norm", "k_norm"})  # of Projections


class CheckedOps:
    """Another Ops, with a FloatingPointError, naming rank, layer, operation and value, for each NaN that is used.

    What may hold anything is not looked at: tokens of length 0 (padding, or nothing on this rank) and partials whose
    LSE is -inf. Layers are counted from `first_layer`, one with each append. Waits for the GPU at every check.
    """

    def __init__(self, ops: Ops, rank: int, first_layer: int) -> None:
        self._ops, self._rank, self._first_layer = ops, rank, first_layer
        self._layer = first_layer

    def make_batch(self, cache: KvCache, positions: Tensor, attends: Tensor, rotary: Rotary) -> DecodeBatch:
        """See Ops.make_batch."""
        return self._ops.make_batch(cache, positions, attends, rotary)

    def embed(self, tokens: Tensor, table: Tensor, first: int) -> Tensor:
        """See Ops.embed. Not checked: as add_norm."""
        return self._ops.embed(tokens, table, first)

    def begin_step(self, batch: DecodeBatch) -> None:
        """See Ops.begin_step."""
        self._layer = self._first_layer - 1
        self._ops.begin_step(batch)

    def append(self, new: Projections, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        """See Ops.append."""
        self._layer += 1
        used = batch.lengths > 0
        for name in new.__slots__:
            given: Tensor | None = getattr(new, name)
            if given is not None:  # weights are used by all tokens
                of = used.any() if name in _WEIGHTS else used
                self._expect_numbers(f"{name} given to append", given, of)
        q = self._ops.append(new, cache, batch)
        self._expect_numbers("q of append", q, used)
        return q

    def attend(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
        """See Ops.attend."""
        self._expect_numbers("q given to attend", q, batch.lengths > 0)
        out = self._ops.attend(q, cache, batch)
        self._expect_partial("of attend", out)
        return out

    def attend_split(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
        """See Ops.attend_split. What is checked has to be merged."""
        return self.attend(q, cache, batch)

    def combine(self, o: Tensor, lse: Tensor) -> Partial:
        """See Ops.combine."""
        self._expect_partial("given to combine", Partial(o, lse))
        out = self._ops.combine(o, lse)
        self._expect_partial("of combine", out)
        return out

    def add_norm(
        self, x: Tensor, residual: Tensor | None, bias: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor]:
        """See Ops.add_norm. Not checked: rows of padding may hold anything, and what comes of the others is used."""
        return self._ops.add_norm(x, residual, bias, norm)

    def argmax(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See Ops.argmax. Not checked: as add_norm."""
        return self._ops.argmax(x, out)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """See Ops.linear. Not checked: as add_norm."""
        return self._ops.linear(x, weight)

    def mlp(self, x: Tensor, weights: GatedMlp) -> Tensor:
        """See Ops.mlp. Not checked: as add_norm."""
        return self._ops.mlp(x, weights)

    def mixture(self, x: Tensor, weights: Mixture) -> Tensor:
        """See Ops.mixture. Not checked: as add_norm."""
        return self._ops.mixture(x, weights)

    def _expect_partial(self, which: str, partial: Partial) -> None:
        self._expect_numbers(f"lse {which}", partial.lse, torch.ones_like(partial.lse, dtype=torch.bool))
        self._expect_numbers(f"o {which}", partial.o, ~partial.lse.isneginf())

    def _expect_numbers(self, what: str, values: Tensor, used: Tensor) -> None:
        """`used` [...] says which of `values` [..., any] count."""
        wrong = values.isnan() & used.view(*used.shape, *[1] * (values.dim() - used.dim()))
        if wrong.any():
            first = tuple(wrong.nonzero()[0].tolist())
            raise FloatingPointError(
                f"rank {self._rank}, layer {self._layer}: {what} is NaN at {int(wrong.sum())} of {values.numel()} "
                f"places, first at {first} of {list(values.shape)}"
            )
