"""`helixc check` and `helixc explain` from the shell: formats, exit codes, start-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helixc.cli import main

SPECS = Path(__file__).parent / "specs"
ROOT = Path(__file__).parents[2]
BROKEN = 'model: llama-3.1-8b\nload_format: dummy\nparallelism: "gen tp8 cp3"\nmax_batch_sizes: 3\n'


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("a b,c.yaml")
    path.write_text(BROKEN, encoding="utf-8")
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")])}
    command = [sys.executable, "-m", "helixc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_a_clean_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(SPECS / "long.yaml")]) == 0
    assert capsys.readouterr().out == "no problems in 1 file\n"


def test_text_shows_carets(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(broken)]) == 1
    out = capsys.readouterr().out
    expected = """error[HX301]: 32 query heads do not divide over tp 8 x cp 3 = 24 ranks of generation_servers
  --> a b,c.yaml:3:23
   3 | parallelism: "gen tp8 cp3"
     |                       ^^^
  --> a b,c.yaml:3:19
   3 | parallelism: "gen tp8 cp3"
     |                   ^^^ tp is given here
  = help: with tp 8, choose cp among 1, 2 or 4

error[HX101]: unknown key `max_batch_sizes`
  --> a b,c.yaml:4:1
   4 | max_batch_sizes: 3
     | ^^^^^^^^^^^^^^^
  = help: did you mean `max_batch_size`?

2 errors in 1 file
"""
    assert out == expected


def test_carets_stand_under_wide_characters_and_tabs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wide.yaml"
    path.write_text('{"model": "模\t型", "seed": -1, generation_servers: {}}', encoding="utf-8")
    assert main(["check", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    under = [lines[number + 1] for number, line in enumerate(lines) if line.startswith("   1 |")]
    assert under[1] == f"     | {' ' * 13}\t{' ' * 13}^^"
    assert under[0].startswith(f"     | {' ' * 10}^^")


def test_json_has_the_contract_s_keys(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(broken), "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    keys = ["code", "severity", "message", "file", "line", "column", "end_line", "end_column", "help"]
    keys += ["related", "notes"]
    assert [list(entry) for entry in found] == [keys, keys]
    place = [found[0][key] for key in ("code", "severity", "file", "line", "column", "end_line", "end_column")]
    assert place == ["HX301", "error", "a b,c.yaml", 3, 23, 3, 26]
    assert main(["check", str(SPECS / "long.yaml"), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_github_annotations_are_escaped(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(broken), "--format", "github"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "::error file=a b%2Cc.yaml,line=3,endLine=3,col=23,endColumn=26,title=HX301::32 query heads"
    )
    assert second.endswith("%0Ahelp: did you mean `max_batch_size`?")


def test_sarif_refers_to_its_rules(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(broken), str(SPECS / "long.yaml"), "--format", "sarif"]) == 1
    log = json.loads(capsys.readouterr().out)
    (only_run,) = log["runs"]
    rules = only_run["tool"]["driver"]["rules"]
    assert log["version"] == "2.1.0"
    assert [rules[r["ruleIndex"]]["id"] for r in only_run["results"]] == ["HX301", "HX101"]
    location = only_run["results"][0]["locations"][0]["physicalLocation"]
    assert location["artifactLocation"]["uri"] == "a%20b%2Cc.yaml"
    assert location["region"] == {"startLine": 3, "startColumn": 23, "endLine": 3, "endColumn": 26}
    assert only_run["results"][0]["relatedLocations"][0]["message"]["text"] == "tp is given here"


def test_all_files_are_checked(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "missing.yaml", str(broken), str(SPECS / "long.yaml")]) == 1
    out = capsys.readouterr().out
    assert "missing.yaml does not exist" in out
    assert out.endswith("3 errors in 3 files\n")


def test_warnings_do_not_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("model: qwen3-8b\nparallelism: gen cp2\n")
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out.endswith("1 warning in 1 file\n")


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "hx301"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "# HX301: The query heads do not divide over tp * cp\n\nSeverity: error.\n\nBefore the exchange"
    )
    assert "$ helixc check deployment.yaml\nerror[HX301]" in out
    assert main(["explain", "HX3001"]) == 2
    assert "did you mean HX" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["chek"],
        ["check"],
        ["check", "f.yaml", "--format", "xml"],
        ["compile", "f.yaml", "--arch", "sm_1"],
        ["launch", "f.yaml", "--max-tokens", "0"],
        ["launch", "f.yaml", "--top-p", "1.5"],
        ["launch", "f.yaml", "--prompt", "a", "--prompts", "b"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: helixc")


def test_python_m_helixc_imports_nothing_heavy() -> None:
    result = run("check", str(SPECS / "long.yaml"))
    assert (result.returncode, result.stdout) == (0, "no problems in 1 file\n"), result.stderr
    script = (
        "import sys; from helixc.cli import main; code = main(['check', sys.argv[1]]);"
        "print(code, sorted({'torch', 'jinja2', 'numpy', 'cuda'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")])}
    command = [sys.executable, "-c", script, str(SPECS / "long.yaml")]
    listed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
    assert listed.stdout.splitlines()[-1] == "0 []"


def test_the_launcher_s_command_line_needs_no_compiler_packages() -> None:
    script = (
        "import sys; from helixc.cli import main; code = main(['launch', sys.argv[1], '--prompt', 'x']);"
        "print(code, sorted({'torch', 'jinja2', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")])}
    command = [sys.executable, "-c", script, str(SPECS)]  # a folder, but no artifact
    listed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
    assert listed.stdout.splitlines()[-1] == "2 []"
