"""Which files a command line names: paths, patterns such as `configs/**/*.yaml`, and `-` for the standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from helixc.diagnostics import Diagnostic, Span
from helixc.spec import rules
from helixc.spec.source import decode, read_text

STDIN = "-"
STDIN_NAME = "<stdin>"


@dataclass(frozen=True, slots=True)
class Input:
    """One file to analyse, or the reason why it has no text."""

    file: str
    text: str | None
    findings: tuple[Diagnostic, ...] = ()


def inputs(arguments: Iterable[str]) -> Iterator[Input]:
    """Every file that `arguments` name, once, in their order; the files of a pattern are sorted."""
    for file in dict.fromkeys(name for argument in arguments for name in _names(argument)):
        yield read_input(file)


def read_input(file: str) -> Input:
    """The text of one file, of the standard input for `-`. Never raises for a user's mistake."""
    if file == STDIN:
        text, findings = decode(STDIN_NAME, sys.stdin.buffer.read())
        return Input(STDIN_NAME, text, tuple(findings))
    if _is_pattern(file):  # _names has replaced every pattern that matches something
        message = f"no file matches {file}"
        help = "check the pattern; `**` stands for any number of folders"
        return Input(file, None, (rules.UNREADABLE.at(Span.start_of(file), message, help),))
    text, findings = read_text(file)
    return Input(file, text, tuple(findings))


def _names(argument: str) -> list[str]:
    """What a pattern matches; anything else, and a pattern that matches nothing, as it is."""
    if not _is_pattern(argument):
        return [argument]
    return sorted(path for path in glob.glob(argument, recursive=True) if os.path.isfile(path)) or [argument]


def _is_pattern(argument: str) -> bool:
    """A file whose name holds a bracket or a star is that file."""
    return glob.has_magic(argument) and not os.path.exists(argument)
