"""FFN and projection problems with their float64 answers, for the CPU's and the GPU's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from helixc_runtime.ffn_shape import FfnShape
from helixc_runtime.manifest import Moe, Range
from helixc_runtime.ops import GatedMlp, Mixture

BOUND = 8e-3  # relative error of a row of the result: its own rounding to bfloat16, and that of the activations
MARGIN = 1e-4  # between the scores of what is chosen and what is not: float32 logits must not decide otherwise

V3_LITE = Moe((1,), 64, 6, 1408, 2816, "sigmoid", True, 1, 1, "top2_sum", True, 1.0)
V3 = Moe((1,), 256, 8, 2048, 2048, "sigmoid", True, 8, 4, "top2_sum", True, 2.5)
V2 = Moe((1,), 160, 6, 1536, 3072, "softmax", False, 8, 3, "max", False, 16.0)
QWEN3 = Moe((1,), 128, 8, 768, 0, "softmax", False, 1, 1, "max", True, 1.0)


def ffn(
    moe: Moe | None, hidden: int, columns: int = 0, shared: int = 0, dense: int = 0, *, experts: Range | None = None
) -> FfnShape:
    """A rank with these local widths, and all experts unless told otherwise."""
    own = (experts or (0, moe.experts)) if moe else None
    if moe:
        moe = replace(moe, shared_intermediate_size=shared)
    return FfnShape(hidden, "bfloat16", dense, moe, own, columns, shared)


@dataclass(frozen=True)
class FfnCase:
    """One call of Ops.mixture."""

    shape: FfnShape
    x: Tensor
    weights: Mixture


def random_mlp(hidden: int, columns: int, generator: torch.Generator, experts: int | None = None) -> GatedMlp:
    """Weights that keep the size of what they are multiplied with."""
    device = generator.device

    def normal(rows: int, across: int) -> Tensor:
        size = (rows, across) if experts is None else (experts, rows, across)
        return (torch.randn(*size, generator=generator, device=device) * across**-0.5).bfloat16()

    return GatedMlp(normal(columns, hidden), normal(columns, hidden), normal(hidden, columns))


def random_case(shape: FfnShape, rows: int, generator: torch.Generator) -> FfnCase:
    """Random rows, none of which has scores too near each other to say what is chosen."""
    moe, hidden, device = shape.moe, shape.hidden, generator.device
    assert moe is not None
    router = (torch.randn(moe.experts, hidden, generator=generator, device=device) * hidden**-0.5).bfloat16()
    bias = torch.rand(moe.experts, generator=generator, device=device) if moe.correction_bias else None
    experts = random_mlp(hidden, shape.expert_columns, generator, shape.local_experts)
    shared = random_mlp(hidden, shape.shared_columns, generator) if shape.shared_columns else None
    weights = Mixture(router, bias, experts, shared)
    candidates = torch.randn(256, hidden, generator=generator, device=device).bfloat16()
    clear = candidates[margins(moe, choices(moe, candidates, weights)) > MARGIN]
    assert len(clear) >= rows
    return FfnCase(shape, clear[:rows].contiguous(), weights)


def scores(moe: Moe, x: Tensor, weights: Mixture) -> Tensor:
    """Of all experts, [N, experts] float64."""
    logits = x.double() @ weights.router.double().T
    return logits.sigmoid() if moe.scoring == "sigmoid" else logits.softmax(-1)


def choices(moe: Moe, x: Tensor, weights: Mixture) -> Tensor:
    """What experts are chosen by, before groups are limited."""
    found = scores(moe, x, weights)
    return found if weights.bias is None else found + weights.bias.double()


def group_ranks(moe: Moe, choice: Tensor) -> Tensor:
    """[N, groups]."""
    best = choice.view(len(choice), moe.groups, -1).sort(-1, descending=True).values
    return best[..., :2].sum(-1) if moe.group_score == "top2_sum" else best[..., 0]


def limited(moe: Moe, choice: Tensor) -> Tensor:
    """`choice` with minus infinity in all but the best groups."""
    order = group_ranks(moe, choice).sort(dim=-1, descending=True, stable=True).indices[:, moe.top_groups :]
    grouped = choice.view(len(choice), moe.groups, -1).clone()
    grouped[torch.arange(len(choice), device=choice.device).unsqueeze(1), order] = -torch.inf
    return grouped.view(choice.shape)


def margins(moe: Moe, choice: Tensor) -> Tensor:
    """How near each row is to another choice."""

    def gap(values: Tensor, chosen: int) -> Tensor:
        best = values.sort(-1, descending=True).values
        return best[:, chosen - 1] - best[:, chosen] if chosen < values.shape[1] else best[:, 0] * 0 + 1

    return torch.minimum(gap(group_ranks(moe, choice), moe.top_groups), gap(limited(moe, choice), moe.top_k))


def want_mlp(x: Tensor, weights: GatedMlp) -> Tensor:
    """float64."""
    gate, up, down = (t.double() for t in (weights.gate, weights.up, weights.down))
    return (F.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T


def want_mixture(case: FfnCase) -> Tensor:
    """float64, by a loop over rows and experts; of equal scores the lower expert wins."""
    moe, (lo, hi) = case.shape.moe, case.shape.experts or (0, 0)
    assert moe is not None
    weighed, choice = scores(moe, case.x, case.weights), choices(moe, case.x, case.weights)
    chosen = limited(moe, choice).sort(dim=-1, descending=True, stable=True).indices[:, : moe.top_k]
    factors = weighed.gather(1, chosen)
    if moe.normalize:
        factors = factors / factors.sum(-1, keepdim=True)
    out = (
        want_mlp(case.x, case.weights.shared) if case.weights.shared else torch.zeros_like(case.x, dtype=torch.float64)
    )
    experts = case.weights.experts
    for row in range(len(case.x)):
        for expert, factor in zip(chosen[row].tolist(), (factors[row] * moe.scale).tolist(), strict=True):
            if lo <= expert < hi:
                own = GatedMlp(*(t[expert - lo] for t in (experts.gate, experts.up, experts.down)))
                out[row] += factor * want_mlp(case.x[row : row + 1], own)[0]
    return out


def check_rows(got: Tensor, want: Tensor, bound: float = BOUND) -> None:
    """Every row of `got` is `want` within `bound` of its norm; rows that must be zero are."""
    assert got.shape == want.shape
    error, size = ((t.double().flatten(1).norm(dim=1)) for t in (got.double() - want, want))
    assert bool((error <= bound * size).all()), f"relative errors {(error / size).tolist()}"


def check_mixture(run: Callable[[Tensor, Mixture], Tensor], case: FfnCase) -> None:
    """Against the oracle; again for the same bits; and with a NaN in another row, which changes no row but its own."""
    got, want = run(case.x, case.weights), want_mixture(case)
    check_rows(got, want)
    assert torch.equal(got, run(case.x, case.weights)), "two runs differ"
    if len(case.x) > 1:
        spoilt = case.x.clone()
        spoilt[-1, 0] = torch.nan
        check_rows(run(spoilt, case.weights)[:-1], want[:-1])


def check_mlp(run: Callable[[Tensor, GatedMlp], Tensor], x: Tensor, weights: GatedMlp) -> None:
    """As check_mixture."""
    got = run(x, weights)
    check_rows(got, want_mlp(x, weights))
    assert torch.equal(got, run(x, weights)), "two runs differ"


def check_linear(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> None:
    """As check_mixture."""
    equation = "ni,oi->no" if weight.dim() == 2 else "nhi,hoi->nho"
    got = run(x, weight)
    check_rows(got, torch.einsum(equation, x.double(), weight.double()))
    assert torch.equal(got, run(x, weight)), "two runs differ"
