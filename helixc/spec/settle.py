"""Going on after a value of the wrong type: it is read as what was probably meant, or set aside."""

from __future__ import annotations

from typing import Any

from helixc.diagnostics import Diagnostic
from helixc.spec.source import KeyPath, Source
from helixc.spec.validate import NOTHING, Violation, validate

PLACEHOLDER = "unknown"


def settle(source: Source) -> tuple[Source, list[Diagnostic], bool]:
    """(a source without violations of the schema, all findings, whether any value had to be set aside)."""
    findings: list[Diagnostic] = []
    incomplete = False
    while violations := validate(source):
        findings += [violation.diagnostic for violation in violations]
        incomplete = incomplete or any(violation.meant is NOTHING for violation in violations)
        source = _amended(source, violations)
    return source, findings, incomplete


def _amended(source: Source, violations: list[Violation]) -> Source:
    """Every violation's value replaced by what was meant; without that, the key is taken out."""
    data = _copy(source.data)
    for violation in violations:
        if violation.meant is not NOTHING:
            _parent(data, violation.path)[violation.path[-1]] = violation.meant
    gone = {_key_path(violation.path) for violation in violations if violation.meant is NOTHING}
    for path in gone:
        _parent(data, path).pop(path[-1], None)
    if ("model",) in gone:
        data["model"] = PLACEHOLDER  # the one required key; without a span, so that nobody takes it for the user's
    spans = {path: place for path, place in source.spans.items() if not any(path[: len(g)] == g for g in gone)}
    return Source(source.path, source.text, data, spans)


def _key_path(path: KeyPath) -> KeyPath:
    """The path up to the key whose list an item is in."""
    return path[: next((i for i, part in enumerate(path) if isinstance(part, int)), len(path))]


def _parent(data: Any, path: KeyPath) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
