"""Processes that die or hang in the middle of a handoff: the others end by themselves, in time, with a named error."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.tiny_checkpoint import make_checkpoint
from helixc.artifact import write
from helixc.launch.failures import Symptom, reported
from helixc.launch.host import free_port
from helixc.launch.launch_plan import Process
from helixc_runtime import handoff, page_writer
from helixc_runtime.job import Job
from helixc_runtime.peer_memory import PeerMemoryError
from tests.deployments import plan_of, role
from tests.dist.harness import _fork, _rank, request

PATIENCE_S, SLACK_S = 3.0, 25.0
CONTEXT, FIRST, SECOND = 0, 1, 2  # the ranks


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_it_writes() -> None:
    page_writer.TorchPageWriter.write = die  # type: ignore[method-assign,assignment]


def killed_before_it_tells() -> None:
    """The first generation rank."""
    tell = handoff._tell

    def first_dies(plan: object, rank: object, *rest: object) -> object:
        if rank.rank == FIRST:  # type: ignore[attr-defined]
            die()
        return tell(plan, rank, *rest)  # type: ignore[arg-type]

    handoff._tell = first_dies  # type: ignore[assignment]


def hangs_while_it_writes() -> None:
    page_writer.TorchPageWriter.wait = lambda self, patience: time.sleep(600)  # type: ignore[method-assign]


def cannot_write() -> None:
    def refuse(handle: str, size: int) -> None:
        raise PeerMemoryError("mapping the KV pages: refused")

    page_writer.map_arena = refuse  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("sabotage", "end", "said"),
    [
        (killed_while_it_writes, (FIRST, SECOND), "HandoffLost: the KV of request 0, from rank 0 to rank {}: peer lost"),
        (killed_before_it_tells, (CONTEXT,), "HandoffLost: the KV of request 0, from rank 0 to rank 1: peer lost"),
        (hangs_while_it_writes, (FIRST, SECOND), "from rank 0 to rank {}: peer lost, or silent for 3 s"),
        (cannot_write, (CONTEXT, FIRST, SECOND), "PeerMemoryError: mapping the KV pages: refused"),
    ],
)
def test_the_others_end_by_themselves(
    sabotage: Callable[[], None], end: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "checkpoint", seed=random.randrange(1000), layers=2)
    plan = plan_of(str(checkpoint), role(), role(cp=2))
    assert plan.instances[0].handoff == "peer"
    write(tmp_path / "artifact", plan, "", {}, nvrtc=None)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    requests = (request(0, range(20), 4), request(1, range(9), 4))
    job = Job(str(tmp_path / "artifact"), None, "cpu", requests, False, PATIENCE_S, 1)
    port = free_port()
    given = [(job, rank.rank, len(plan.ranks), run_dir, port, sabotage) for rank in plan.ranks]
    ranks = [_fork.Process(target=_rank, args=arguments, daemon=True) for arguments in given]
    for process in ranks:
        process.start()
    try:
        until = time.monotonic() + PATIENCE_S + SLACK_S
        for rank in end:
            ranks[rank].join(max(0.0, until - time.monotonic()))
            assert ranks[rank].exitcode == 1, f"rank {rank} has not ended by itself"
    finally:
        for process in ranks:
            process.kill()
            process.join()
    for rank in end:
        text = (run_dir / f"{rank}.failed").read_text()
        assert said.format(rank) in text, text


def test_a_lost_peer_is_not_the_first_cause(tmp_path: Path) -> None:
    """Who was killed is; and who cannot write is a cause of its own."""
    process = Process("rank 1", "rank 1", (), {}, str(tmp_path / "log"))
    lost = reported(process, "HandoffLost: the KV of request 0, from rank 0 to rank 1: peer lost: x", 0.0)
    assert lost.symptom == Symptom.LOST_PEER
    refused = reported(process, "HandoffError: the KV of request 0, from rank 0 to rank 1: PeerMemoryError: no", 0.0)
    assert refused.symptom == Symptom.FAILED
