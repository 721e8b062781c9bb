"""PyYAML's exceptions as findings, with advice on the frequent ones."""

from __future__ import annotations

import re

import yaml
from yaml.reader import ReaderError

from helixc.diagnostics import Diagnostic, Related, Span
from helixc.spec import rules
from helixc.spec.source import LineTable

_GLUED = re.compile(
    r"[ \t]*(?P<pair>(?P<key>[A-Za-z_]\w*):(?P<value>[^\s:/#\[{&*|>'\"][^\s#]*))[ \t]*(?:#.*)?$", re.MULTILINE
)
_ADVICE = (
    ("cannot start any token", "quote the text, or remove the character"),
    ("mapping values are not allowed", "quote a text that holds `: `, or check this line's indentation"),
    ("could not find expected ':'", "a key is followed by a colon and a space: `key: value`"),
    ("expected <block end>", "lines of one mapping start in the same column"),
    ("expected ',' or", "close the bracket, or separate the entries by commas"),
    ("found undefined alias", "define it first: `key: &name value`"),
    ("found duplicate anchor", "give each anchor its own name"),
    ("end of stream", "close the quote"),
)


def syntax_error(table: LineTable, error: Exception) -> Diagnostic:
    """What stopped PyYAML's reader, scanner, parser or composer. Any other ValueError comes from a quoted escape."""
    if isinstance(error, ReaderError):
        message = f"the control character U+{error.character:04X} is not allowed"
        span = table.span(error.position, error.position)
        return rules.NOT_TEXT.at(span, message, "remove it")
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return rules.YAML_SYNTAX.at(Span.start_of(table.file), f"a quoted text holds an impossible escape: {error}")
    problem, mark, context = error.problem or "not valid YAML", error.problem_mark, error.context_mark
    if problem.startswith(("mapping values are not", "could not find expected ':'")):
        glued = _glued(table, mark.index)
        if glued is not None:
            return glued
    if problem == "second occurrence" and error.context:  # PyYAML says what it is about in the context only
        problem, error.context = error.context.partition(";")[0], "first occurrence"
    help = next((advice for part, advice in _ADVICE if part in problem), None)
    if r"'\t'" in problem:
        problem, help = "a tab stands where YAML wants spaces", "indent and separate by spaces"
    elif "end of stream" in problem and context is not None:
        problem, mark, context = "this is never closed", context, None
    related = []
    if context is not None and error.context and context.index != mark.index:
        related.append(Related(error.context, table.span(context.index, context.index)))
    return rules.YAML_SYNTAX.at(table.span(mark.index, mark.index), problem, help, related)


def _glued(table: LineTable, index: int) -> Diagnostic | None:
    """A key without a space after its colon: the scanner takes it for text and stops only at the next key."""
    line = table.span(index, index).line
    for number in (line, line - 1):
        if number < 1:
            continue
        start = table.starts[number - 1]
        match = _GLUED.match(table.text, start)
        if match is not None and ": " not in match[0]:
            span = table.span(match.start("pair"), match.end("pair"))
            help = f"write `{match['key']}: {match['value'].rstrip()}`"
            return rules.YAML_SYNTAX.at(span, "a space is missing after the colon", help)
    return None
