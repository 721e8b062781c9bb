"""The short form `parallelism: ctx 2x tp2 / gen tp1 cp2`, with the place of every token inside the string."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from helixc.diagnostics import Diagnostic, Related, Span, closest
from helixc.spec import rules
from helixc.spec.source import LineTable, Source
from helixc_runtime.manifest import Role

ROLES: dict[str, Role] = {"ctx": "context", "gen": "generation"}
_LONG_ROLES = {"context": "ctx", "prefill": "ctx", "generation": "gen", "decode": "gen"}
SIZES = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "cp": "context_parallel_size",
    "ep": "moe_expert_parallel_size",
    "moe_tp": "moe_tensor_parallel_size",
}
ATTENTION_DP = "dp"
_MAX_SIZE = 65_536
# A size name apart from its number is one token, so that it is one mistake.
_TOKEN = re.compile(r"/|(?:moe_tp|tp|pp|cp|ep)\s+[0-9]+(?![^\s/])|[^\s/]+")
_SIZE = re.compile(r"([a-z_]+)([0-9]+)")
_COUNT = re.compile(r"([0-9]+)x")
_EXAMPLE = "for example `ctx tp2 / gen tp1 cp2`"


@dataclass(frozen=True, slots=True)
class Given:
    """A value that a token gives to a key of the long form."""

    value: int | bool
    token: str
    span: Span


@dataclass(frozen=True, slots=True)
class ShortForm:
    """What the string says of each role it names: `key of the long form -> Given`."""

    roles: Mapping[Role, Mapping[str, Given]]
    places: Mapping[Role, Span]  # of the words ctx and gen


EMPTY = ShortForm({}, {})


def parse_short_form(source: Source) -> tuple[ShortForm, list[Diagnostic]]:
    """The short form in `source` (EMPTY without one) and a finding for every token that is not understood."""
    text = source.data.get("parallelism")
    if not isinstance(text, str):
        return EMPTY, []
    parser = _Parser()
    tokens = list(_tokens(source, text))
    for token, span in tokens:
        parser.take(token, span)
    parser.finish(tokens[-1][1] if tokens else source.value_span(("parallelism",)))
    return ShortForm(parser.roles, parser.places), parser.findings


def _tokens(source: Source, text: str) -> Iterator[tuple[str, Span]]:
    """The tokens with their spans. A token that the file writes with escapes gets the span of the whole string."""
    whole = source.value_span(("parallelism",))
    table = LineTable.of(source.path, source.text)
    index, end = table.index(whole.line, whole.column), table.index(whole.end_line, whole.end_column)
    for match in _TOKEN.finditer(text):
        found = source.text.find(match[0], index, end)
        if found < 0:
            yield match[0], whole
            continue
        index = found + len(match[0])
        yield match[0], table.span(found, index)


class _Parser:
    """Takes tokens from left to right."""

    def __init__(self) -> None:
        self.roles: dict[Role, dict[str, Given]] = {}
        self.places: dict[Role, Span] = {}
        self.findings: list[Diagnostic] = []
        self._role: Role | None = None
        self._expects_role = True

    def fail(self, span: Span, message: str, help: str | None, related: tuple[Related, ...] = ()) -> None:
        self.findings.append(rules.BAD_PARALLELISM.at(span, message, help, related))

    def take(self, token: str, span: Span) -> None:
        if token == "/":
            self._slash(span)
        elif self._expects_role or token in ROLES:
            self._start_role(token, span)
        else:
            self._size(token, span)

    def finish(self, last: Span) -> None:
        """Report a role that is still expected after the last token."""
        if self._expects_role:
            self.fail(last, "a role is missing at the end" if self.places else "no role is described", _EXAMPLE)

    def _slash(self, span: Span) -> None:
        if self._expects_role:
            self.fail(span, "a role is missing before `/`", _EXAMPLE)
        self._expects_role = True

    def _start_role(self, token: str, span: Span) -> None:
        expected, self._expects_role = self._expects_role, False
        self._role = ROLES.get(token)
        if self._role is None:
            meant = _LONG_ROLES.get(token.lower()) or closest(token, ROLES)
            self._role = ROLES.get(meant or "")
            help = f"did you mean `{meant}`?" if meant else f"a role is ctx or gen, {_EXAMPLE}"
            self.fail(span, f"`{token}` is not a role", help)
        elif not expected:
            self.fail(span, f"`/` is missing before `{token}`", _EXAMPLE)
        if self._role in self.places:
            first = Related("first described here", self.places[self._role])
            self.fail(span, f"`{token}` is described twice", "join the two parts", (first,))
            self._role = None  # read on, but let its sizes count for nothing
        elif self._role is not None:
            self.places[self._role] = span
            self.roles[self._role] = {}

    def _size(self, token: str, span: Span) -> None:
        if token == ATTENTION_DP:
            self._give("enable_attention_dp", Given(True, token, span))
        elif count := _COUNT.fullmatch(token):
            self._give("num_instances", Given(_bounded(count[1]), token, span))
        elif (size := _SIZE.fullmatch(token)) and size[1] in SIZES:
            self._give(SIZES[size[1]], Given(_bounded(size[2]), token, span))
        else:
            self.fail(span, f"`{token}` is not understood", _advice(token))

    def _give(self, key: str, given: Given) -> None:
        least = 0 if key == "num_instances" and self._role == "context" else 1
        if not least <= given.value <= _MAX_SIZE:
            message = f"`{given.token}`: `{key}` must be at least {least} and at most {_MAX_SIZE}"
            self.findings.append(rules.OUT_OF_RANGE.at(given.span, message, "a size that is left out is 1"))
            return
        if self._role is None:
            return
        role = self.roles[self._role]
        if key in role:
            first = Related("first given here", role[key].span)
            self.fail(given.span, f"`{given.token}` gives `{key}` a second time", "keep one of the two", (first,))
        else:
            role[key] = given


def _bounded(digits: str) -> int:
    return int(digits) if len(digits) < 10 else _MAX_SIZE + 1


def _advice(token: str) -> str:
    """The likely correction of a token that is not understood."""
    lower = token.lower().strip(",;")
    pieces = re.findall(r"[a-z_]+|[0-9]+", lower)
    if len(pieces) == 2 and pieces[0] in SIZES:
        return f"did you mean `{pieces[0]}{pieces[1]}`?"
    if len(pieces) == 2 and pieces[1] in SIZES:
        return f"did you mean `{pieces[1]}{pieces[0]}`?"
    if len(pieces) == 2 and pieces[0] == "moe_ep":
        return f"did you mean `ep{pieces[1]}`?"
    if len(pieces) == 2 and pieces[0] == ATTENTION_DP:
        return f"attention data parallelism runs over the tp ranks: write `tp{pieces[1]} dp`"
    if pieces and len(pieces) % 2 == 0 and all(name in SIZES for name in pieces[::2]):
        glued = (name + size for name, size in zip(pieces[::2], pieces[1::2], strict=True))
        return f"put spaces between: `{' '.join(glued)}`"
    if lower in SIZES:
        return f"`{lower}` is directly followed by its size, for example `{lower}2`"
    if lower.isdigit():
        return f"write `{lower}x` for the number of instances, or put a size directly behind its name: `tp{lower}`"
    name = closest(pieces[0], SIZES) if pieces else None
    if name is not None and len(pieces) == 2:
        return f"did you mean `{name}{pieces[1]}`?"
    return "sizes are tp, pp, cp, ep and moe_tp, each directly followed by a number; instances are counted as in `2x`"
