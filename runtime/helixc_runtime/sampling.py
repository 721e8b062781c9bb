"""Choosing the next token: greedy, or temperature and top-p with a seed.

The choice depends only on the logits, the request's seed and the position, so that any process can repeat it. Every
token gets a random number of its own (an exponential race, equal in distribution to drawing from the probabilities):
rounding that swaps two tokens of nearly equal probability does not change which one is drawn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helixc_runtime.job import Request


def sample(logits: Tensor, request: Request, position: int) -> int:
    """Next token from `logits` [vocab] float32, for the token at global `position`."""
    if request.temperature == 0:
        return int(logits.argmax())
    probabilities, scores = _race(logits, request, position)
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    kept = tokens[ordered.cumsum(0) - ordered < request.top_p]  # the smallest set that reaches top_p
    return int(kept[scores[kept].argmax()])


def could_sample(logits: Tensor, request: Request, position: int, token: int, margin: float) -> bool:
    """Whether `token` is what `sample` may return once each logit has moved by at most `margin`.

    Two logits closer than rounding are a tie, and either token is right.
    """
    if request.temperature == 0:
        return bool(logits[token] >= logits.max() - 2 * margin)
    probabilities, scores = _race(logits, request, position)
    slack = 2 * margin / request.temperature  # of the logarithm of a quotient of two probabilities
    ahead = probabilities[probabilities > probabilities[token] * math.exp(slack)].sum()
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    reach = torch.searchsorted(-ordered, -ordered * math.exp(-slack), right=True) - 1  # the last that may come before
    surely_kept = tokens[(ordered.cumsum(0)[reach] - ordered) * math.exp(slack) < request.top_p]
    behind = float(scores[surely_kept].max() - scores[token]) if len(surely_kept) else -math.inf
    return float(ahead) * math.exp(-slack) < request.top_p and behind <= slack


def _race(logits: Tensor, request: Request, position: int) -> tuple[Tensor, Tensor]:
    """Probabilities [vocab] float64, and the logarithm of each over its random waiting time: the largest wins."""
    scaled = logits.double().cpu() / request.temperature
    generator = torch.Generator().manual_seed((request.seed * 0x9E3779B97F4A7C15 + position) & (2**63 - 1))
    waits = torch.empty_like(scaled).exponential_(generator=generator)
    return torch.softmax(scaled, dim=-1), torch.log_softmax(scaled, dim=-1) - waits.log()


def finish_reason(request: Request, generated: list[int], eos: tuple[int, ...]) -> str | None:
    """ "stop" after a stop token (unless ignored), "length" after max_tokens tokens, None to go on."""
    if generated and generated[-1] in eos and not request.ignore_eos:
        return "stop"
    return "length" if len(generated) >= request.max_tokens else None
