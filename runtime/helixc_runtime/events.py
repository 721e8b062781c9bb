"""What a worker tells the launcher: one JSON object a line on a pipe of its own.

| event | fields | from |
|---|---|---|
| heartbeat | | every rank, each second |
| stage | stage (connect, weights, kernels, ready, prefill, decode), done, total | every rank |
| prefilled | request, token (the first one) | the context instance that prefilled the request |
| handoff | request, bytes, way (peer, host) | whoever sends K/V, once a receiver, so that the sum is what moved |
| received | request, seconds (until its prompt's K/V was in its pages) | generation ranks that attend for it |
| token | request, token (each later one, in order) | the generation instance's leader |
| finished | request, reason (stop, length) | the generation instance's leader |
| kv_tokens | tokens (stored over the job) | every generation rank |
| verify | max_abs_logit_diff, tolerance, first_difference | the reference process |
| failed | error | a rank that gives up |
| done | | every rank, last |

Every line also holds `rank` and `time`: seconds of time.monotonic(), one clock for all processes of a machine.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """One line: its name, who sent it, when (seconds, monotonic clock), and the other fields."""

    name: str
    rank: int
    time: float
    fields: Mapping[str, Any]


class Emitter:
    """Writes events of `rank` to file descriptor `fd`, whole lines only; any thread may call it."""

    def __init__(self, fd: int, rank: int = 0) -> None:
        self._fd = fd
        self._rank = rank
        self._lock = threading.Lock()

    def emit(self, event: str, **fields: Any) -> None:
        """Send one event. Raises OSError when nobody reads any more, TypeError for a value JSON cannot hold."""
        with self._lock:
            line = json.dumps({"event": event, "rank": self._rank, "time": time.monotonic(), **fields})
            data = line.encode() + b"\n"
            while data:
                data = data[os.write(self._fd, data) :]


def parse(line: bytes) -> Event | None:
    """The event on `line`, or None if it is not one (a stray print from before the worker took its stdout over)."""
    try:
        data = json.loads(line)
        fields = {k: v for k, v in data.items() if k not in ("event", "rank", "time")}
        return Event(str(data["event"]), int(data["rank"]), float(data["time"]), fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
