"""Run every rank of a plan as a process over gloo and collect what the launcher would see."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from helixc.artifact import write
from helixc.launch.host import free_port
from helixc_runtime.job import Job, Request
from helixc_runtime.manifest import Plan

# A server process that has imported torch but never run it forks each rank in milliseconds.
_fork = multiprocessing.get_context("forkserver")
_Rank = multiprocessing.context.ForkServerProcess
_fork.set_forkserver_preload(["helixc_runtime.engine", "helixc_runtime.reference"])


@dataclass
class Outcome:
    """What a launch showed: tokens and finish reasons by request, and logits where they were kept."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[int, str] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)
    kv_tokens: dict[int, int] = field(default_factory=dict)
    handoff_bytes: int = 0


def request(index: int, token_ids: Sequence[int], max_tokens: int = 64, **options: float) -> Request:
    """A greedy request that ignores stop tokens unless told otherwise."""
    values = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "ignore_eos": True} | options
    return Request(index=index, token_ids=tuple(token_ids), max_tokens=max_tokens, **values)  # type: ignore[arg-type]


def deploy(
    plan: Plan, requests: Sequence[Request], directory: Path, sabotage: Callable[[], None] | None = None
) -> Outcome:
    """Run the whole deployment. Raises RuntimeError with the traceback of the first rank that failed.

    `sabotage` is called in every rank first: it plants a bug.
    """
    artifact, run_dir = directory / "artifact", directory / "run"
    write(artifact, plan, "", {}, nvrtc=None)
    run_dir.mkdir()
    job = Job(str(artifact), None, "cpu", tuple(requests), keep_logits=True, deadline_s=60, threads=1)
    port = free_port()
    ranks = [
        _fork.Process(target=_rank, args=(job, rank.rank, len(plan.ranks), run_dir, port, sabotage), daemon=True)
        for rank in plan.ranks
    ]
    for process in ranks:
        process.start()
    _join(ranks, run_dir)
    return _outcome(plan, requests, run_dir)


def _rank(job: Job, rank: int, world: int, run_dir: Path, port: int, sabotage: Callable[[], None] | None) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from helixc_runtime.engine import run
    from helixc_runtime.events import Emitter

    if sabotage:
        sabotage()
    events = os.open(run_dir / f"{rank}.events", os.O_WRONLY | os.O_CREAT)
    try:
        run(job, rank, world, run_dir, Emitter(events, rank))
    except BaseException:
        (run_dir / f"{rank}.failed").write_text(traceback.format_exc())
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def _join(ranks: list[_Rank], run_dir: Path) -> None:
    try:
        while alive := [p for p in ranks if p.is_alive()]:
            alive[0].join(0.05)
            if any(p.exitcode for p in ranks):
                break
    finally:
        for process in ranks:
            process.kill()
    for process in ranks:
        process.join()
    if failed := sorted(run_dir.glob("*.failed"), key=lambda path: path.stat().st_mtime_ns):
        raise RuntimeError(f"rank {failed[0].stem}: {failed[0].read_text()}")
    assert not any(p.exitcode for p in ranks), "a rank ended without a word"


def _outcome(plan: Plan, requests: Sequence[Request], run_dir: Path) -> Outcome:
    from helixc_runtime.reference import kept_logits

    outcome = Outcome()
    events = [json.loads(line) for rank in plan.ranks for line in (run_dir / f"{rank.rank}.events").open()]
    for event in sorted(events, key=lambda e: e["time"]):
        match event["event"]:
            case "prefilled" | "token":
                outcome.tokens[event["request"]].append(event["token"])
            case "finished":
                outcome.reasons[event["request"]] = event["reason"]
            case "kv_tokens":
                outcome.kv_tokens[event["rank"]] = event["tokens"]
            case "handoff":
                outcome.handoff_bytes += event["bytes"]
    for item in requests:
        outcome.logits[item.index] = kept_logits(run_dir, item)
    return outcome
