"""Schema violations as findings in the words of a deployment file."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from helixc.diagnostics import Diagnostic, Rule, closest, listed
from helixc.spec import rules
from helixc.spec.schema import DTYPE_ALIASES, Document
from helixc.spec.source import KeyPath, LineTable, Source

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list such as [16, 16]",
    "model_type": "a mapping of keys to values",
}
_LIMITS = {
    "greater_than_equal": ("ge", "at least", "write {} or more"),
    "greater_than": ("gt", "greater than", "write a number above {}"),
    "less_than_equal": ("le", "at most", "write {} or less"),
}
_TRUTH_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


NOTHING = object()  # no value is known to be meant


@dataclass(frozen=True, slots=True)
class Violation:
    """A value against the schema, and the value that was probably meant, or NOTHING."""

    path: KeyPath
    diagnostic: Diagnostic
    meant: object


def validate(source: Source) -> list[Violation]:
    """Every violation of the schema in `source`, whose keys are known already."""
    try:
        Document.model_validate(source.data)
    except ValidationError as error:
        return [_violation(source, details) for details in error.errors(include_url=False)]
    return []


def _violation(source: Source, details: ErrorDetails) -> Violation:
    path: KeyPath = details["loc"]
    name = ".".join(str(part) for part in path if isinstance(part, str))
    rule, message, help = _described(name, details)
    meant = NOTHING if details["type"] == "missing" else _meant(details)
    if meant is not NOTHING:
        help = f"did you mean `{meant}`?" if isinstance(meant, str) else f"write {shown(meant)}"
        help += ", without quotes" if _is_quoted(source, path) and not isinstance(meant, str) else ""
    return Violation(path, rule.at(source.value_span(path), message, help), meant)


def _is_quoted(source: Source, path: KeyPath) -> bool:
    span = source.value_span(path)
    return LineTable.of(source.path, source.text).at(span)[:1] in ("'", '"')


def _described(name: str, details: ErrorDetails) -> tuple[Rule, str, str]:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "missing":
        return rules.MISSING_KEY, f"`{name}` is missing", f"add `{name}: ...`"
    if kind == "literal_error":
        choices = listed(_choices(details))
        return rules.BAD_CHOICE, f"`{name}` must be {choices}, not {shown(value)}", f"write {choices}"
    if kind in _LIMITS:
        key, words, way_out = _LIMITS[kind]
        limit = f"{context[key]:g}" if isinstance(context[key], float) else str(context[key])
        message = f"`{name}` must be {words} {limit}, not {shown(value)}"
        return rules.OUT_OF_RANGE, message, way_out.format(limit)
    if kind == "finite_number":
        return rules.OUT_OF_RANGE, f"`{name}` must be a finite number, not {shown(value)}", "write a number"
    if kind == "string_too_short":
        return rules.OUT_OF_RANGE, f"`{name}` is empty", "give a value"
    assert kind in _EXPECTED, details
    help = "give a value, or remove the key" if value is None else f"write {_EXPECTED[kind]}"
    return rules.WRONG_TYPE, f"`{name}` must be {_EXPECTED[kind]}, not {shown(value)}", help


def _choices(details: ErrorDetails) -> list[str]:
    return str(details["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")


def _meant(details: ErrorDetails) -> object:
    """The value of the right type that `input` looks like."""
    kind, value = details["type"], details["input"]
    if kind == "literal_error" and isinstance(value, str):
        return _choice(value, _choices(details)) or NOTHING
    if kind == "bool_type" and isinstance(value, str):
        return _TRUTH_WORDS.get(value.lower(), NOTHING)
    if kind == "int_type" and isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    if kind in ("int_type", "float_type") and isinstance(value, str):
        return _number(value.replace("_", "").replace(",", "").strip(), kind)
    return NOTHING


def _choice(text: str, choices: list[str]) -> str | None:
    """Another number is another thing: fp4 is no misspelt fp8, nor h20 an h200."""
    if (name := DTYPE_ALIASES.get(text.lower().removeprefix("torch."))) in choices:
        return name
    digits = re.findall(r"\d+", text)
    return closest(text, [c for c in choices if not digits or re.findall(r"\d+", c) == digits])


def _number(text: str, kind: str) -> object:
    if re.fullmatch(r"[0-9]{1,18}", text):
        return int(text)
    if kind == "float_type" and re.fullmatch(r"[0-9]{0,9}\.[0-9]{1,9}", text):
        return float(text)
    return NOTHING


def shown(value: Any) -> str:
    """A YAML value with its type, for messages."""
    if value is None:
        return "an empty value"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'the text "{value if len(value) <= 60 else value[:57] + "..."}"'
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else str(value)
