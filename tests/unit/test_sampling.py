"""Sampling: its distribution, its limits, and that rounding does not change what is drawn."""

from __future__ import annotations

import random

import pytest
import torch

from helixc_runtime.sampling import could_sample, finish_reason, sample
from tests.dist.harness import request


def test_greedy_takes_the_largest() -> None:
    logits = torch.randn(500)
    assert sample(logits, request(0, [1]), 7) == int(logits.argmax())


def test_the_same_seed_and_position_draw_the_same_token() -> None:
    logits = torch.randn(500)
    drawn = [sample(logits, request(0, [1], temperature=1.0, seed=3), position) for position in range(50)]
    assert drawn == [sample(logits, request(9, [2, 3], temperature=1.0, seed=3), position) for position in range(50)]
    assert drawn != [sample(logits, request(0, [1], temperature=1.0, seed=4), position) for position in range(50)]
    assert len(set(drawn)) > 25


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_probabilities(temperature: float) -> None:
    """4,000 draws of 8 tokens: every frequency within five standard deviations."""
    logits, seed, draws = torch.randn(8), random.randrange(2**31), 4000
    item = request(0, [1], temperature=temperature, seed=seed)
    counts = torch.bincount(torch.tensor([sample(logits, item, i) for i in range(draws)]), minlength=8) / draws
    expected = (logits.double() / temperature).softmax(-1)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts - expected).abs() <= 5 * deviation).all(), f"{seed=} {counts} {expected}"


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.log(torch.tensor([0.05, 0.5, 0.15, 0.3]))
    for top_p, allowed in ((0.4, {1}), (0.5, {1}), (0.6, {1, 3}), (0.81, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        item = request(0, [1], temperature=1.0, top_p=top_p)
        assert {sample(logits, item, position) for position in range(300)} == allowed, top_p


def test_rounding_does_not_change_the_draw() -> None:
    """A flat distribution over many tokens: neighbours in probability swap places under rounding all the time."""
    logits, seed = torch.randn(4096) * 0.3, random.randrange(2**31)
    item = request(0, [1], temperature=0.7, top_p=0.9, seed=seed)
    rounded = [logits + 1e-5 * torch.randn(4096) for _ in range(400)]
    assert any(not torch.equal(other.argsort(), logits.argsort()) for other in rounded)
    changed = sum(sample(logits, item, i) != sample(other, item, i) for i, other in enumerate(rounded))
    assert changed <= 2, f"{changed} of 400 draws changed, {seed=}"


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 0.9), (1.3, 1.0), (0.5, 0.05)])
def test_rounding_leaves_a_token_that_could_be_sampled(temperature: float, top_p: float) -> None:
    """Logits moved by at most a margin draw a token that the margin allows; no margin allows what is drawn alone."""
    seed = random.randrange(2**31)
    torch.manual_seed(seed)
    margin, changed = 0.2, 0
    item = request(0, [1], temperature=temperature, top_p=top_p, seed=seed)
    for position in range(200):
        logits = torch.randn(400) * 0.5
        own = sample(logits, item, position)
        other = sample(logits + margin * (2 * torch.rand(400) - 1), item, position)
        changed += own != other
        assert could_sample(logits, item, position, other, margin), f"{seed=} {position=}"
        assert could_sample(logits, item, position, own, 0.0), f"{seed=} {position=}"
        assert other == own or not could_sample(logits, item, position, other, 0.0), f"{seed=} {position=}"
        allowed = sum(could_sample(logits, item, position, token, margin) for token in range(0, 400, 40))
        assert allowed <= 6, f"{seed=} {position=}: {allowed} of 10 tokens"
    assert changed, f"{seed=}: the margin never mattered"


def test_when_a_request_is_finished() -> None:
    stops, item = (2, 5), request(0, [1], 3, ignore_eos=False)
    assert finish_reason(item, [7], stops) is None
    assert finish_reason(item, [7, 5], stops) == "stop"
    assert finish_reason(item, [7, 8, 9], stops) == "length"
    assert finish_reason(request(0, [1], 3), [7, 5], stops) is None
