"""The JSON Schema of deployment files, for completion, hover and checking in editors."""

from __future__ import annotations

from typing import Any

from helixc.model.builtin import builtin_names
from helixc.spec.schema import Document

ID = "https://json-schema.org/draft/2020-12/schema"
_SHORT_FORM = r"^\s*(ctx|gen)(\s+[^/\s]+)*(\s*/\s*(ctx|gen)(\s+[^/\s]+)*)?\s*$"


def json_schema() -> dict[str, Any]:
    """A schema of draft 2020-12. Every key has a description; a key that may be absent is not one that may be null."""
    schema = _tidied(Document.model_json_schema())
    head = {"$schema": ID, "title": "helixc deployment", "description": "A Helix-parallel deployment for helixc."}
    properties = schema["properties"]
    properties["model"]["examples"] = [*builtin_names(), "../checkpoints/my-model"]
    properties["parallelism"] |= {
        "pattern": _SHORT_FORM,
        "examples": ["ctx tp2 / gen tp1 cp2", "ctx 2x tp8 pp2 / gen tp1 cp8 ep8"],
    }
    _cp_config(schema)["cp_type"]["enum"] = ["HELIX", "helix", "Helix"]
    return head | {key: value for key, value in schema.items() if key not in head}


def _cp_config(schema: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = schema["$defs"]["CpConfig"]["properties"]
    return properties


def _tidied(node: Any, *, names: bool = False) -> Any:
    """Without titles, null alternatives and empty defaults. `names`: the keys of `node` are names, not the schema's."""
    if isinstance(node, list):
        return [_tidied(item) for item in node]
    if not isinstance(node, dict):
        return node
    if names:
        return {key: _tidied(value) for key, value in node.items()}
    node = dict(node)
    alternatives = [a for a in node.pop("anyOf", []) if a != {"type": "null"}]
    assert len(alternatives) < 2, "a union in the deployment schema: say here how an editor should see it"
    node |= alternatives[0] if alternatives else {}
    for key, dropped in (("title", None), ("default", (None, "", {}))):
        if key in node and (dropped is None or node[key] in dropped or isinstance(node[key], dict)):
            del node[key]
    return {key: _tidied(value, names=key in ("properties", "$defs")) for key, value in node.items()}
