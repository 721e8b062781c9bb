"""Faults of a whole launch with `--device cuda` while it decodes in captured steps: kernels wait for each other."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.deployments import role
from tests.gpu.launches import compiled
from tests.launch_faults import Decoding, check_a_delay, check_a_fault

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

MANY = 100_000
SOME = 20_000 if torch.cuda.device_count() > 1 else 300  # tokens, in seconds; those of a shared GPU are slow


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ctx tp1 / gen tp1 cp2`; rank 0 is the context's."""
    generation = role(cp=2, block=32, batch=1)
    folder = tmp_path_factory.mktemp("faults") / "artifact"
    return compiled(folder, "llama-3.1-8b", 2, "bfloat16", role(), generation, max_seq_len=MANY + 10)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGKILL, 2), (signal.SIGSTOP, 1)])
def test_a_fault(number: signal.Signals, rank: int, artifact: Path, tmp_path: Path) -> None:
    with Decoding(artifact, "cuda", tmp_path, MANY, 6.0) as decoding:
        check_a_fault(decoding, number, rank)


def test_a_delay(artifact: Path, tmp_path: Path) -> None:
    with Decoding(artifact, "cuda", tmp_path, SOME, 20.0) as decoding:
        check_a_delay(decoding, 2, 3.0, SOME)
