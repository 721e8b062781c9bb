"""A deployment against transformers: the logits of every generated token, from the same checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from helixc_runtime.job import Request
from helixc_runtime.manifest import Plan
from helixc_runtime.sampling import could_sample
from tests.dist.harness import Outcome, deploy

LOGIT_TOLERANCE = 1e-4  # largest absolute difference in float32; logits are a few units large

transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Comparison:
    """Largest absolute logit difference over all requests, and whether every token is the reference's choice.

    Two logits of the reference nearer than that difference are a tie: either token is its choice.
    """

    difference: float
    same_tokens: bool
    outcome: Outcome

    @property
    def exact(self) -> bool:
        return self.difference <= LOGIT_TOLERANCE and self.same_tokens


def random_prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Byte tokens."""
    source = random.Random(seed)
    return [[source.randrange(256) for _ in range(length)] for length in lengths]


def compare(
    checkpoint: Path,
    plan: Plan,
    requests: Sequence[Request],
    directory: Path,
    sabotage: Callable[[], None] | None = None,
) -> Comparison:
    """Run `plan` and hold every logit against one transformers pass over prompt and generated tokens."""
    outcome = deploy(plan, requests, directory, sabotage=sabotage)
    largest, same = 0.0, True
    for request, reference in zip(requests, transformers_logits(checkpoint, requests, outcome), strict=True):
        assert outcome.logits[request.index].shape == reference.shape
        difference = (outcome.logits[request.index] - reference).abs().max()
        largest = torch.stack([torch.tensor(largest), difference]).max().item()  # a NaN stays
        for step, (token, exact) in enumerate(zip(outcome.tokens[request.index], reference, strict=True)):
            position = len(request.token_ids) + step
            same = same and could_sample(exact, request, position, token, min(difference.item(), LOGIT_TOLERANCE))
    return Comparison(largest, same, outcome)


def transformers_logits(checkpoint: Path, requests: Sequence[Request], outcome: Outcome) -> Iterator[Tensor]:
    """Logits [tokens, vocab] of every request's generated tokens, in float32."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for request in requests:
        tokens = torch.tensor([[*request.token_ids, *outcome.tokens[request.index][:-1]]])
        with torch.inference_mode():
            yield model(tokens).logits[0, len(request.token_ids) - 1 :]
