"""The one-sided exchange and reduction between two processes, on two GPUs where there are two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.pair import pair_plan, run_pair, values
from helixc_runtime.manifest import Plan
from tests.gpu.exchange_bodies import eager_equals_captured, random_steps, with_a_fault

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ROWS, PATIENCE_S = 64, 1.5


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    folder = tmp_path_factory.mktemp("artifact")
    return pair_plan("deepseek-v3", folder, "sm_90a", ROWS), folder


def test_random_steps(compiled: tuple[Plan, Path], seed: int) -> None:
    """Exchanges of flipping sizes through graph replays, with delays, against float64."""
    steps = 700 if torch.cuda.device_count() > 1 else 50  # which wait for each other by time slices
    errors = values(run_pair(random_steps, *compiled, [1, 5, 16, ROWS], steps, seed=seed))
    print(errors)
    assert max(errors) <= 5e-3


def test_a_replay_computes_what_launches_compute(compiled: tuple[Plan, Path], seed: int) -> None:
    assert max(values(run_pair(eager_equals_captured, *compiled, seed=seed))) == 0.0


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP", "4.0"])
def test_a_peer_that_stops_is_named(fault: str, compiled: tuple[Plan, Path], seed: int) -> None:
    survivor, _ = run_pair(with_a_fault, *compiled, fault, seed=seed, patience=PATIENCE_S, deadline=60)
    assert survivor.how == "done", survivor.value
    message, seconds = survivor.value
    assert message == "rank 0 waited 1.5 s for rank 1 in vain: layer 0 partials, decode step 6"
    assert PATIENCE_S <= seconds <= PATIENCE_S + 2
