"""What README.md and docs/ show is run: deployments, commands, Python, links, options, module names."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from examples import smollm2
from tests.docs.fences import PAGES, ROOT, Block, blocks

VERBS = ("check", "compile", "plan", "launch", "explain", "init", "schema")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def helixc(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "helixc", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def deployments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder beside the checkpoint that the pages name."""
    smollm2.convert(smollm2.DEFAULT_OUT)
    root = tmp_path_factory.mktemp("pages")
    (root / "checkpoints").mkdir()
    (root / "checkpoints" / smollm2.DEFAULT_OUT.name).symlink_to(smollm2.DEFAULT_OUT)
    (root / "examples").mkdir()
    return root / "examples"


# --- Deployments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_a_deployment_passes_check(block: Block, deployments: Path) -> None:
    assert block.marks[:1] == ("check",), f"{block}: mark the block ```yaml check, so that it stays right"
    file = deployments / f"{block.page.stem}-{block.line}.yaml"
    file.write_text(block.text)
    result = helixc("check", str(file), "--format", "json")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")


@pytest.mark.parametrize("block", [b for b in blocks("yaml") if len(b.marks) > 1], ids=str)
def test_a_deployment_says_the_same_as_the_file_it_shows(block: Block) -> None:
    assert yaml.safe_load(block.text) == yaml.safe_load((ROOT / block.marks[1]).read_text())


def test_the_readme_shows_the_deployment_that_make_run_launches() -> None:
    shown = [b.marks[1] for b in blocks("yaml") if b.page.name == "README.md"]
    assert shown == ["examples/quickstart.yaml"]
    assert f"helixc launch {shown[0]}" in (ROOT / "Makefile").read_text()


# --- Commands and Python ----------------------------------------------------------------------------------------


def commands(block: Block) -> list[str]:
    return [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("block", [b for b in blocks("console") if "run" in b.marks], ids=str)
def test_a_command_runs(block: Block) -> None:
    assert commands(block), f"{block} has no line that starts with `$ `"
    for command in commands(block):
        program, *arguments = shlex.split(command, comments=True)
        assert program == "helixc", f"{block}: only helixc is run"
        result = helixc(*arguments)
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {t for page in PAGES for t in re.findall(r"(?:`|\$ )make ([a-z-]+)", page.read_text())}
    assert {"run", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_prints_what_the_page_says(block: Block) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, {}, str(block), str(block.page), block.line)
    assert test.examples, f"{block} has no line that starts with >>>"
    assert doctest.DocTestRunner().run(test).failed == 0


# --- Names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("verb", VERBS)
def test_the_command_page_names_the_options_there_are(verb: str) -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    section = page.split(f"\n## {verb}\n", 1)[1].split("\n## ", 1)[0]
    usage = helixc(verb, "--help")
    assert usage.returncode == 0, usage.stderr
    assert set(OPTION.findall(section)) == set(OPTION.findall(usage.stdout)) - {"--help"}


def test_the_architecture_page_has_a_line_for_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = {*re.findall(r"^\| `([^`]+\.(?:py|cuh|j2))` \| \S", page, re.MULTILINE)}
    folders = ("helixc", "runtime/helixc_runtime", "templates")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".cuh", ".j2")]
    present = {str(f.relative_to(ROOT)) for f in files if f.name not in ("__init__.py", "__main__.py")}
    assert named - present == set(), "modules that are gone"
    assert present - named == set(), "modules without a line"
