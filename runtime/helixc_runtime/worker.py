"""The shell around one process of a deployment: `python -m helixc_runtime.worker RUN_DIR`, one per rank.

The launcher gives it torchrun's environment, stdin as a lifeline (end of file: the launcher is gone), stdout for
events and stderr as its log. However the launcher ends, this process does not outlive it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from helixc_runtime.events import Emitter
from helixc_runtime.job import read_job

HEARTBEAT_S = 1.0
_PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    """Run this rank of the job in the run directory named on the command line."""
    run_dir = Path(sys.argv[1])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def body(emit: Emitter) -> None:
        job = read_job(run_dir)
        from helixc_runtime.engine import run  # imports torch, seconds on a cold disk: the heart must beat before

        run(job, rank, world_size, run_dir, emit)

    supervised(body, rank)


def supervised(body: Callable[[Emitter], None], rank: int) -> NoReturn:
    """Run `body` under the launcher's rules and end the process: exit 0 after "done", 1 after "failed".

    The process is ended at once, with no clean-up, so that a thread stuck in a collective cannot keep it alive.
    """
    _die_with_parent()
    lifeline, events = _take_standard_streams()
    emit = Emitter(events, rank)
    _start_daemon(lambda: _watch(lifeline), "lifeline")
    _start_daemon(lambda: _beat(emit), "heartbeat")
    _exit(_guarded(body, emit))


def _guarded(body: Callable[[Emitter], None], emit: Emitter) -> int:
    try:
        body(emit)
        emit.emit("done")
        return 0
    except BaseException as error:  # SystemExit from a library must not pass for success either
        traceback.print_exc()
        try:
            emit.emit("failed", error=f"{type(error).__name__}: {error}")
        except OSError:
            print("the launcher no longer reads events", file=sys.stderr)
        return 1


def _die_with_parent() -> None:
    """Ask Linux to kill this process with its parent. A parent gone before this call shows as an ended lifeline."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _take_standard_streams() -> tuple[int, int]:
    """Move the lifeline and the event pipe to private descriptors; returns both.

    Afterwards stray prints, C libraries' included, go to the log, and reading stdin gives end of file.
    """
    lifeline, events = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the launcher asks a stalled rank where it is
    return lifeline, events


def _start_daemon(target: Callable[[], None], name: str) -> None:
    threading.Thread(target=target, name=name, daemon=True).start()


def _watch(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    os._exit(1)


def _beat(emit: Emitter) -> None:
    while True:
        try:
            emit.emit("heartbeat")
        except OSError:
            os._exit(1)
        time.sleep(HEARTBEAT_S)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    main()
