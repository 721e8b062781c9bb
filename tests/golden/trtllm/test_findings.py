"""Which findings each of TensorRT-LLM's published files gets, in both dialects; `make golden` rewrites findings.txt."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from helixc.frontend import analyse_input
from helixc.inputs import read_input
from helixc.spec.trtllm.dialect import Dialect

DATA = Path(__file__).parents[2] / "data" / "trtllm-configs"
GOLDEN = Path(__file__).parent / "findings.txt"
FILES = sorted(DATA.glob("*.y*ml"))


def line(path: Path) -> str:
    """`name: codes when read for helixc | codes when linted`, repeated ones counted."""
    found = []
    for dialect in (Dialect.AUTO, Dialect.TRTLLM):
        analysis = analyse_input(read_input(str(path)), dialect)
        counts = Counter(d.code for d in analysis.diagnostics)
        found.append(" ".join(f"{code}x{n}" if n > 1 else code for code, n in sorted(counts.items())) or "-")
    return f"{path.name}: {' | '.join(found)}"


@pytest.mark.skipif("HELIXC_UPDATE_GOLDEN" not in os.environ, reason="rewrites the expected lines")
def test_rewrite() -> None:
    GOLDEN.write_text("".join(f"{line(path)}\n" for path in FILES), encoding="utf-8")


def test_all_published_files_are_listed() -> None:
    assert len(FILES) == 74
    assert [entry.split(": ")[0] for entry in GOLDEN.read_text().splitlines()] == [path.name for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_findings_of_a_published_file(path: Path) -> None:
    expected = {entry.split(": ")[0]: entry for entry in GOLDEN.read_text().splitlines()}
    assert line(path) == expected[path.name]
