"""Supervision against real processes that die, hang, lie or are interrupted. No torch, no artifact."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import helixc
from helixc.launch.failures import LaunchFailure
from helixc.launch.launch_plan import Process, runtime_pythonpath
from helixc.launch.supervise import supervise
from helixc_runtime.events import Event
from tests.launch_faults import running

# A worker in the real shell; argv: the folder for its pid, then what to do.
WORKER = """
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
from helixc_runtime.worker import supervised

folder, act, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])

def body(emit):
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    emit.emit("stage", stage="ready", done=1, total=1)
    while not (folder / "go").exists():
        time.sleep(0.01)
    if act == "finish":
        return
    if act == "raise":
        raise ValueError("weights of layer 7 are missing")
    if act == "raise_after_child":
        while not ((folder / "pid0child").exists() and (folder / "pid0child").read_text()):
            time.sleep(0.01)
        raise ValueError("after the child")
    if act == "lose":
        time.sleep(0.1)
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:4242")
    if act == "lose_first":
        raise RuntimeError("Connection reset by peer")
    if act == "sigkill":
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "sigstop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if act == "leave":
        os._exit(0)
    if act == "print":
        print("a stray print", flush=True)
        ctypes.CDLL(None).puts(b"a stray puts")
        ctypes.CDLL(None).fflush(None)
        os.write(1, "half of \\u20ac: ".encode() + "\\u20ac".encode()[:2] + b"\\n")
        return
    if act == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / f"pid{rank}child").write_text(str(child.pid))
    time.sleep(600)

supervised(body, rank)
"""

# A launcher process: its folder, then what each rank does.
LAUNCHER = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background test run may ignore it
from helixc.launch.failures import Interrupted
from helixc.launch.supervise import supervise
from tests_dist_faults import processes
try:
    supervise(processes(Path(sys.argv[1]), sys.argv[2:]), 30.0, lambda event: None)
except Interrupted as stop:
    print(f"interrupted by {stop}")
    sys.exit(128 + stop.number)
"""


def processes(folder: Path, acts: Sequence[str]) -> list[Process]:
    """A worker per act. They wait for the file `go`."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    env = {"PYTHONPATH": runtime_pythonpath(None) or ""}
    return [
        Process(
            f"rank {rank}",
            f"rank {rank} (generation instance 0)",
            (sys.executable, str(script), str(folder), act),
            {"RANK": str(rank), **env},
            str(folder / f"rank{rank}.log"),
        )
        for rank, act in enumerate(acts)
    ]


def run(folder: Path, acts: Sequence[str], deadline_s: float = 30.0) -> list[Event]:
    """Supervise a worker per act, all acting once the last one is ready."""
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if sum(e.name == "stage" for e in events) == len(acts):
            (folder / "go").touch()

    supervise(processes(folder, acts), deadline_s, on_event)
    return events


def pids(folder: Path) -> dict[str, int]:
    return {path.name: int(path.read_text()) for path in folder.glob("pid*") if path.read_text()}


def wait_until(condition: object, seconds: float) -> None:
    assert callable(condition)
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    left = {name: pid for name, pid in pids(tmp_path).items() if running(pid)}
    for pid in left.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, "processes were left running"


def test_all_ranks_finish(folder: Path) -> None:
    events = run(folder, ["finish", "finish", "finish"])
    assert sorted(e.rank for e in events if e.name == "done") == [0, 1, 2]
    assert {e.rank for e in events if e.name == "heartbeat"} == {0, 1, 2}


def test_an_error_is_reported_with_rank_role_log_and_traceback(folder: Path) -> None:
    with pytest.raises(LaunchFailure) as failure:
        run(folder, ["wait", "raise", "wait"])
    message = str(failure.value)
    assert "rank 1 (generation instance 0) failed: ValueError: weights of layer 7 are missing" in message
    assert f"log: {folder / 'rank1.log'}" in message
    assert "Traceback" in message


def test_a_killed_rank_is_the_cause_even_if_peers_complain_first(folder: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(LaunchFailure) as failure:
        run(folder, ["lose", "lose_first", "sigkill", "wait"])
    assert re.search(r"^rank 2 \(.*\) failed: killed by SIGKILL", str(failure.value))
    assert "followed by: rank 0, rank 1" in str(failure.value)
    assert time.monotonic() - begin < 15


def test_a_stopped_rank_loses_its_heartbeat(folder: Path) -> None:
    with pytest.raises(LaunchFailure, match=r"^rank 0 \(.*\) failed: no heartbeat for 3 s"):
        run(folder, ["sigstop", "wait"], deadline_s=2.6)


def test_a_stopped_rank_explains_lost_peers_before_its_deadline(folder: Path) -> None:
    (folder / "go").touch()
    slow = WORKER.replace("time.sleep(0.1)", "time.sleep(5)")
    plan = processes(folder, ["lose", "sigstop"])
    (folder / "worker.py").write_text(slow)
    with pytest.raises(LaunchFailure, match=r"^rank 1 \(.*\) failed: no heartbeat for \d+ s"):
        supervise(plan, 60.0, lambda event: None)


def test_heartbeats_without_progress_end_and_show_where_the_rank_hangs(folder: Path) -> None:
    with pytest.raises(LaunchFailure) as failure:
        run(folder, ["wait"], deadline_s=1.5)
    assert "no progress of any rank for 8 s" in str(failure.value)
    assert "ready" in str(failure.value) and "in body" in str(failure.value)


def test_leaving_without_done_is_a_failure(folder: Path) -> None:
    with pytest.raises(LaunchFailure, match=r"rank 1 .* exited with code 0 before it had finished"):
        run(folder, ["wait", "leave"])


def test_stray_output_goes_to_the_log_and_is_no_event(folder: Path) -> None:
    events = run(folder, ["print"])
    assert {e.name for e in events} <= {"heartbeat", "stage", "done"}
    log = (folder / "rank0.log").read_bytes()
    assert b"a stray print\n" in log and b"a stray puts\n" in log and "half of €: ".encode() in log


def test_what_a_worker_writes_before_its_shell_is_logged(folder: Path) -> None:
    plan = processes(folder, ["finish"])
    half = 'import os; os.write(1, b"no event {\\xe2\\x82\\n")\n'
    (folder / "worker.py").write_text(half + WORKER)
    (folder / "go").touch()
    supervise(plan, 30.0, lambda event: None)
    assert b"no event {\xe2\x82\n" in (folder / "rank0.log").read_bytes()


def test_a_stubborn_rank_and_its_child_are_killed(folder: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(LaunchFailure, match=r"rank 1 .* after the child"):
        run(folder, ["stubborn", "raise_after_child"])
    assert "pid0child" in pids(folder)
    wait_until(lambda: not any(map(running, pids(folder).values())), 3)
    assert time.monotonic() - begin < 15


def test_a_program_that_cannot_start_is_named(folder: Path) -> None:
    plan = [Process("rank 0", "rank 0 (context)", (str(folder / "missing"),), {}, str(folder / "rank0.log"))]
    with pytest.raises(LaunchFailure, match=r"rank 0 \(context\) could not be started"):
        supervise(plan, 5.0, lambda event: None)


def test_the_end_of_the_lifeline_ends_a_worker(folder: Path) -> None:
    process = processes(folder, ["wait"])[0]
    worker = subprocess.Popen(
        process.argv, env={**os.environ, **process.env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with worker:
        wait_until(lambda: pids(folder), 30)
        assert worker.poll() is None and worker.stdin is not None
        worker.stdin.close()
        assert worker.wait(timeout=3) == 1


def start_launcher(folder: Path, acts: Sequence[str]) -> subprocess.Popen[str]:
    (folder / "tests_dist_faults.py").write_text(Path(__file__).read_text())
    (folder / "launcher.py").write_text(LAUNCHER)
    root = Path(helixc.__path__[0]).resolve().parent
    path = f"{folder}:{root}:{runtime_pythonpath(None) or ''}"
    launcher = subprocess.Popen(
        [sys.executable, str(folder / "launcher.py"), str(folder), *acts],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(pids(folder)) == len(acts), 30)
    return launcher


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_stop_signal_ends_every_process(folder: Path, number: signal.Signals, name: str) -> None:
    with start_launcher(folder, ["wait", "wait"]) as launcher:
        launcher.send_signal(number)
        output, _ = launcher.communicate(timeout=10)
    assert output == f"interrupted by {name}\n"
    assert launcher.returncode == 128 + number
    assert not any(map(running, pids(folder).values()))


def test_workers_do_not_outlive_a_killed_launcher(folder: Path) -> None:
    with start_launcher(folder, ["wait", "sigstop"]) as launcher:
        (folder / "go").touch()
        launcher.kill()
        launcher.wait(timeout=5)
        wait_until(lambda: not any(map(running, pids(folder).values())), 3)
