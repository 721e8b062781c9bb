"""A composed YAML document as plain data, with a span for every key and value."""

from __future__ import annotations

from typing import Any

from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode, SequenceNode

from helixc.diagnostics import Diagnostic, Related, Rule, Span
from helixc.spec import rules
from helixc.spec.core_schema import TAG, fits, typed
from helixc.spec.source import KeyPath, LineTable, Place

MAX_VALUES = 10_000  # a bound on what aliases may expand to
MAX_DIGITS = 30


class Unbounded(Exception):
    """Aliases expand to more than MAX_VALUES values."""


class Builder:
    """Turns composed nodes into data, and collects spans and findings on the way."""

    def __init__(self, table: LineTable) -> None:
        self.table = table
        self.spans: dict[KeyPath, Place] = {}
        self.findings: list[Diagnostic] = []
        self._built = 0
        self._open: set[int] = set()  # nodes being built, to notice an alias inside its own anchor

    def build(self, node: Node, path: KeyPath, key: Span | None = None) -> Any:
        """The data of `node`, whose span is noted under `path`. Raises Unbounded."""
        self._built += 1
        if self._built > MAX_VALUES:
            raise Unbounded
        self.spans[path] = Place(key, self._span(node))
        if id(node) in self._open:
            self._report(rules.BAD_ALIAS, node, "this alias stands inside what it names", "write the value out")
            return None
        if not isinstance(node, CollectionNode):
            return self._scalar(node)
        self._open.add(id(node))
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, path)
            self._check_tag(node, "seq")
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        finally:
            self._open.remove(id(node))

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        self._check_tag(node, "map")
        data: dict[str, Any] = {}
        merged: list[Node] = []
        for key, value in node.value:
            if key.tag == TAG + "merge":
                merged.append(value)
            elif (name := self._new_text_key(key, path, data)) is not None:
                data[name] = self.build(value, (*path, name), self._span(key))
        for value in merged:
            self._merge(value, path, data)
        return data

    def _new_text_key(self, key: Node, path: KeyPath, data: dict[str, Any]) -> str | None:
        """The text of `key`, None with a finding if it is no text or given already."""
        if not isinstance(key, ScalarNode) or key.tag != TAG + "str":
            shown = f"`{key.value}`" if isinstance(key, ScalarNode) else "a list or mapping"
            self._report(rules.KEY_NOT_TEXT, key, f"{shown} is used as a key, but keys are words", "use a known key")
            return None
        name = self._text(key)
        if name not in data:
            return name
        first = self.spans[(*path, name)].key
        assert first is not None
        message = f"`{name}` is given twice (first in line {first.line})"
        related = [Related("first given here", first)]
        self.findings.append(rules.DUPLICATE_KEY.at(self._span(key), message, "remove one of the two", related))
        return None

    def _merge(self, value: Node, path: KeyPath, data: dict[str, Any]) -> None:
        """Add what `<<` brings; keys already there win, and earlier mappings of a list win over later ones."""
        if isinstance(value, SequenceNode) and id(value) not in self._open:
            self._open.add(id(value))
            for item in value.value:
                self._merge(item, path, data)
            self._open.remove(id(value))
        elif not isinstance(value, MappingNode) or id(value) in self._open:
            self._report(rules.BAD_ALIAS, value, "`<<` merges a mapping or a list of mappings", "write the keys out")
        else:
            scratch = Builder(self.table)
            scratch._built, scratch._open = self._built, self._open
            brought = scratch.build(value, path)
            self._built = scratch._built
            self.findings += scratch.findings
            new = brought.keys() - data.keys()
            data |= {key: brought[key] for key in new}
            depth = len(path)
            self.spans |= {p: place for p, place in scratch.spans.items() if len(p) > depth and p[depth] in new}

    def _scalar(self, node: Node) -> Any:
        text = self._text(node)
        kind = node.tag.removeprefix(TAG)
        if kind in ("str", "merge"):
            return text
        if not fits(kind, text):
            self._report(rules.BAD_TAG, node, f"`{text}` cannot be read as {self._shown_tag(node)}", "remove the tag")
            return None
        if kind == "int" and len(text) > MAX_DIGITS:
            self._report(rules.OUT_OF_RANGE, node, f"a number of {len(text)} digits", "no key takes such a number")
            return None
        return typed(kind, text)

    def _check_tag(self, node: Node, kind: str) -> None:
        if node.tag != TAG + kind:
            self._report(rules.BAD_TAG, node, f"the tag {self._shown_tag(node)} is not known here", "remove the tag")

    def _text(self, node: Node) -> str:
        """The text of a scalar, as JSON reads it: two escapes that are halves of a character are that character."""
        text = str(node.value)
        if not any("\ud800" <= character <= "\udfff" for character in text):
            return text
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if joined != text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore"):
            self._report(rules.NOT_TEXT, node, "an escape names half a surrogate pair", "write the character itself")
        return joined

    def _shown_tag(self, node: Node) -> str:
        return node.tag.replace(TAG, "!!")

    def _report(self, rule: Rule, node: Node, message: str, help: str) -> None:
        self.findings.append(rule.at(self._span(node), message, help))

    def _span(self, node: Node) -> Span:
        return self.table.span(node.start_mark.index, _end(node))


def _end(node: Node) -> int:
    """Index after the node's last character: a block collection's own mark lies at the next token, comments later."""
    if isinstance(node, CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)
