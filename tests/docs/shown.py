"""Markdown that shows files and what `helixc check` prints of them: the files are written, the commands run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helixc.cli import main

HOME = "/home/you"  # stands for the folder in which a page's commands run
_BLOCK = re.compile(r"^```(\w+)[ \t]*(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Run:
    """One command of a page."""

    command: str
    exit_code: int
    output: str


def replayed(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[Run]]:
    """`text` with the real output of its commands, run in `folder`, which is the working directory.

    A fenced block is a file, whose name (and encoding) follow the language, or a `console` with one command in its
    first line.
    """
    runs: list[Run] = []

    def replay(block: re.Match[str]) -> str:
        if block[1] != "console":
            write(folder, block)
            return block[0]
        command = block[3].splitlines()[0]
        assert command.startswith("$ helixc check "), command
        capsys.readouterr()
        code = main(command.removeprefix("$ helixc ").split())
        runs.append(Run(command, code, capsys.readouterr().out.replace(str(folder), HOME)))
        return f"```console\n{command}\n{runs[-1].output}```"

    return _BLOCK.sub(replay, text), runs


def written(text: str, folder: Path) -> Iterator[str]:
    """The names of the files of a page, which are written to `folder`."""
    return (write(folder, block) for block in _BLOCK.finditer(text))


def write(folder: Path, block: re.Match[str]) -> str:
    """Write the file that a block shows; its name."""
    name, encoding = [*block[2].split(), "utf-8"][:2]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block[3], encoding=encoding, newline="")
    return name
