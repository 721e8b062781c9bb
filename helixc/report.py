"""Printers of diagnostics: text for people, JSON, GitHub annotations and SARIF for programs."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from helixc.diagnostics import Diagnostic, Rule, Severity, Span, counted

_SEVERITY_STYLE = {Severity.ERROR: "1;31", Severity.WARNING: "1;33", Severity.NOTE: "1;36"}
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
Paint = Callable[[str, str], str]  # (text, ANSI style) -> text


def plain(text: str, style: str) -> str:
    """The Paint of a file or a pipe."""
    return text


def coloured(text: str, style: str) -> str:
    """The Paint of a terminal."""
    return f"\x1b[{style}m{text}\x1b[0m"


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
    """An array of objects, lines and columns from 1; `help` may be null."""
    found = [
        {
            "code": d.code,
            "severity": d.severity.value,
            "message": d.message,
            "file": d.span.file,
            "line": d.span.line,
            "column": d.span.column,
            "end_line": d.span.end_line,
            "end_column": d.span.end_column,
            "help": d.help,
        }
        for d in diagnostics
    ]
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


_GITHUB_KIND = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "notice"}


def as_github(diagnostics: Sequence[Diagnostic]) -> str:
    """Workflow commands that GitHub Actions shows beside the lines."""
    return "".join(_annotation(d) for d in diagnostics)


def _annotation(diagnostic: Diagnostic) -> str:
    span = diagnostic.span
    properties = {
        "file": span.file,
        "line": str(span.line),
        "endLine": str(span.end_line),
        "col": str(span.column),
        "endColumn": str(span.end_column),
        "title": diagnostic.code,
    }
    shown = ",".join(f"{key}={_escaped(value, ':,')}" for key, value in properties.items())
    return f"::{_GITHUB_KIND[diagnostic.severity]} {shown}::{_escaped(_whole_message(diagnostic), '')}\n"


def _escaped(text: str, more: str) -> str:
    return "".join(f"%{ord(c):02X}" if c in "%\r\n" + more else c for c in text)


def _whole_message(diagnostic: Diagnostic) -> str:
    return f"{diagnostic.message}\nhelp: {diagnostic.help}" if diagnostic.help else diagnostic.message


def as_sarif(diagnostics: Sequence[Diagnostic], rules: Sequence[Rule], version: str) -> str:
    """A SARIF 2.1.0 log with one run."""
    driver = {
        "name": "helixc",
        "semanticVersion": version,
        "rules": [
            {
                "id": rule.code,
                "shortDescription": {"text": rule.title},
                "fullDescription": {"text": rule.explanation},
                "defaultConfiguration": {"level": rule.severity.value},
            }
            for rule in rules
        ],
    }
    index = {rule.code: number for number, rule in enumerate(rules)}
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "results": [_result(d, index[d.code]) for d in diagnostics],
    }
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2, ensure_ascii=False) + "\n"


def _result(diagnostic: Diagnostic, rule_index: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": diagnostic.code,
        "ruleIndex": rule_index,
        "level": diagnostic.severity.value,
        "message": {"text": _whole_message(diagnostic)},
        "locations": [_location(diagnostic.span)],
    }
    if diagnostic.related:
        result["relatedLocations"] = [
            _location(related.span) | {"message": {"text": related.message}} for related in diagnostic.related
        ]
    return result


def _location(span: Span) -> dict[str, Any]:
    path = PurePath(span.file)
    uri = path.as_uri() if path.is_absolute() else quote(path.as_posix())
    region = {
        "startLine": span.line,
        "startColumn": span.column,
        "endLine": span.end_line,
        "endColumn": span.end_column,
    }
    return {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": region}}
