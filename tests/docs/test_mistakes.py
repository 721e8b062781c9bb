"""docs/mistakes.md shows ten typical mistakes as users see them. `make golden` rewrites the outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.docs.fences import ROOT
from tests.docs.shown import replayed

PAGE = ROOT / "docs" / "mistakes.md"


def test_the_mistakes_look_like_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    expected, runs = replayed(text, tmp_path, capsys)
    assert len(runs) == len({run.output for run in runs}) == text.count("\n## ") == 10
    assert all(run.exit_code == 1 and "= help: " in run.output for run in runs)
    if os.environ.get("HELIXC_UPDATE_GOLDEN"):
        PAGE.write_text(expected, encoding="utf-8")
    else:
        assert text == expected
