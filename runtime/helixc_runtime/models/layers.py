"""The pieces around attention: norms, the gated MLP and the mixture of experts, each over this rank's shard."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from helixc_runtime.manifest import Moe, Range, Rank
from helixc_runtime.ops import GatedMlp, Mixture
from helixc_runtime.weights import Weights

ROUTED_ROWS = 4096  # tokens of a prompt that are routed at a time: each takes top_k rows of memory, in float32 too


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim, in float32 until the weight is applied (as the published models do).

    float64 stays float64.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def embed(tokens: Tensor, table: Tensor, first: int) -> Tensor:
    """[N, hidden]: what `table` [V, hidden], the vocabulary from token `first` on, has for tokens [N]; else zeros."""
    rows = tokens - first
    outside = (rows < 0) | (rows >= len(table))
    return table[rows.clamp(0, len(table) - 1)].masked_fill(outside.unsqueeze(1), 0.0)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See Ops.linear: [N, in] by [out, in], or [N, H, in] by [H, out, in]."""
    return F.linear(x, weight) if weight.dim() == 2 else torch.einsum("nhi,hoi->nho", x, weight)


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x) of this rank's rows: a summand of the whole, [N, hidden]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def mlp(weights: Weights, layer: int, x: Tensor) -> Tensor:
    """This rank's summand of a dense layer's MLP."""
    dense = mlp_weights(weights, layer)
    return gated_mlp(x, dense.gate, dense.up, dense.down)


def mlp_weights(weights: Weights, layer: int, name: str = "mlp") -> GatedMlp:
    """A dense layer's MLP, or "shared" or "expert" ones of a mixture."""
    return GatedMlp(*(weights(f"{name}_{part}", layer) for part in ("gate", "up", "down")))


def mixture_weights(weights: Weights, layer: int) -> Mixture:
    """All that an MoE layer's FFN reads."""
    shared = mlp_weights(weights, layer, "shared") if weights.get("shared_gate", layer) is not None else None
    experts = mlp_weights(weights, layer, "expert")
    return Mixture(weights("router", layer), weights.get("router_bias", layer), experts, shared)


def route(moe: Moe, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Experts [N, top_k] and their weights [N, top_k] float32, from router logits [N, experts] float32.

    DeepSeek-V3: sigmoid scores, a bias for the choice only, groups ranked by their two best. V2: softmax scores,
    groups ranked by their best. Qwen3-MoE: softmax, no groups.
    """
    scores = logits.sigmoid() if moe.scoring == "sigmoid" else logits.softmax(dim=-1)
    choice = scores if bias is None else scores + bias
    if moe.groups > 1:
        choice = choice.masked_fill(~_allowed(moe, choice), -torch.inf)
    experts = choice.topk(moe.top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if moe.normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return experts, weights * moe.scale


def _allowed(moe: Moe, choice: Tensor) -> Tensor:
    """Mask [N, experts] of the experts in each row's best `top_groups` groups."""
    grouped = choice.view(-1, moe.groups, moe.experts // moe.groups)
    rank_by = grouped.topk(2, dim=-1).values.sum(-1) if moe.group_score == "top2_sum" else grouped.amax(-1)
    best = rank_by.topk(moe.top_groups, dim=-1).indices
    mask = torch.zeros_like(rank_by, dtype=torch.bool).scatter_(1, best, True)
    return mask.unsqueeze(-1).expand_as(grouped).reshape(choice.shape)


def mixture(weights: Weights, layer: int, moe: Moe, rank: Rank, x: Tensor) -> Tensor:
    """This rank's summand of an MoE layer: its rows of its experts, and of the shared experts. x is [N, hidden]."""
    assert rank.experts is not None
    return mix(moe, rank.experts, mixture_weights(weights, layer), x)


def mix(moe: Moe, experts: Range, weights: Mixture, x: Tensor) -> Tensor:
    """The summand of a rank that has `experts` of a mixture."""
    logits = F.linear(x.float(), weights.router.float())
    chosen, factors = route(moe, logits, weights.bias)
    pieces = zip(*(torch.split(t, ROUTED_ROWS) for t in (x, chosen, factors)), strict=True)
    out = torch.cat([_routed(weights.experts, experts, *piece) for piece in pieces])
    if weights.shared is not None:
        out = out + gated_mlp(x, weights.shared.gate, weights.shared.up, weights.shared.down)
    return out


def _routed(weights: GatedMlp, own_experts: Range, x: Tensor, experts: Tensor, factors: Tensor) -> Tensor:
    """Sum of this rank's experts' outputs [N, hidden], each times its factor; experts, factors [N, top_k].

    The pairs (row, expert) are sorted by expert and multiplied in groups; other ranks' pairs come last and are not
    computed. Nothing depends on the data but the groups' bounds, which stay on the device. The sum over a row's experts
    has a fixed order.
    """
    lo, hi = own_experts
    top_k = experts.shape[1]
    own = torch.where((experts >= lo) & (experts < hi), experts - lo, hi - lo).flatten()  # hi - lo: not here
    ordered, order = own.sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(hi - lo, device=x.device), right=True).to(torch.int32)
    gate, up, down = (part.transpose(1, 2) for part in (weights.gate, weights.up, weights.down))
    rows = x[order // top_k]
    hidden = F.silu(F.grouped_mm(rows, gate, offs=ends)) * F.grouped_mm(rows, up, offs=ends)
    y = F.grouped_mm(hidden, down, offs=ends)
    y = y.masked_fill((ordered == hi - lo).unsqueeze(1), 0.0)  # what was not computed may hold anything
    by_row = torch.empty_like(y).index_copy_(0, order, y).view(-1, top_k, y.shape[1])
    return (by_row.float() * factors.unsqueeze(2)).sum(1).to(x.dtype)
