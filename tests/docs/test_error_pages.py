"""docs/errors/: every code has a page, and every page shows what really happens.

A page begins with what the rule says. Then come files and commands with their output, and under `## Corrected` the
files without the mistake. `make golden` rewrites beginnings and outputs.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from helixc.cli import main
from helixc.error_pages import beginning, installed_root, page_root
from helixc.frontend import all_rules
from tests.docs.fences import ERROR_PAGES, ROOT
from tests.docs.shown import replayed, written

RULES = {rule.code: rule for rule in all_rules()}
_HEADING = "\n## Corrected\n"


def test_every_code_has_a_page_and_every_page_a_code() -> None:
    assert page_root() == ROOT / "docs" / "errors"
    assert [page.stem for page in ERROR_PAGES] == sorted(RULES)


def test_the_wheel_holds_the_pages_where_explain_looks_for_them() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "docs/errors" in wheel["only-include"]
    assert ROOT / wheel["sources"]["docs/errors"] == installed_root()


@pytest.mark.parametrize("code", sorted(RULES))
def test_a_page_shows_what_happens(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = page_root() / f"{code}.md"
    text = path.read_text(encoding="utf-8")
    example, heading, corrected = text.partition(_HEADING)
    assert heading, f"{path.name} has no section `## Corrected`"
    shown, runs = replayed(example[example.index("\n## ") :], tmp_path, capsys)
    assert runs, f"{path.name} shows no output"
    for run in runs:
        assert f"[{code}]" in run.output, f"{path.name}: its example does not have the finding"
        assert run.exit_code == (RULES[code].severity == "error" or "error[" in run.output)
    expected = beginning(RULES[code]) + shown + heading + corrected
    if os.environ.get("HELIXC_UPDATE_GOLDEN"):
        path.write_text(expected, encoding="utf-8")
    else:
        assert text == expected
    _passes(corrected, runs[0].command, tmp_path, capsys)


def _passes(corrected: str, command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The corrected files have no finding, under the options of the example's command."""
    files = [name for name in written(corrected, folder) if name.endswith((".yaml", ".yml"))]
    assert files, "no corrected file is shown"
    options = [word for word in command.split()[3:] if word.startswith("-")]
    dialect = ["--dialect", "trtllm"] if "--dialect trtllm" in command else []
    options = [*dialect, *(o for o in options if o != "--dialect")]
    capsys.readouterr()
    assert main(["check", *options, *files]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.startswith("no problems in ")
