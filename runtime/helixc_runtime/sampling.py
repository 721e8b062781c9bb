"""Choosing the next token: greedy, or temperature and top-p with a seed.

The choice depends only on the logits, the request's seed and the position, so that any process can repeat it. Every
token gets a random number of its own (an exponential race, equal in distribution to drawing from the probabilities):
rounding that swaps two tokens of nearly equal probability does not change which one is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helixc_runtime.job import Request


def sample(logits: Tensor, request: Request, position: int) -> int:
    """Next token from `logits` [vocab] float32, for the token at global `position`."""
    if request.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double().cpu() / request.temperature, dim=-1)
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    kept = tokens[ordered.cumsum(0) - ordered < request.top_p]  # the smallest set that reaches top_p
    generator = torch.Generator().manual_seed((request.seed * 0x9E3779B97F4A7C15 + position) & (2**63 - 1))
    waits = torch.empty_like(probabilities).exponential_(generator=generator)
    return int(kept[(probabilities[kept] / waits[kept]).argmax()])


def finish_reason(request: Request, generated: list[int], eos: tuple[int, ...]) -> str | None:
    """ "stop" after a stop token (unless ignored), "length" after max_tokens tokens, None to go on."""
    if generated and generated[-1] in eos and not request.ignore_eos:
        return "stop"
    return "length" if len(generated) >= request.max_tokens else None
