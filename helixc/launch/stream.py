"""The generated text on stdout as it comes: live for one prompt, request by request for several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TextIO

from helixc.launch.progress import Progress
from helixc.launch.prompts import Prompt
from helixc.launch.record import Record
from helixc.launch.tokenizer import TextStream, Tokenizer
from helixc_runtime.events import Event

# Terminals obey control characters; a model must not drive the user's terminal. Newline and tab stay.
_CONTROLS = dict.fromkeys([c for c in (*range(0x20), *range(0x7F, 0xA0)) if c not in (0x09, 0x0A)], "\ufffd")


class Output(Protocol):
    """Where generated tokens are shown."""

    def update(self, event: Event) -> None:
        """Show what `event` adds."""
        ...


class LiveText:
    """Text of the only prompt, as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, stream: TextIO, progress: Progress) -> None:
        self._text = TextStream(tokenizer)
        self._stream = stream
        self._progress = progress

    def update(self, event: Event) -> None:
        if event.name in ("prefilled", "token"):
            self._print(self._text.push(event.fields["token"]))
        elif event.name == "finished":
            self._print(self._text.finish() + "\n")

    def _print(self, piece: str) -> None:
        if piece:
            if self._stream.isatty():
                self._progress.stop()  # else it would overwrite the unfinished line
            self._stream.write(printable(piece, self._stream))
            self._stream.flush()


class TextPerRequest:
    """Each prompt with its text, when the request is finished. Without a tokenizer: its token ids."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        record: Record,
        tokenizer: Tokenizer | None,
        stream: TextIO,
        progress: Progress,
    ) -> None:
        self._prompts = prompts
        self._record = record
        self._tokenizer = tokenizer
        self._stream = stream
        self._progress = progress

    def update(self, event: Event) -> None:
        if event.name != "finished":
            return
        index: int = event.fields["request"]
        prompt, tokens = self._prompts[index], self._record.requests[index].tokens
        asked = prompt.text if prompt.text is not None else f"{len(prompt.token_ids or ())} token ids"
        text = self._tokenizer.decode(tokens) if self._tokenizer else " ".join(map(str, tokens))
        self._progress.clear()
        print(printable(f"[{index}] {asked}\n{text}\n", self._stream), file=self._stream, flush=True)


class NoText:
    """For --format json: stdout holds the final object only."""

    def update(self, event: Event) -> None:
        pass


def printable(text: str, stream: TextIO) -> str:
    """`text`, with control characters replaced if `stream` is a terminal."""
    return text.translate(_CONTROLS) if stream.isatty() else text
