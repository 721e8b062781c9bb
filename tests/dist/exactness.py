"""A deployment against transformers: the logits of every generated token, from the same checkpoint."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from helixc_runtime.comm import TorchComm
from helixc_runtime.engine import load_decoder
from helixc_runtime.events import Emitter
from helixc_runtime.job import Request
from helixc_runtime.manifest import Moe, Plan
from helixc_runtime.models import layers
from helixc_runtime.sampling import could_sample
from tests.dist.harness import Outcome, deploy

LOGIT_TOLERANCE = 1e-4  # largest absolute difference in float32; logits are a few units large
ROUTING_TIE = 1e-5  # of two experts' scores: rounding decides, and the logits of either choice are right
DRAWS = 4

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


class RoutingTie(Exception):
    """Two experts' scores are so near that a comparison says nothing; another draw will do."""


def drawn(run: Callable[[Path], Comparison], folder: Path) -> Comparison:
    """`run` in a folder of its own, again with other random numbers where experts tied."""
    for attempt in range(DRAWS):
        try:
            (folder / str(attempt)).mkdir()
            return run(folder / str(attempt))
        except RoutingTie:
            continue
    raise AssertionError(f"{DRAWS} draws in a row had ties between experts: that is no chance")


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
    if largest > LOGIT_TOLERANCE and plan.model.arch.moe and not sabotage:
        gap = min(routing_gap(plan, [*request.token_ids, *outcome.tokens[request.index]]) for request in requests)
        if gap < ROUTING_TIE:
            raise RoutingTie(f"{gap=}")
    return Comparison(largest, same, outcome)


def routing_gap(plan: Plan, tokens: Sequence[int]) -> float:
    """The least difference, over all tokens and layers, between a score that was chosen and one that was not."""
    least, right = math.inf, layers.route

    def measuring(moe: Moe, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        nonlocal least
        scores = logits.sigmoid() if moe.scoring == "sigmoid" else logits.softmax(dim=-1)
        choice = scores if bias is None else scores + bias
        if moe.groups > 1:
            grouped = choice.view(len(choice), moe.groups, -1)
            by_group = grouped.topk(2).values.sum(-1) if moe.group_score == "top2_sum" else grouped.amax(-1)
            least = min(least, _gap(by_group, moe.top_groups))
            choice = choice.masked_fill(~layers._allowed(moe, choice), -torch.inf)
        least = min(least, _gap(choice, moe.top_k))
        return right(moe, logits, bias)

    with Path(os.devnull).open("w") as silent:
        comm, device = TorchComm(plan.reference, {}), torch.device("cpu")
        decoder = load_decoder(plan, plan.reference, comm, device, Emitter(silent.fileno()))
    layers.route = measuring
    try:
        with torch.inference_mode():
            decoder.prefill(torch.tensor(tokens), decoder.rotary(), attends=True)
    finally:
        layers.route = right
    return least


def _gap(scores: Tensor, chosen: int) -> float:
    """Between the `chosen` largest of each row and the rest; infinite where there is no rest."""
    ordered = scores.sort(dim=-1, descending=True).values
    if chosen >= ordered.shape[-1]:
        return math.inf
    return float((ordered[:, chosen - 1] - ordered[:, chosen]).min())
def transformers_logits(checkpoint: Path, requests: Sequence[Request], outcome: Outcome) -> Iterator[Tensor]:
    """Logits [tokens, vocab] of every request's generated tokens, in float32."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for request in requests:
        tokens = torch.tensor([[*request.token_ids, *outcome.tokens[request.index][:-1]]])
        with torch.inference_mode():
            yield model(tokens).logits[0, len(request.token_ids) - 1 :]
