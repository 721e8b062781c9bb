"""YAML text -> Source. Every mistake is a finding with a place; what can be read is read."""

from __future__ import annotations

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from helixc.diagnostics import Diagnostic, Span
from helixc.spec import rules
from helixc.spec.core_schema import Loader
from helixc.spec.source import LineTable, Source
from helixc.spec.yaml_errors import syntax_error
from helixc.spec.yaml_tree import MAX_VALUES, Builder, Unbounded


def parse_yaml(file: str, text: str) -> tuple[Source | None, list[Diagnostic]]:
    """The document in `text`. Findings that leave the rest readable (such as a duplicate key) come with a Source."""
    table = LineTable.of(file, text)
    try:
        root, second = _compose(text)
        if second is not None:
            span = table.span(second.start_mark.index, second.start_mark.index)
            return None, [rules.SEVERAL_DOCUMENTS.at(span, "a second document starts here", "split the file in two")]
        if not isinstance(root, MappingNode):
            return None, [_no_mapping(table, root)]
        builder = Builder(table)
        data = builder.build(root, ())
    except (yaml.YAMLError, ValueError) as error:
        return None, [syntax_error(table, error)]
    except RecursionError:
        return None, [rules.YAML_SYNTAX.at(Span.start_of(file), "brackets or mappings are nested too deeply")]
    except Unbounded:
        message = f"aliases expand to more than {MAX_VALUES:,} values"
        return None, [rules.BAD_ALIAS.at(Span.start_of(file), message, "write the values out")]
    source = Source(file, text, data, builder.spans) if isinstance(data, dict) else None
    return source, builder.findings


def _compose(text: str) -> tuple[Node | None, Node | None]:
    loader = Loader(text)
    documents: list[Node | None] = []
    while len(documents) < 2 and loader.check_node():
        documents.append(loader.get_node())
    return documents[0] if documents else None, documents[1] if len(documents) > 1 else None


def _no_mapping(table: LineTable, root: Node | None) -> Diagnostic:
    help = "start with `model: ...`; `helixc explain HX006` shows a minimal file"
    if root is None or (isinstance(root, ScalarNode) and root.value == ""):
        return rules.NOT_A_MAPPING.at(Span.start_of(table.file), "the file is empty", help)
    kind = "list" if isinstance(root, SequenceNode) else "single value"
    span = table.span(root.start_mark.index, root.start_mark.index + 1)
    return rules.NOT_A_MAPPING.at(span, f"the file is a {kind}, not keys with values", help)
