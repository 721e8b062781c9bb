"""Diagnostics as text for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from helixc.diagnostics import Diagnostic, Severity, Span, counted

if TYPE_CHECKING:
    from helixc.frontend import Analysis

_SEVERITY_STYLE = {Severity.ERROR: "1;31", Severity.WARNING: "1;33", Severity.NOTE: "1;36"}
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
Paint = Callable[[str, str], str]  # (text, ANSI style) -> text


def plain(text: str, style: str) -> str:
    """The Paint of a file or a pipe."""
    return text


def coloured(text: str, style: str) -> str:
    """The Paint of a terminal."""
    return f"\x1b[{style}m{text}\x1b[0m"


def print_findings(
    diagnostics: Sequence[Diagnostic], analyses: Sequence[Analysis], stream: TextIO | None = None
) -> None:
    """Print `diagnostics` of the files of `analyses` as text on `stream` (None: stdout), in colour on a terminal."""
    stream = stream or sys.stdout
    texts = {analysis.file: analysis.text for analysis in analyses}
    if diagnostics:
        colour = stream.isatty() and "NO_COLOR" not in os.environ
        print(as_text(diagnostics, texts, coloured if colour else plain), file=stream)


def as_text(diagnostics: Sequence[Diagnostic], texts: Mapping[str, str], paint: Paint = plain) -> str:
    """Every finding with its line of the file, a caret and the way out. `texts` holds what each file says."""
    lines = {file: _LINE_BREAK.split(text) for file, text in texts.items()}
    return "\n".join(_finding(d, lines, paint) for d in diagnostics)


def summary(diagnostics: Sequence[Diagnostic], files: int) -> str:
    """`2 errors and 1 warning in 3 files`."""
    found = [
        counted(number, severity.value)
        for severity in Severity
        if (number := sum(d.severity is severity for d in diagnostics))
    ]
    return f"{' and '.join(found) or 'no problems'} in {counted(files, 'file')}"


def _finding(diagnostic: Diagnostic, lines: Mapping[str, list[str]], paint: Paint) -> str:
    style = _SEVERITY_STYLE[diagnostic.severity]
    head = paint(f"{diagnostic.severity}[{diagnostic.code}]", style)
    parts = [f"{head}: {paint(diagnostic.message, '1')}", *_excerpt(diagnostic.span, "", lines, style, paint)]
    for related in diagnostic.related:
        parts += _excerpt(related.span, related.message, lines, "1;34", paint)
    parts += [f"    {note}" for note in diagnostic.notes]
    if diagnostic.help:
        parts.append(f"  {paint('= help', '1;36')}: {diagnostic.help}")
    return "\n".join(parts) + "\n"


def _excerpt(span: Span, label: str, lines: Mapping[str, list[str]], style: str, paint: Paint) -> list[str]:
    """Where the span is, and its first line with carets below."""
    place = f"  {paint('-->', '1;34')} {span.file}:{span.line}:{span.column}"
    of_file = lines.get(span.file, [])
    if span.line > len(of_file) or not any(of_file):
        return [f"{place} {label}".rstrip()]
    line = of_file[span.line - 1]
    end = span.end_column - 1 if span.end_line == span.line else len(line)
    before, marked = line[: span.column - 1], line[span.column - 1 : end]
    indent = "".join("\t" if character == "\t" else " " * _width(character) for character in before)
    carets = paint("^" * max(1, sum(map(_width, marked))), style)
    number = str(span.line)
    bar, gutter = paint("|", "1;34"), " " * len(number)
    shown = paint(number, "1;34")
    return [place, f"   {shown} {bar} {_printable(line)}", f"   {gutter} {bar} {indent}{carets} {label}".rstrip()]


def _width(character: str) -> int:
    """Terminal cells of a character."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _printable(text: str) -> str:
    """Control characters other than tab could drive the terminal."""
    return "".join("\N{REPLACEMENT CHARACTER}" if ord(c) < 32 and c != "\t" else c for c in text)


def as_json(diagnostics: Sequence[Diagnostic]) -> str:
    """An array of objects, lines and columns from 1; `help` may be null, `related` and `notes` empty."""
    found = [
        {
            "code": d.code,
            "severity": d.severity.value,
            "message": d.message,
            **_place(d.span),
            "help": d.help,
            "related": [{"message": r.message, **_place(r.span)} for r in d.related],
            "notes": list(d.notes),
        }
        for d in diagnostics
    ]
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def _place(span: Span) -> dict[str, str | int]:
    return {
        "file": span.file,
        "line": span.line,
        "column": span.column,
        "end_line": span.end_line,
        "end_column": span.end_column,
    }
