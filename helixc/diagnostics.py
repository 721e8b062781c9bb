"""What the compiler tells the user: a code, a place in the file, what was seen and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum

_LINE_BREAKS = re.compile(r"\s*[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]\s*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Span:
    """Characters of `file`, lines and columns counted from 1. The end column is the first one after the span."""

    file: str
    line: int
    column: int
    end_line: int
    end_column: int

    @classmethod
    def start_of(cls, file: str) -> Span:
        return cls(file, 1, 1, 1, 1)


@dataclass(frozen=True, slots=True)
class Related:
    """A second place that a finding is about, such as the first of two duplicate keys."""

    message: str
    span: Span


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding. `help` is the way out; `notes` are lines with the numbers behind it, such as a table."""

    code: str
    severity: Severity
    message: str
    span: Span
    help: str | None = None
    related: tuple[Related, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """What every finding of one code shares. `explanation` is what `helixc explain CODE` prints below the title."""

    code: str
    severity: Severity
    title: str
    explanation: str

    def at(
        self,
        span: Span,
        message: str,
        help: str | None = None,
        related: Iterable[Related] = (),
        notes: Iterable[str] = (),
    ) -> Diagnostic:
        """The finding of this rule at `span`. Message and help become one line each, whatever values they quote."""
        message, help = one_line(message), one_line(help) if help else help
        return Diagnostic(self.code, self.severity, message, span, help, tuple(related), tuple(notes))


def one_line(text: str) -> str:
    """`text` with a space for every line break, and without control characters, which could drive a terminal."""
    return text if text.isprintable() else _CONTROL.sub("\N{REPLACEMENT CHARACTER}", _LINE_BREAKS.sub(" ", text))


def has_errors(diagnostics: Iterable[Diagnostic]) -> bool:
    return any(d.severity is Severity.ERROR for d in diagnostics)


def strictly(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """The same findings with every warning as an error; notes stay notes."""
    return [replace(d, severity=Severity.ERROR) if d.severity is Severity.WARNING else d for d in diagnostics]


def in_file_order(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Sorted by place, without repetitions; findings at one place keep their order."""
    return sorted(dict.fromkeys(diagnostics), key=lambda d: (d.span.line, d.span.column))


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice a user probably meant by `word`, or None."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def listed(words: Iterable[object], conjunction: str = "or") -> str:
    """`a, b or c`."""
    *most, last = map(str, words)
    return f"{', '.join(most)} {conjunction} {last}" if most else last


def counted(number: int, noun: str) -> str:
    """`1 error`, `2 errors`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def divisors(number: int) -> Iterator[int]:
    """Divisors of `number` in ascending order."""
    return (d for d in range(1, number + 1) if number % d == 0)
