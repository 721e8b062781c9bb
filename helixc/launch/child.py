"""One started process, seen from the launcher: its events, its exit, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from helixc.launch.launch_plan import Process
from helixc_runtime.events import Event, parse

_READ_BYTES = 65536


class Child:
    """A running `process` in a session of its own, so that a terminal's Ctrl-C reaches only the launcher.

    Its stdin is `lifeline`, its events come over stdout, its stderr goes to the log. Raises OSError if it cannot start.
    """

    def __init__(self, process: Process, lifeline: int, environ: Mapping[str, str]) -> None:
        self.process = process
        with Path(process.log).open("wb") as log:
            self._popen = subprocess.Popen(
                process.argv,
                env={**environ, **process.env},
                stdin=lifeline,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._popen.stdout is not None
        self.stdout = self._popen.stdout.fileno()
        os.set_blocking(self.stdout, False)
        self.heard_at = self.progress_at = time.monotonic()
        self.stage = "starting"
        self.done = False
        self._rest = b""

    def read(self) -> Iterator[Event]:
        """Events that have arrived, all of them. What is no event is appended to the log."""
        for line in self._lines():
            event = parse(line)
            if event is None:
                self._log(line)
                continue
            self.heard_at = time.monotonic()
            if event.name != "heartbeat":
                self.progress_at = self.heard_at
            if event.name == "stage":
                self.stage = str(event.fields.get("stage"))
            self.done = self.done or event.name == "done"
            yield event

    @property
    def at_end(self) -> bool:
        """Whether the process has closed its end of the event pipe."""
        return self._popen.stdout is None or self._popen.stdout.closed

    def _lines(self) -> Iterator[bytes]:
        while chunk := self._chunk():
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            yield from lines
        if self.at_end and self._rest:
            rest, self._rest = self._rest, b""
            yield rest

    def _chunk(self) -> bytes:
        if self.at_end:
            return b""
        try:
            chunk = os.read(self.stdout, _READ_BYTES)
        except BlockingIOError:
            return b""
        if not chunk and self._popen.stdout is not None:
            self._popen.stdout.close()
        return chunk

    def _log(self, line: bytes) -> None:
        with Path(self.process.log).open("ab") as log:
            log.write(line + b"\n")

    def exit_code(self) -> int | None:
        """None while it runs; -N if signal N killed it. Nothing it started outlives it."""
        if self._popen.returncode is None and self._popen.poll() is not None:
            self._signal_group(signal.SIGKILL)  # at once: later the number may be another group's
        return self._popen.returncode

    def signal(self, number: int) -> None:
        """Send signal `number` to the process and to whatever it has started."""
        if self.exit_code() is None:
            self._signal_group(number)

    def where(self) -> None:
        """Ask the process itself, not its children, to write every thread's stack to its log."""
        if self.exit_code() is None:
            self._popen.send_signal(signal.SIGUSR1)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, number)


def end_all(children: Sequence[Child], grace_s: float = 2.0) -> tuple[Child, ...]:
    """End every process: SIGTERM, then SIGKILL to those that live after `grace_s`. Returns those that still do."""
    for child in children:
        child.signal(signal.SIGTERM)
    _wait(children, grace_s)
    for child in children:
        child.signal(signal.SIGKILL)
    return _wait(children, grace_s)


def _wait(children: Sequence[Child], seconds: float) -> tuple[Child, ...]:
    until = time.monotonic() + seconds
    while alive := tuple(c for c in children if c.exit_code() is None):
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    return alive
