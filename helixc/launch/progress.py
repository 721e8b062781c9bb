"""Progress on stderr while a launch connects, loads and prefills: on a terminal one changing line."""

from __future__ import annotations

import time
from typing import TextIO

from helixc_runtime.events import Event

_BEFORE_READY = ("connect", "weights", "kernels", "ready")
_WORDS = {
    "start": "starting processes",
    "connect": "connecting",
    "weights": "loading weights",
    "kernels": "loading kernels",
    "prefill": "prefilling",
    "decode": "decoding",
}
_REDRAW_S = 0.1


class Progress:
    """Follows `ranks` processes serving `requests` prompts. The slowest rank's stage is the launch's."""

    def __init__(self, stream: TextIO, ranks: int, requests: int) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._stages: dict[int, tuple[str, int, int]] = {}  # rank -> stage, done, total
        self._ranks = ranks
        self._requests = requests
        self._prefilled = self._finished = self._tokens = 0
        self._start = time.monotonic()
        self._stage = ""
        self._drawn_at = 0.0
        self._on_line = False  # an unfinished line stands on the terminal
        self._stopped = False

    def update(self, event: Event) -> None:
        """Take one event in and show what changed."""
        match event.name:
            case "stage":
                data = event.fields
                self._stages[event.rank] = (data["stage"], data["done"], data["total"])
            case "prefilled":
                self._prefilled += 1
                self._tokens += 1
            case "token":
                self._tokens += 1
            case "finished":
                self._finished += 1
        self._show()

    def clear(self) -> None:
        """Take the line off the terminal, before something else is printed there."""
        if self._on_line:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()
            self._on_line = False

    def stop(self) -> None:
        """Show nothing more: the terminal now belongs to the text."""
        self.clear()
        self._stopped = True

    def _show(self) -> None:
        if self._stopped:
            return
        stage, detail = self._now()
        changed, self._stage = stage != self._stage, stage
        line = f"[{time.monotonic() - self._start:6.1f} s] {_WORDS[stage]}{detail if self._live else ''}"
        if not self._live and changed:
            print(line, file=self._stream, flush=True)
        if self._live and (changed or time.monotonic() - self._drawn_at > _REDRAW_S):
            self._drawn_at = time.monotonic()
            self._stream.write(f"\r\x1b[2K{line}")
            self._stream.flush()
            self._on_line = True

    def _now(self) -> tuple[str, str]:
        """The stage the launch is in, and how far it is in it."""
        if len(self._stages) < self._ranks:
            return "start", f": {len(self._stages)} of {self._ranks} ranks"
        order = [min(self._order(stage), len(_BEFORE_READY) - 1) for stage, _, _ in self._stages.values()]
        slowest = _BEFORE_READY[min(order)]
        if slowest != "ready":
            at = [(done, total) for stage, done, total in self._stages.values() if stage == slowest]
            return slowest, f": {sum(d for d, _ in at)} of {sum(t for _, t in at)} on {len(at)} ranks"
        if self._prefilled < self._requests:
            return "prefill", f": {self._prefilled} of {self._requests} prompts"
        return "decode", f": {self._tokens} tokens, {self._finished} of {self._requests} requests finished"

    @staticmethod
    def _order(stage: str) -> int:
        return _BEFORE_READY.index(stage) if stage in _BEFORE_READY else len(_BEFORE_READY)
