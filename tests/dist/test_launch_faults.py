"""Faults of a whole launch over gloo while it decodes."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from helixc.artifact import write
from helixc.model import read_model
from helixc.plan.lower import lower
from helixc.plan.place import place
from tests.deployments import role, spec
from tests.launch_faults import Decoding, check_a_delay, check_a_fault

MAX_TOKENS = 100_000


@pytest.fixture
def launched(tmp_path: Path) -> partial[Decoding]:
    """`ctx tp1 / gen tp1 cp2` of a tiny Llama; rank 0 is the context's."""
    arch = replace(
        read_model("tinyllama-1.1b"), num_layers=2, hidden_size=64, intermediate_size=96, vocab_size=100, num_heads=4
    )
    long = MAX_TOKENS + 10
    deployment = spec("tiny", role(max_seq_len=long), role(cp=2, batch=1, max_seq_len=long), load_format="dummy")
    write(tmp_path / "artifact", place(lower(deployment, arch), lambda *_: ()), "", {}, nvrtc=None)
    return partial(Decoding, tmp_path / "artifact", "cpu", tmp_path / "launch")


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGKILL, 2), (signal.SIGSTOP, 1)])
def test_a_fault(number: signal.Signals, rank: int, launched: partial[Decoding]) -> None:
    with launched(MAX_TOKENS, 6.0) as decoding:
        check_a_fault(decoding, number, rank)


def test_a_delay(launched: partial[Decoding]) -> None:
    with launched(300, 20.0) as decoding:
        check_a_delay(decoding, 2, 3.0, 300)
