"""The core schema of YAML 1.2 (which plain text is a number, a truth value or null) and a loader that follows it."""

from __future__ import annotations

import re
from typing import Any

from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

TAG = "tag:yaml.org,2002:"
_PATTERNS = (
    ("null", re.compile(r"~|null|Null|NULL|")),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")),
    ("float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")),
    ("merge", re.compile(r"<<")),
)


class _Resolver(BaseResolver):
    """Types of plain scalars by the core schema; PyYAML's own resolver follows YAML 1.1 (no: false, 010: 8)."""

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> str:
        if kind is MappingNode:
            return TAG + "map"
        if kind is SequenceNode:
            return TAG + "seq"
        if implicit[0]:
            return TAG + next((name for name, pattern in _PATTERNS if pattern.fullmatch(value)), "str")
        return TAG + "str"


class Loader(Reader, Scanner, Parser, Composer, _Resolver):
    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)


def fits(kind: str, text: str) -> bool:
    """Whether `text` is a `kind` (null, bool, int, float); any other kind is unknown and fits nothing."""
    patterns = dict(_PATTERNS)
    return kind in patterns and any(patterns[k].fullmatch(text) for k in ({"int", kind} if kind == "float" else {kind}))


def typed(kind: str, text: str) -> Any:
    """The value of a `text` that fits `kind`."""
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)
    if text[-3:].lower() in ("inf", "nan"):
        return float(text.replace(".", ""))
    return float(text)
