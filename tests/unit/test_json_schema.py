"""`helixc schema`: fit for an editor, and of one mind with `helixc check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from helixc.cli import main
from helixc.spec.schema import Document
from tests.docs.fences import ROOT

EXAMPLES = [*sorted((ROOT / "examples").glob("*.yaml")), ROOT / "tests" / "unit" / "specs" / "long.yaml"]


@pytest.fixture
def schema(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["schema"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def properties(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        yield from node.get("properties", {}).items()
        for value in node.values():
            yield from properties(value)


def test_every_key_has_a_type_and_a_description(schema: dict[str, Any]) -> None:
    keys = dict(properties(schema))
    assert set(Document.model_fields) <= set(keys)
    for key, value in keys.items():
        assert len(value["description"]) > 10, key
        assert "type" in value or "$ref" in value, key
    assert "anyOf" not in json.dumps(schema) and "null" not in json.dumps(schema)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.name)
def test_deployments_conform(file: Path, schema: dict[str, Any]) -> None:
    jsonschema.validate(yaml.safe_load(file.read_text()), schema)


@pytest.mark.parametrize(
    "change",
    [
        {"max_batch_size": "2"},
        {"max_batch_sizes": 2},
        {"parallelism": "tp2"},
        {"hardware": {"gpu": "H100"}},
        {"generation_servers": {"tensor_parallel_size": 0}},
        {"cp_config": {"cp_type": "RING"}},
        {"dtype": "fp8"},
        {"kv_cache_config": {"dtype": "fp8_e5m2"}},
    ],
)
def test_what_check_refuses_does_not_conform(change: dict[str, Any], schema: dict[str, Any]) -> None:
    sound = {"model": "llama-3.1-8b", "parallelism": "ctx tp2 / gen tp1 cp2"}
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(sound)
    assert validator.is_valid(sound | {"kv_cache_config": {"dtype": "fp8"}})
    assert not validator.is_valid(sound | change)
