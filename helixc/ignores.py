"""Comments `# helixc: ignore[HX305] reason`: warnings that the author of a file has seen and accepts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from helixc.diagnostics import Diagnostic, Rule, Severity, Span, closest, has_errors, listed
from helixc.spec import rules
from helixc.spec.source import LineTable, Source

_COMMENT = re.compile(r"(?<![^\s])#[ \t]*helixc:[^\r\n\x85\u2028\u2029]*")
_IGNORE = re.compile(r"#[ \t]*helixc:[ \t]*ignore[ \t]*\[([^\]]*)\][ \t]*(.*)", re.IGNORECASE)
_FORM = "write `# helixc: ignore[HX305] reason`"


@dataclass(frozen=True, slots=True)
class Ignore:
    """A comment that silences `codes` on `line`."""

    codes: tuple[str, ...]
    line: int
    span: Span


def apply_ignores(source: Source, findings: Sequence[Diagnostic], known: Iterable[Rule]) -> list[Diagnostic]:
    """`findings` without those that comments of `source` silence, and with what is wrong with such comments.

    Errors cannot be silenced: nothing could be built from the file all the same.
    """
    if "helixc:" not in source.text:
        return list(findings)
    by_code = {rule.code: rule for rule in known}
    ignores, mistakes = _ignores(source, by_code)
    silenced = {(ignore.line, code) for ignore in ignores for code in ignore.codes}
    places = {(d.span.line, d.code) for d in findings}
    kept = [d for d in findings if d.severity is Severity.ERROR or (d.span.line, d.code) not in silenced]
    if not has_errors(findings):  # an error may have kept the check from running
        mistakes += _unused(ignores, places)
    return kept + mistakes


def _unused(ignores: Iterable[Ignore], places: set[tuple[int, str]]) -> Iterator[Diagnostic]:
    for ignore in ignores:
        idle = [code for code in ignore.codes if (ignore.line, code) not in places]
        if idle:
            message = f"there is no {listed(idle)} in line {ignore.line} to ignore"
            yield rules.UNUSED_IGNORE.at(ignore.span, message, "remove the comment, or move it to the finding's line")


def _ignores(source: Source, known: Mapping[str, Rule]) -> tuple[list[Ignore], list[Diagnostic]]:
    """Well-formed comments, and a finding for each of the others."""
    table = LineTable.of(source.path, source.text)
    found: list[Ignore] = []
    mistakes: list[Diagnostic] = []
    quoted = _text_ranges(source, table)
    for match in _COMMENT.finditer(source.text):
        if any(start <= match.start() < end for start, end in quoted):
            continue
        span = table.span(match.start(), match.end())
        codes, problem, help = _read(match[0], known)
        if problem:
            mistakes.append(rules.BAD_IGNORE.at(span, problem, help))
        else:
            found.append(Ignore(codes, _target(table, match.start()), span))
    return found, mistakes


def _read(comment: str, known: Mapping[str, Rule]) -> tuple[tuple[str, ...], str, str]:
    """(codes, what is wrong or "", help)."""
    match = _IGNORE.fullmatch(comment.rstrip())
    if match is None:
        return (), "this comment for helixc is not understood", _FORM
    codes = tuple(code.strip().upper() for code in match[1].split(",") if code.strip())
    if not codes:
        return (), "no code is named", _FORM
    for code in codes:
        if code not in known:
            meant = closest(code, known)
            return (), f"there is no code {code}", f"did you mean {meant}?" if meant else _FORM
        if known[code].severity is Severity.ERROR:
            return (), f"{code} is an error, and only warnings and notes can be ignored", f"see `helixc explain {code}`"
    if not match[2].strip(" \t-:,;"):
        return (), "the reason is missing", f"say why: `# helixc: ignore[{', '.join(codes)}] ...`"
    return codes, "", ""


def _text_ranges(source: Source, table: LineTable) -> list[tuple[int, int]]:
    """Where the file's texts with a `#` stand: there it starts no comment."""
    ranges = []
    for place in source.spans.values():
        span = place.value
        start, end = table.index(span.line, span.column), table.index(span.end_line, span.end_column)
        text = source.text[start:end]
        if "#" in text and text[0] in "'\"|>":  # elsewhere ` #` starts a comment; mappings and lists contain those
            ranges.append((start, end))
    return ranges


def _target(table: LineTable, index: int) -> int:
    """The line that a comment at `index` is about: its own, or if it stands alone the next one with content."""
    position = table.span(index, index)
    lines = [table.text[start:end] for start, end in zip(table.starts, (*table.starts[1:], None), strict=True)]
    if lines[position.line - 1][: position.column - 1].strip():
        return position.line
    for number in range(position.line, len(lines)):
        text = lines[number].strip()
        if text and not text.startswith("#"):
            return number + 1
    return position.line
