"""An FP8 KV cache over several ranks against the same cache on one rank, and against transformers without one.

Rounding to e4m3 is a step function: where two layouts compute the same K or V in another order, 1e-7 apart, hardly an
element falls on another step, and one that does is off by at most 1/8 of itself. So most requests agree as closely as
without FP8, and no logit is further off than a handful of single steps can push it. Measured on 270 requests of dense
models with random weights: 0.007 at most, and an unquantised prompt, the mildest of the bugs, 0.16 at least.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.tiny_checkpoint import make_checkpoint
from helixc.launch.record import Verdict
from helixc.launch.report import verified
from helixc.plan.verify import verify
from helixc.spec.spec import RoleSpec
from helixc_runtime import handoff, kv, quantize, reference
from helixc_runtime.events import Emitter, parse
from helixc_runtime.job import Generated, Job, Request, write_generated
from helixc_runtime.manifest import Plan
from helixc_runtime.ops_torch import TorchOps
from tests.deployments import plan_of, role
from tests.dist.exactness import LOGIT_TOLERANCE, random_prompts, transformers_logits
from tests.dist.harness import Outcome, deploy, request

STEPS = 0.03  # of a logit: what elements that fall on another e4m3 step may come to
ROUNDING = 0.15  # root mean square, all elements rounded; at most 0.07 measured, where logits have 1.0
BLOCK = 4
# No experts, because the routing of random ones takes a small difference for another choice.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 160},
    "deepseek-v3-lite": {"kv_lora_rank": 160, "first_k_dense_replace": 2},
}


@dataclass(frozen=True)
class Sound:
    """A checkpoint, and what one context and one generation rank with an FP8 cache make of the requests."""

    checkpoint: Path
    requests: list[Request]
    alone: Outcome
    seed: int

    def plan(self, context: RoleSpec, generation: RoleSpec, kv_dtype: Any = "fp8") -> Plan:
        sides = (replace(side, kv_dtype=kv_dtype, tokens_per_block=BLOCK) for side in (context, generation))
        plan = plan_of(str(self.checkpoint), *sides)
        verify(plan)
        return plan

    def differences(self, outcome: Outcome) -> list[float]:
        """Largest logit difference to `alone`, by request, as long as the tokens are the same."""
        found = []
        for item in self.requests:
            one, other = (o.tokens[item.index] for o in (self.alone, outcome))
            same = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one) - 1)
            logits = (o.logits[item.index][: same + 1] for o in (self.alone, outcome))
            first, second = logits
            found.append(float((first - second).abs().max()))
        return found


@pytest.fixture(scope="module", params=FAMILIES)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sound]:
    yield made(request.param, tmp_path_factory.mktemp(request.param))


def made(family: str, directory: Path) -> Sound:
    seed = random.randrange(2**31)
    checkpoint = make_checkpoint(family, directory / "checkpoint", seed=seed, layers=2, **FAMILIES[family])
    requests = [request(i, p, 12) for i, p in enumerate(random_prompts([1, 7, 40, 90, 23], seed))]
    found = Sound(checkpoint, requests, Outcome(), seed)
    return replace(found, alone=deploy(found.plan(role(), role()), requests, directory))


LAYOUTS: dict[str, tuple[RoleSpec, RoleSpec]] = {
    "cp3": (role(), role(cp=3)),
    "re-split": (role(tp=2), role(tp=2, cp=2, pp=2)),
    "dp": (role(tp=2, dp=True), role(tp=2, cp=2, dp=True)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same_cache(layout: str, sound: Sound, tmp_path: Path) -> None:
    plan = sound.plan(*LAYOUTS[layout])
    outcome = deploy(plan, sound.requests, tmp_path)
    differences = sound.differences(outcome)
    assert max(differences) <= STEPS, f"{differences=} {sound.seed=}"
    assert statistics.median(differences) <= LOGIT_TOLERANCE * 10, f"{differences=} {sound.seed=}"
    copies = 2 if layout == "re-split" and plan.model.arch.mla else 1  # the latent is on each tp rank
    assert outcome.handoff_bytes == copies * sound.alone.handoff_bytes


def test_the_cache_rounds_and_no_more(sound: Sound) -> None:
    """Against float32 without a cache: near, and yet not equal, so that the cache cannot have been left out."""
    exact = transformers_logits(sound.checkpoint, sound.requests, sound.alone)
    for item, logits in zip(sound.requests, exact, strict=True):
        off = (sound.alone.logits[item.index] - logits).square().mean().sqrt()
        assert 1e-3 < off <= ROUNDING, f"{item.index=} {off=} {sound.seed=}"


# --- Bugs, planted ----------------------------------------------------------------------------------------------


def with_scales(change: Callable[[Tensor], Tensor]) -> None:
    """The receiver writes other scales than were sent."""
    right = quantize.unpack

    def unpack(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
        elements, scales = right(packed, width)
        return elements, change(scales)

    kv.unpack = unpack  # type: ignore[attr-defined]


def scales_of_another_block() -> None:
    with_scales(lambda scales: scales.roll(BLOCK, dims=-2))


def scales_off_by_one() -> None:
    with_scales(lambda scales: scales + 1)


def scales_ignored() -> None:
    with_scales(lambda scales: torch.full_like(scales, quantize.EXPONENT_BIAS))


def unquantised_prompt() -> None:
    """With a float32 cache: what is appended is rounded as it should be, the prompt is not."""
    right = TorchOps.append

    def append(self: TorchOps, *given: Any) -> Tensor:
        q = right(self, *given)
        cache, batch = given[-2:]
        for pool in (cache.k, cache.v):
            for slot in batch.slots[batch.owned.bool()].tolist() if pool is not None else ():
                token = pool[slot // BLOCK, ..., slot % BLOCK, :]
                token.copy_(quantize.rounded(token, "float8_e4m3fn"))
        return q

    TorchOps.append = append  # type: ignore[method-assign]


BUGS = (scales_of_another_block, scales_off_by_one, scales_ignored, unquantised_prompt)


@pytest.mark.parametrize("sabotage", BUGS, ids=lambda f: f.__name__)
def test_a_bug_is_far_above_the_steps(sabotage: Callable[[], None], sound: Sound, tmp_path: Path) -> None:
    plan = sound.plan(role(), role(cp=3), kv_dtype="float32" if sabotage is unquantised_prompt else "fp8")
    differences = sound.differences(deploy(plan, sound.requests, tmp_path, sabotage))
    assert not max(differences) < 2 * STEPS, f"{differences=} {sound.seed=}"


# --- --verify ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sabotage", [None, scales_off_by_one, scales_ignored])
def test_verify_measures_the_cache_s_rounding(
    sabotage: Callable[[], None] | None, sound: Sound, tmp_path: Path
) -> None:
    plan = sound.plan(role(tp=2), role(cp=3))
    verdict = verdict_on(plan, sound.requests, deploy(plan, sound.requests, tmp_path, sabotage), tmp_path)
    assert verified(verdict, plan) == (sabotage is None), f"{verdict=} {sound.seed=}"
    assert 0.1 < verdict.tolerance < 3.0, "three times what rounding of the cache does, below what logits are"


def verdict_on(plan: Plan, requests: list[Request], outcome: Outcome, directory: Path) -> Verdict:
    """What --verify says of a deployment that ran in `directory`."""
    run_dir = directory / "run"
    write_generated(tuple(Generated(i, tuple(tokens)) for i, tokens in sorted(outcome.tokens.items())), run_dir)
    job = Job(str(directory / "artifact"), None, "cpu", tuple(requests), keep_logits=True, deadline_s=60, threads=1)
    with (run_dir / "verify.events").open("wb") as events:
        reference.verify(job, run_dir, Emitter(events.fileno(), 0))
    *_, last = (run_dir / "verify.events").read_bytes().splitlines()
    event = parse(last)
    assert event is not None and event.name == "verify"
    return Verdict(**event.fields)
