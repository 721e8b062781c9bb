"""The job of docs/ci.md and .pre-commit-hooks.yaml do what they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from helixc.cli import main
from tests.docs.fences import ROOT

CLEAN = "model: llama-3.1-8b\nload_format: dummy\nparallelism: gen tp1 cp2\n"
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yml ?(.*?)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def deployments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "deployments" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text(CLEAN)
    return folder


def test_the_job_fails_on_a_warning_and_on_nothing_to_check(deployments: Path) -> None:
    job = yaml.safe_load(dict(BLOCKS)[".github/workflows/deployments.yml"])
    (command,) = (s["run"] for s in job["jobs"]["check"]["steps"] if s.get("run", "").startswith("helixc "))
    arguments = shlex.split(command)[1:]
    assert main(arguments) == 0
    (deployments / "b.yaml").write_text(CLEAN.replace("load_format: dummy\n", ""))
    assert main(arguments) == 1
    for file in deployments.glob("*.yaml"):
        file.unlink()
    assert main(arguments) == 1


def test_sarif_is_written(deployments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (steps,) = (yaml.safe_load(text) for name, text in BLOCKS if not name)
    command = shlex.split(steps[0]["run"].partition(" > ")[0])
    assert main(command[1:]) == 0
    assert '"version": "2.1.0"' in capsys.readouterr().out


def test_the_pre_commit_hook(deployments: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    config = yaml.safe_load(dict(BLOCKS)[".pre-commit-config.yaml"])
    assert [h["id"] for h in config["repos"][0]["hooks"]] == [hook["id"]]
    assert hook["language"] == "python" and hook["types"] == ["yaml"]
    assert re.search(hook["files"], "deployments/deep/a.yaml") and not re.search(hook["files"], ".github/a.yaml")
    entry = shlex.split(hook["entry"])
    assert entry[0] == "helixc"
    assert main([*entry[1:], "deployments/deep/a.yaml"]) == 0
    (deployments / "a.yaml").write_text(CLEAN + "max_batchsize: 1\n")
    assert main([*entry[1:], "deployments/deep/a.yaml"]) == 1
