"""The seam under the model: the fused operations of one decode step, for torch (the oracle) and for the cubins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from helixc_runtime.manifest import split

if TYPE_CHECKING:
    from helixc_runtime.kv import KvCache
    from helixc_runtime.models.rotary import Rotary


class Partial(NamedTuple):
    """Attention over part of the KV: `o` is normalised by its own softmax sum, `lse` is its natural log-sum-exp.

    An empty part has o = 0 and lse = -inf; its memory may hold anything where lse is -inf.
    """

    o: Tensor  # [B, H, D] dtype of the model
    lse: Tensor  # [B, H] float32

    def merged(self) -> Partial:
        """Itself: as SplitPartial.merged."""
        return self


@dataclass(frozen=True, slots=True)
class SplitPartial:
    """A partial some of whose rows still lie in splits. Which and how many, R at most, is known to the GPU only.

    Of those rows `partial` has nothing yet. The splits are overwritten by the next attend.
    """

    partial: Partial
    o: Tensor  # [splits, Q, D] dtype of the model; Q: the queries of as many tokens as the schedule takes for a row
    lse: Tensor  # [splits, Q] float32
    rows: Tensor  # [R, 4] int32: row of the schedule, first split, number of splits
    count: Tensor  # [1] int32, of `rows`
    merge: Callable[[], None]  # enqueues what fills the rest of `partial`

    def merged(self) -> Partial:
        """The whole partial."""
        self.merge()
        return self.partial


class Norm(NamedTuple):
    """An RMSNorm of the hidden states."""

    weight: Tensor  # [hidden]
    eps: float


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Paged KV of one layer. MLA: k is [pages, block, latent + rope] and v is None (the first latent columns of k).

    GQA: k and v are [pages, kv_heads, block, head_dim]. Unused pages and page tails may hold anything, NaN included.
    float8_e4m3fn: the scales lie beside, uint8, shaped as k and v with one scale in place of the columns (quantize.py).
    """

    k: Tensor
    v: Tensor | None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """`query_tokens` (T) new tokens a row, in order, N = B * T in all. All tensors are on the compute device.

    A captured graph runs with a fixed number of rows: those without a request are padding. Their tokens have length 0
    and owned 0; their slots and pages may hold anything, and what is computed for them is not used.
    """

    cos: Tensor  # [N, rope_dim / 2] float32, of the token's global position, attention_factor applied
    sin: Tensor  # [N, rope_dim / 2] float32
    page_table: Tensor  # [B, max_pages] int32, physical pages of this rank's shard in order
    lengths: Tensor  # [N] int32, local tokens to attend, the new ones up to this included where owned; rises in a row
    owned: Tensor  # [N] uint8, 1 where this rank stores the new token's K/V
    slots: Tensor  # [N] int64, page * block + offset of the new token; read only where owned
    group: int = 0  # which of its step's groups of rows this is

    def in_groups(self, groups: int) -> Iterator[DecodeBatch]:
        """The rows in so many runs, in order, whose numbers of rows differ by one at most."""
        tokens, rows = len(self.lengths), len(self.page_table)
        for group in range(groups):
            first, end = split(rows, groups, group)
            own = slice(first * tokens // rows, end * tokens // rows)
            yield DecodeBatch(
                cos=self.cos[own],
                sin=self.sin[own],
                page_table=self.page_table[first:end],
                lengths=self.lengths[own],
                owned=self.owned[own],
                slots=self.slots[own],
                group=group,
            )


@dataclass(frozen=True, slots=True)
class MlaProjections:
    """What the projections of MLA give for N new tokens, neither normed nor rotated. Rows and heads may be strided."""

    q_latent: Tensor  # [N, H, latent], absorbed: q_nope times W_UK
    q_rope: Tensor  # [N, H, rope]
    kv: Tensor  # [N, latent + rope]
    norm: Tensor  # [latent], of the latent


@dataclass(frozen=True, slots=True)
class MlaUnabsorbed:
    """The same before W_UK. Rows and heads may be strided."""

    q: Tensor  # [N, H, nope + rope]
    k_up: Tensor  # [H, latent, nope]
    kv: Tensor  # [N, latent + rope]
    norm: Tensor  # [latent], of the latent


@dataclass(frozen=True, slots=True)
class GqaProjections:
    """What the projections of GQA give for N new tokens, neither normed nor rotated. Rows and heads may be strided."""

    q: Tensor  # [N, H, D]
    k: Tensor  # [N, KH, D]
    v: Tensor  # [N, KH, D]
    q_norm: Tensor | None = None  # [D], of each head; None: the model has no such norms
    k_norm: Tensor | None = None  # [D]


Projections = MlaProjections | MlaUnabsorbed | GqaProjections


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """This rank's columns I of one gated MLP: down(silu(gate x) * up x)."""

    gate: Tensor  # [I, hidden]
    up: Tensor  # [I, hidden]
    down: Tensor  # [hidden, I]


@dataclass(frozen=True, slots=True)
class Mixture:
    """One layer's router, and this rank's L experts and share of the shared ones."""

    router: Tensor  # [experts, hidden]
    bias: Tensor | None  # [experts] float32, added to the scores for the choice only
    experts: GatedMlp  # stacked: [L, I, hidden], [L, I, hidden], [L, hidden, I]
    shared: GatedMlp | None


class Ops(Protocol):
    """Shapes: H query heads and KH KV heads of this rank, D head_dim, P partial_dim. ValueError on a mismatch.

    A padding row (see DecodeBatch) writes nothing but its own rows of the results.
    """

    def make_batch(self, cache: KvCache, positions: Tensor, attends: Tensor, rotary: Rotary) -> DecodeBatch:
        """KvCache.batch of global `positions` [N] int64, negative for rows that are not in use.

        Of those in use, rows with `attends` [N] int64 of 1 are this rank's to attend for; the others have 0.
        """
        ...

    def embed(self, tokens: Tensor, table: Tensor, first: int) -> Tensor:
        """[N, hidden]: of tokens [N] int64 the rows of table [V, hidden], from token `first` on; else zeros."""
        ...

    def begin_step(self, batch: DecodeBatch) -> None:
        """Prepare a step: what depends on the lengths and pages alone, once for all layers.

        Where rows are attended in groups, once for each group, instead: the groups of a step are prepared side by side.
        All tokens but those of this step's append must have been written before. `batch` must not change until the
        step's last layer is done. Inside a captured graph it is part of what is replayed, with the lengths of then.
        """
        ...

    def append(self, new: Projections, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        """From the projections to attention: W_UK, norms, RoPE of the last rope_dim dims, and the cache's new tokens.

        Returns the queries [N, H, D], of the model's dtype. Keys and values are rounded to the model's dtype, then to
        the cache's (FP8: see quantize.py). Tokens that are not owned skip the write, and only the write.
        """
        ...

    def attend(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
        """Softmax attention of q [B, H, D] over each row's first `lengths` local tokens, scaled by softmax_scale."""
        ...

    def attend_split(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial | SplitPartial:
        """attend, where Comm.exchange takes the result: what is left in splits it merges as it sends."""
        ...

    def combine(self, o: Tensor, lse: Tensor) -> Partial:
        """Merge N partials, o [N, B, H, P] and lse [N, B, H], weighted by exp(lse - max lse), in float32.

        All-empty rows give o = 0 and lse = -inf.
        """
        ...

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [N, in] times weight [out, in] -> [N, out]; with heads, [N, H, in] and [H, out, in] -> [N, H, out]."""
        ...

    def mlp(self, x: Tensor, weights: GatedMlp) -> Tensor:
        """This rank's summand [N, hidden] of a dense MLP of x [N, hidden]."""
        ...

    def mixture(self, x: Tensor, weights: Mixture) -> Tensor:
        """This rank's summand [N, hidden] of a mixture of experts of x [N, hidden]; see layers.route for the routing.

        Equal scores: the lower expert is chosen. Router logits are float32. A row that is NaN spoils only itself.
        """
        ...

    def argmax(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[N] int64: of each row of x [N, V], the first of its largest columns; NaN is larger than any number.

        `out` [N] is filled and returned, if given.
        """
        ...

    def add_norm(
        self, x: Tensor, residual: Tensor | None, bias: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor]:
        """residual + x + bias [B, hidden], added in float32 and rounded once, and its norm (without one: itself).

        None is zero for `residual` [B, hidden] and `bias` [hidden].
        """
        ...
