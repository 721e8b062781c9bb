"""What a check is: a rule and a function that yields its findings. The function's docstring is the explanation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from helixc.diagnostics import Diagnostic, Related, Rule, Severity, Span

CaseT = TypeVar("CaseT")


@dataclass(frozen=True, slots=True)
class Finding:
    """One violation of a check's rule. `help` is the way out."""

    span: Span
    message: str
    help: str
    related: tuple[Related, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Check(Generic[CaseT]):
    """A rule and the function that looks for violations of it."""

    rule: Rule
    find: Callable[[CaseT], Iterable[Finding]]

    def run(self, case: CaseT) -> list[Diagnostic]:
        return [self.rule.at(f.span, f.message, f.help, f.related, f.notes) for f in self.find(case)]


def _check(code: str, severity: Severity) -> Callable[[Callable[[CaseT], Iterable[Finding]]], Check[CaseT]]:
    def wrap(find: Callable[[CaseT], Iterable[Finding]]) -> Check[CaseT]:
        title, _, explanation = inspect.cleandoc(find.__doc__ or "").partition("\n")
        assert title and explanation, f"{code} needs a docstring: a title, an empty line, an explanation"
        return Check(Rule(code, severity, title.rstrip("."), explanation.strip()), find)

    return wrap


def error(code: str) -> Callable[[Callable[[CaseT], Iterable[Finding]]], Check[CaseT]]:
    """Make a function a check whose findings stop the compilation."""
    return _check(code, Severity.ERROR)


def note(code: str) -> Callable[[Callable[[CaseT], Iterable[Finding]]], Check[CaseT]]:
    """Make a function a check whose findings change nothing."""
    return _check(code, Severity.NOTE)


def warning(code: str) -> Callable[[Callable[[CaseT], Iterable[Finding]]], Check[CaseT]]:
    """Make a function a check whose findings are worth knowing."""
    return _check(code, Severity.WARNING)
