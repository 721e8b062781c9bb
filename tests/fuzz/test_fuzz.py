"""A short campaign with a fresh seed; `make fuzz` is the long one."""

from __future__ import annotations

import random

from tests.fuzz.campaign import run

FILES = 400


def test_mutated_files_end_in_findings_or_a_plan() -> None:
    seed = random.SystemRandom().randrange(2**32)
    outcome = run(FILES, seed)
    for name, raw, problem in outcome.failures:
        print(f"--- {name} (seed {seed})\n{raw!r}\n{problem}")
    assert not outcome.failures, f"seed {seed}: python -m tests.fuzz --files {FILES} --seed {seed}"
    assert outcome.files == FILES
    assert len(outcome.codes) > 20, "the mutations do not reach the checks"
    assert outcome.plans > 0
