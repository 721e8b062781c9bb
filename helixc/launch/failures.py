"""Why a launch failed: what each process showed, which of them came first, and how to tell the user."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from helixc.launch.launch_plan import Process

TAIL_LINES = 15
_TAIL_BYTES = 16384

# What gloo, NCCL, torch's store and our own kernels' waits say when another process of the group is gone.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket (timeout|closed)|remote process exit|ncclRemoteError"
    r"|peer (is |was )?(gone|lost|closed)|timed out|wait timeout|failed to recv|recvValue|sendBytes|recvBytes"
    r"|^PeerTimeout|^HandoffLost",
    re.IGNORECASE,
)


class Symptom(Enum):
    """How a failure showed, the likeliest cause first: nobody is killed from outside because a peer raised."""

    KILLED = 0
    FAILED = 1
    SILENT = 2
    LOST_PEER = 3


@dataclass(frozen=True, slots=True)
class Failure:
    """One process's trouble. `at`: seconds of the monotonic clock."""

    process: Process
    symptom: Symptom
    cause: str
    at: float


class LaunchFailure(Exception):
    """The launch failed while it ran; the message names the process, its log and the cause."""


class Interrupted(Exception):
    """The launcher was asked to stop by signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def reported(process: Process, error: str, at: float) -> Failure:
    """A failure the process itself reported."""
    symptom = Symptom.LOST_PEER if _LOST_PEER.search(error) else Symptom.FAILED
    return Failure(process, symptom, error, at)


def exited(process: Process, code: int, at: float) -> Failure:
    """A process that ended, with subprocess's return code, without having reported anything."""
    if code >= 0:
        return Failure(process, Symptom.FAILED, f"exited with code {code} before it had finished", at)
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
    symptom = Symptom.FAILED if name == "SIGABRT" else Symptom.KILLED  # NCCL aborts a process whose peer is gone
    return Failure(process, symptom, f"killed by {name}{hint}", at)


def silent(process: Process, seconds: float, at: float) -> Failure:
    """A process whose heartbeat stopped."""
    return Failure(process, Symptom.SILENT, f"no heartbeat for {seconds:.0f} s", at)


def first_cause(failures: Sequence[Failure]) -> Failure:
    """The failure the others follow from: a reported lost peer counts only when nothing else happened."""
    return min(failures, key=lambda f: (f.symptom.value, f.at))


def describe(failures: Sequence[Failure]) -> str:
    """The message for the user: the first cause, who else failed, and the end of the log."""
    cause = first_cause(failures)
    lines = [f"{cause.process.title} failed: {cause.cause}"]
    if others := sorted({f.process.name for f in failures} - {cause.process.name}):
        shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        lines.append(f"  followed by: {shown}")
    lines.append(f"  log: {cause.process.log}")
    tail = _tail(Path(cause.process.log))
    return "\n".join(lines + [f"    | {line}" for line in tail])


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    except OSError as error:
        return [f"(cannot be read: {error.strerror})"]
