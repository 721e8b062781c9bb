"""Choosing the next token: greedy, or temperature and top-p with a seed. On any device, and without waiting for it.

The choice depends only on the logits, the request's seed and the position, so that any process can repeat it. Every
token gets a random number of its own (an exponential race, equal in distribution to drawing from the probabilities):
rounding that swaps two tokens of nearly equal probability does not change which one is drawn. The random numbers are
a hash of seed, position and token, hence the same on a CPU and a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from helixc_runtime.job import Request


@dataclass(frozen=True, slots=True)
class Choices:
    """How each of N rows is to be sampled."""

    temperature: Tensor  # [N] float64, 0: greedy
    top_p: Tensor  # [N] float64
    seed: Tensor  # [N] int64
    position: Tensor  # [N] int64, global position of the token to be chosen


def sample_rows(logits: Tensor, choices: Choices) -> Tensor:
    """Next tokens [N] int64 from `logits` [N, vocab] float32."""
    probabilities, scores = _race(logits, choices)
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = ordered.cumsum(-1) - ordered < choices.top_p.unsqueeze(1)  # the smallest set that reaches top_p
    fastest = scores.gather(1, tokens).masked_fill(~kept, -math.inf).argmax(-1, keepdim=True)
    drawn = tokens.gather(1, fastest).squeeze(1)
    return torch.where(choices.temperature == 0, logits.argmax(-1), drawn)


def sample(logits: Tensor, request: Request, position: int) -> int:
    """Next token from `logits` [vocab] float32, for the token at global `position`."""
    if request.temperature == 0:
        return int(logits.argmax())
    return int(sample_rows(logits.unsqueeze(0), _choice(request, position, logits.device)))


def could_sample(logits: Tensor, request: Request, position: int, token: int, margin: float) -> bool:
    """Whether `token` is what `sample` may return once each logit has moved by at most `margin`.

    Two logits closer than rounding are a tie, and either token is right.
    """
    if request.temperature == 0:
        return bool(logits[token] >= logits.max() - 2 * margin)
    probabilities, scores = (x[0] for x in _race(logits.unsqueeze(0), _choice(request, position, logits.device)))
    slack = 2 * margin / request.temperature  # of the logarithm of a quotient of two probabilities
    ahead = probabilities[probabilities > probabilities[token] * math.exp(slack)].sum()
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    reach = torch.searchsorted(-ordered, -ordered * math.exp(-slack), right=True) - 1  # the last that may come before
    surely_kept = tokens[(ordered.cumsum(0)[reach] - ordered) * math.exp(slack) < request.top_p]
    behind = float(scores[surely_kept].max() - scores[token]) if len(surely_kept) else -math.inf
    return float(ahead) * math.exp(-slack) < request.top_p and behind <= slack


def finish_reason(request: Request, generated: list[int], eos: tuple[int, ...]) -> str | None:
    """ "stop" after a stop token (unless ignored), "length" after max_tokens tokens, None to go on."""
    if generated and generated[-1] in eos and not request.ignore_eos:
        return "stop"
    return "length" if len(generated) >= request.max_tokens else None


def seed_of(request: Request) -> int:
    """The request's seed as a number that int64 holds."""
    return request.seed & (2**63 - 1)


def _choice(request: Request, position: int, device: torch.device) -> Choices:
    def of(value: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([value], dtype=dtype, device=device)

    temperature, top_p = of(request.temperature, torch.float64), of(request.top_p, torch.float64)
    return Choices(temperature, top_p, of(seed_of(request), torch.int64), of(position, torch.int64))


def _race(logits: Tensor, choices: Choices) -> tuple[Tensor, Tensor]:
    """Probabilities [N, vocab] float64, and the logarithm of each over its random waiting time: the largest wins."""
    temperature = torch.where(choices.temperature == 0, 1.0, choices.temperature)
    scaled = logits.double() / temperature.unsqueeze(1)
    key = _mixed(_mixed(choices.seed) + choices.position).unsqueeze(1)
    tokens = torch.arange(logits.shape[1], device=logits.device)
    bits = _shifted(_mixed(key + tokens * _GOLDEN), 11)
    waits = -torch.log((bits.double() + 0.5) * 2.0**-53)
    return torch.softmax(scaled, dim=-1), torch.log_softmax(scaled, dim=-1) - waits.log()


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed number, like the factors below


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) of int64 x."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits as if x were unsigned."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted
