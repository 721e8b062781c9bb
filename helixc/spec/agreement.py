"""Values that may be given in several places and must then agree."""

from __future__ import annotations

from collections.abc import Iterator

from helixc.diagnostics import Diagnostic, Related
from helixc.spec import rules
from helixc.spec.origin import ROLES, Origins, section_name
from helixc.spec.source import KeyPath, Source

DEFAULT_BLOCK = 32


def contradictions(origins: Origins) -> Iterator[Diagnostic]:
    """Values of the short form that the long form, in a section or at the top level, gives differently."""
    source = origins.source
    for role in ROLES:
        for key, given in origins.short.roles.get(role, {}).items():
            path = origins.path(role, key)
            if path is None or value_at(source, path) == given.value:
                continue
            written = ".".join(map(str, path))
            message = f"`{given.token}` contradicts `{written}: {_shown(value_at(source, path))}`"
            equal = f"{key}: {_shown(given.value)}"
            help = f"for {section_name(role)}, remove one of the two, or make them equal: `{equal}`"
            related = [Related("the long form's value", source.value_span(path))]
            yield rules.CONTRADICTION.at(given.span, message, help, related)


def block_size(origins: Origins) -> tuple[int, list[Diagnostic]]:
    """tokens_per_block of the whole deployment, and a finding for every place that disagrees with the first."""
    source = origins.source
    paths: dict[KeyPath, None] = {}
    for role in reversed(ROLES):  # generation instances first: they are what Helix is about
        if origins.describes(role):
            for config in ("cp_config", "kv_cache_config"):
                path = origins.path(role, config, "tokens_per_block")
                if path is not None:
                    paths[path] = None
    if not paths:
        return DEFAULT_BLOCK, []
    first, *others = paths
    block = value_at(source, first)
    assert isinstance(block, int)
    findings = []
    for path in others:
        if value_at(source, path) != block:
            message = f"`{_dotted(path)}` is {value_at(source, path)}, but `{_dotted(first)}` is {block}"
            related = [Related("the other value", source.value_span(first))]
            help = (
                f"all instances use one block size: give it once, as `kv_cache_config: {{tokens_per_block: {block}}}`"
            )
            findings.append(rules.BLOCK_SIZES_DIFFER.at(source.value_span(path), message, help, related))
    return block, findings


def share_gpus(source: Source) -> tuple[bool, list[Diagnostic]]:
    """share_gpus from the top level or from hardware, and a finding if the two differ (True then: it needs less)."""
    top, inner = ("share_gpus",), ("hardware", "share_gpus")
    given = [path for path in (top, inner) if path in source.spans]
    values = {value_at(source, path) for path in given}
    if len(values) < 2:
        return values == {True}, []
    related = [Related("the other value", source.value_span(top))]
    message = "`hardware.share_gpus` and `share_gpus` disagree"
    return True, [rules.SHARING_DIFFERS.at(source.value_span(inner), message, "give it once", related)]


def value_at(source: Source, path: KeyPath) -> object:
    """The value at a path that the file gives."""
    value: object = source.data
    for key in path:
        assert isinstance(value, dict)
        value = value[key]
    return value


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _shown(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
