"""Planted bugs: a copy of the templates with one place changed, for a test that has to notice it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from helixc.codegen.template_root import template_root


@dataclass(frozen=True)
class Bug:
    """A change of the one place where `right` stands in `header`; "*" is any header."""

    header: str
    right: str
    wrong: str
    processors: int = 3  # of the GPU that shows it

    def __str__(self) -> str:
        return f"{self.header} {self.right}"[:50]


def planted(folder: Path, bugs: Iterable[Bug]) -> Path:
    """The root of a copy of the templates, in `folder`, that has `bugs`."""
    root = folder / "templates"
    shutil.copytree(template_root(), root)
    for bug in bugs:
        headers = sorted((root / "include").rglob(f"{bug.header}.cuh"))
        holders = [header for header in headers if bug.right in header.read_text()]
        assert len(holders) == 1, f"{bug.right} stands in {len(holders)} headers"
        text = holders[0].read_text()
        assert text.count(bug.right) == 1, f"{bug.right} stands {text.count(bug.right)} times in {holders[0].name}"
        holders[0].write_text(text.replace(bug.right, bug.wrong))
    return root
