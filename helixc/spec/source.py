"""A deployment file as text and as data, with the place in the text of every key and value."""

from __future__ import annotations

import codecs
import os
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helixc.diagnostics import Diagnostic, Span, closest
from helixc.spec import rules

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1 << 20
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # what YAML readers count as the end of a line


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry stands. `key` is None for the whole document and for items of a list."""

    key: Span | None
    value: Span


@dataclass(frozen=True, slots=True)
class Source:
    """A file that is a YAML mapping. `spans` has an entry for every key path in `data`, () included."""

    path: str
    text: str
    data: dict[str, Any]
    spans: Mapping[KeyPath, Place]

    def value_span(self, path: KeyPath) -> Span:
        """The place of the value at `path`, or of its nearest enclosing mapping's key if it is not given."""
        if path in self.spans:
            return self.spans[path].value
        return self.key_span(path)

    def key_span(self, path: KeyPath) -> Span:
        """The place of the key at `path`, or of the nearest enclosing key; the file's start for the document."""
        for length in range(len(path), 0, -1):
            place = self.spans.get(path[:length])
            if place is not None:
                return place.key or place.value
        return Span.start_of(self.path)


@dataclass(frozen=True, slots=True)
class LineTable:
    """Turns indexes into a file's text into spans."""

    file: str
    text: str
    starts: tuple[int, ...]  # index of the first character of every line

    @classmethod
    def of(cls, file: str, text: str) -> LineTable:
        return cls(file, text, (0, *(match.end() for match in _LINE_BREAK.finditer(text))))

    def span(self, start: int, end: int) -> Span:
        """The span of `text[start:end]`, white space at its end left out."""
        end = start + len(self.text[start:end].rstrip())
        return Span(self.file, *self._position(start), *self._position(end))

    def index(self, line: int, column: int) -> int:
        """Inverse of a span's (line, column)."""
        return self.starts[line - 1] + column - 1

    def at(self, span: Span) -> str:
        """The text of a span."""
        return self.text[self.index(span.line, span.column) : self.index(span.end_line, span.end_column)]

    def _position(self, index: int) -> tuple[int, int]:
        line = bisect_right(self.starts, index)
        return line, index - self.starts[line - 1] + 1


def read_text(path: Path | str) -> tuple[str | None, list[Diagnostic]]:
    """The file's text without a byte order mark, or the reason why there is none."""
    file = str(path)
    try:
        with open(path, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        return None, [_unreadable(file, error)]
    return decode(file, raw)


def decode(file: str, raw: bytes) -> tuple[str | None, list[Diagnostic]]:
    """The text that `raw` holds, without a byte order mark, or the reason why it cannot be a deployment's text."""
    if len(raw) > MAX_BYTES:
        message = f"{file} holds more than {MAX_BYTES:,} bytes"
        return None, [rules.UNREADABLE.at(Span.start_of(file), message, "a deployment file is a short YAML file")]
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode(), []
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        span = LineTable.of(file, before).span(len(before), len(before))
        return None, [rules.NOT_TEXT.at(span, message, "save the file as UTF-8")]


def _unreadable(file: str, error: OSError) -> Diagnostic:
    span = Span.start_of(file)
    if isinstance(error, IsADirectoryError):
        return rules.UNREADABLE.at(span, f"{file} is a folder", "give the path of a YAML file in it")
    if isinstance(error, FileNotFoundError):
        return rules.UNREADABLE.at(span, f"{file} does not exist", _nearby(file))
    return rules.UNREADABLE.at(span, f"{file} cannot be read: {error.strerror}", "give the path of a readable file")


def _nearby(file: str) -> str:
    folder, name = os.path.split(file)
    if not os.path.isdir(folder or "."):
        return f"the folder {folder} does not exist either"
    similar = closest(name, (e for e in os.listdir(folder or ".") if e.endswith((".yaml", ".yml"))))
    return f"did you mean {os.path.join(folder, similar)}?" if similar else "check the path"


def load(path: Path | str) -> tuple[Source | None, list[Diagnostic]]:
    """Read one deployment file. Without a Source at least one finding is an error."""
    text, findings = read_text(path)
    if text is None:
        return None, findings
    from helixc.spec.document import parse_yaml

    return parse_yaml(str(path), text)
