"""docs/errors/: every code has a page, and every page shows what really happens.

A page begins with what the rule says. Then come files (a fenced block each; the words after the language are the file's
name and its encoding), commands with their output, and under `## Corrected` the files without the mistake.
`make golden` rewrites beginnings and outputs.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from helixc.cli import main
from helixc.error_pages import beginning, page_root
from helixc.frontend import all_rules
from tests.docs.fences import ERROR_PAGES, ROOT

RULES = {rule.code: rule for rule in all_rules()}
CODES = sorted(RULES)
HOME = "/home/you"  # stands for the folder in which a page's commands run
_BLOCK = re.compile(r"^```(\w+)[ \t]*(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = "\n## Corrected\n"


def test_every_code_has_a_page_and_every_page_a_code() -> None:
    assert page_root() == ROOT / "docs" / "errors"
    assert [page.stem for page in ERROR_PAGES] == CODES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", CODES)
def test_a_page_shows_what_happens(code: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = page_root() / f"{code}.md"
    text = path.read_text(encoding="utf-8")
    example, heading, corrected = text.partition(_HEADING)
    assert heading, f"{path.name} has no section `## Corrected`"

    def rerun(block: re.Match[str]) -> str:
        if block[1] != "console":
            write(folder, block)
            return block[0]
        command = block[3].splitlines()[0]
        assert command.startswith("$ helixc check "), command
        capsys.readouterr()
        exit_code = main(command.removeprefix("$ helixc ").split())
        assert exit_code == (RULES[code].severity == "error" or "--strict" in command)
        output = capsys.readouterr().out.replace(str(folder), HOME)
        assert f"[{code}]" in output, f"{path.name}: its example does not have the finding"
        return f"```console\n{command}\n{output}```"

    rest = example[example.index("\n## ") :]
    expected = beginning(RULES[code]) + _BLOCK.sub(rerun, rest) + heading + corrected
    if os.environ.get("HELIXC_UPDATE_GOLDEN"):
        path.write_text(expected, encoding="utf-8")
    else:
        assert text == expected
    written = [write(folder, block) for block in _BLOCK.finditer(corrected)]
    files = [name for name in written if name.endswith(".yaml")]
    assert files, f"{path.name} shows no corrected file"
    capsys.readouterr()
    assert main(["check", "--strict", *files]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.startswith("no problems in ")


def write(folder: Path, block: re.Match[str]) -> str:
    """Write the file that a block shows; its name."""
    name, encoding = [*block[2].split(), "utf-8"][:2]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block[3], encoding=encoding, newline="")
    return name
