"""Runs a set of processes to their end: all of them finish, or none of them is left."""

from __future__ import annotations

import math
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from helixc.launch.child import Child, end_all
from helixc.launch.failures import Failure, Interrupted, LaunchFailure, Symptom, describe, exited, reported, silent
from helixc.launch.launch_plan import Process
from helixc_runtime.events import Event

_TICK_S = 0.05
_SETTLE_S = 0.5  # after a first failure, for those that explain it
_SUSPECT_S = 4.0  # a rank this silent, at one heartbeat a second, explains its peers' lost connections
_STALL_DEADLINES = 5  # heartbeats without any progress are tolerated this many deadlines long

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def supervise(processes: Sequence[Process], deadline_s: float, on_event: Callable[[Event], None]) -> None:
    """Start `processes`, hand their events to `on_event`, and return when every one has finished well.

    Whatever happens, none of them runs when this returns or raises. Raises LaunchFailure when one dies, reports a
    failure, is silent for `deadline_s` seconds, or nothing at all progresses for five times that; Interrupted on
    SIGINT, SIGTERM or SIGHUP.
    """
    lifeline, held = os.pipe()  # workers read `lifeline`; it ends when this process does, by SIGKILL too
    children: list[Child] = []
    try:
        with _stop_signals() as stopped:
            _start(processes, lifeline, children, stopped)
            _Watch(children, deadline_s, on_event, stopped).run()
    except BaseException as error:
        if survivors := end_all(children):
            names = ", ".join(c.process.name for c in survivors)
            error.add_note(f"SIGKILL did not end {names}: probably stuck in a driver or a file system")
        raise
    finally:
        os.close(lifeline)
        os.close(held)


def _start(processes: Sequence[Process], lifeline: int, children: list[Child], stopped: list[int]) -> None:
    for process in processes:
        if stopped:
            return
        try:
            children.append(Child(process, lifeline, os.environ))
        except OSError as error:
            raise LaunchFailure(f"{process.title} could not be started: {error}") from None


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects stop signals in a list instead of raising anywhere; only the main thread can."""
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def note(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)

    # An ignored signal stays ignored: nohup, or a shell's background job.
    heeded = [n for n in _STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watch:
    """The loop over a set of running children."""

    def __init__(
        self, children: list[Child], deadline_s: float, on_event: Callable[[Event], None], stopped: list[int]
    ) -> None:
        self._running = list(children)
        self._deadline_s = deadline_s
        self._on_event = on_event
        self._stopped = stopped
        self._failures: dict[str, Failure] = {}  # the first of each process
        self._pending: list[Event] = []
        self._selector = selectors.DefaultSelector()
        for child in children:
            self._selector.register(child.stdout, selectors.EVENT_READ, child)

    def run(self) -> None:
        with self._selector:
            while self._running and not self._failures:
                self._tick()
            if self._failures:
                self._settle()
            self._deliver(math.inf)
            if self._failures:
                raise LaunchFailure(describe(list(self._failures.values())))

    def _tick(self) -> None:
        if self._stopped:
            raise Interrupted(self._stopped[0])
        begin = time.monotonic()
        for key, _ in self._selector.select(0 if self._pending else _TICK_S):
            self._read(key.data)
        self._deliver(begin)
        for child in list(self._running):
            self._judge(child)
        self._judge_progress()

    def _deliver(self, until: float) -> None:
        """Hand on, in order of time, what was sent before `until`, a moment before every pipe was read.

        So a request's second token never overtakes the first one, which another process sent.
        """
        self._pending.sort(key=lambda event: event.time)
        while self._pending and self._pending[0].time <= until:
            self._on_event(self._pending.pop(0))

    def _read(self, child: Child) -> None:
        for event in child.read():
            if event.name == "failed":
                self._fail(reported(child.process, str(event.fields.get("error")), time.monotonic()))
            else:
                self._pending.append(event)
        if child.at_end and child.stdout in self._selector.get_map():
            self._selector.unregister(child.stdout)

    def _judge(self, child: Child) -> None:
        code, now = child.exit_code(), time.monotonic()
        if code is not None:
            self._read(child)  # its last words may explain the exit
            self._running.remove(child)
            if code != 0 or not child.done:
                self._fail(exited(child.process, code, now))
        elif now - child.heard_at > self._deadline_s:
            self._give_up(child, silent(child.process, now - child.heard_at, now))

    def _judge_progress(self) -> None:
        now, limit = time.monotonic(), self._deadline_s * _STALL_DEADLINES
        if not self._running or any(now - c.progress_at <= limit for c in self._running):
            return
        child = min(self._running, key=lambda c: c.progress_at)
        cause = f"no progress of any rank for {limit:.0f} s; this one has been longest in its stage ({child.stage})"
        self._give_up(child, Failure(child.process, Symptom.SILENT, cause, now))

    def _give_up(self, child: Child, failure: Failure) -> None:
        if child.process.name not in self._failures:
            child.where()
        self._fail(failure)

    def _fail(self, failure: Failure) -> None:
        self._failures.setdefault(failure.process.name, failure)

    def _settle(self) -> None:
        """Collect what else fails: the first to be noticed is often a peer of the one that failed first."""
        until = time.monotonic() + _SETTLE_S
        while self._running and time.monotonic() < until:
            self._tick()
        if all(f.symptom is Symptom.LOST_PEER for f in self._failures.values()):
            now = time.monotonic()
            for child in self._running:
                if now - child.heard_at > _SUSPECT_S:
                    self._give_up(child, silent(child.process, now - child.heard_at, now))
