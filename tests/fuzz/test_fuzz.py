"""A short campaign with a fresh seed; `make fuzz` is the long one."""

from __future__ import annotations

import random

from helixc.frontend import analyse_input
from helixc.inputs import Input
from helixc.spec.vllm import from_vllm
from helixc.spec.vllm_flags import VllmError
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


def test_mutated_flags_end_in_an_error_or_a_readable_file() -> None:
    """What is written for any flags is a mapping that the front end reads: the words cannot break out of the YAML."""
    rng = random.Random(seed := random.SystemRandom().randrange(2**32))
    words = (*_FLAGS, *_VALUES)
    written = 0
    for _ in range(FILES):
        parts = [rng.choice(words) for _ in range(rng.randrange(8))]
        command = rng.choice((" ", "=", "\n")).join(parts)
        try:
            text = from_vllm(command, "llama-3.1-8b")
        except VllmError as error:
            assert str(error), f"seed {seed}: {command!r}"
            continue
        written += 1
        analysis = analyse_input(Input("deployment.yaml", text))
        assert analysis.source is not None and "model" in analysis.source.data, f"seed {seed}: {command!r}\n{text}"
        codes = {finding.code for finding in analysis.diagnostics}
        assert not codes & {"HX003", "HX101", "HX110"}, f"seed {seed}: {command!r}\n{text}"
    assert written > 0


_FLAGS = (
    *("-tp", "-dcp", "-dp", "-pp", "-ep", "-q", "--tensor-parallel-size", "--model", "--block-size", "--dtype"),
    *("--max-model-len", "--kv-cache-dtype", "--gpu-memory-utilization", "--enforce-eager", "--port", "--load_format"),
)
_VALUES = (
    *("1", "2", "8", "8", "0", "-1", "1.5k", "9" * 20, "fp8", "auto", "0.9", "a: b", "'x # y'", '"{"', "é", "- x", ""),
    *("'a\nb: c'", "'\u2028model: 3'", "'\x85- y'", "--seed"),
)
