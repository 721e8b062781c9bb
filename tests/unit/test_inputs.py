"""Which files `helixc check` reads, and in what form it answers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from helixc.cli import main

CLEAN = "model: llama-3.1-8b\nload_format: dummy\nparallelism: gen tp1 cp2\n"
WARNS = "model: llama-3.1-8b\nparallelism: gen tp1 cp2\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "deep").mkdir(parents=True)
    for name in ("b.yaml", "a.yaml", "deep/c.yaml", "not-read.txt"):
        (tmp_path / "configs" / name).write_text(WARNS)
    return tmp_path


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, object]]]:
    capsys.readouterr()
    code = main(["check", "--format", "json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_patterns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked(capsys, "configs/*.yaml")
    assert (code, [f["file"] for f in found]) == (0, ["configs/a.yaml", "configs/b.yaml"])
    _, found = checked(capsys, "configs/b.yaml", "configs/**/*.yaml")
    assert [f["file"] for f in found] == ["configs/b.yaml", "configs/a.yaml", "configs/deep/c.yaml"]


def test_a_pattern_that_matches_nothing_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked(capsys, "configs/*.yml", "configs/a.yaml")
    assert code == 1
    assert [(f["code"], f["message"]) for f in found] == [
        ("HX001", "no file matches configs/*.yml"),
        ("HX403", found[1]["message"]),
    ]


def test_a_file_may_be_named_like_a_pattern(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "[a].yaml").write_text(CLEAN)
    assert checked(capsys, "[a].yaml") == (0, [])


@pytest.mark.parametrize(("raw", "codes"), [(CLEAN.encode(), []), (WARNS.encode(), ["HX403"]), (b"\xff", ["HX002"])])
def test_the_standard_input(
    raw: bytes, codes: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(raw)))
    _, found = checked(capsys, "-")
    assert [(f["code"], f["file"]) for f in found] == [(code, "<stdin>") for code in codes]


def test_strict_makes_warnings_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(capsys, "configs/a.yaml")[0] == 0
    code, found = checked(capsys, "--strict", "configs/a.yaml")
    assert (code, [f["severity"] for f in found]) == (1, ["error"])
    note = folder / "note.yaml"
    note.write_text(CLEAN + "# helixc: ignore[HX305] nothing to see\nseed: 1\n")
    code, found = checked(capsys, "--strict", str(note))
    assert (code, [f["severity"] for f in found]) == (0, ["note"])


def test_github_is_the_format_of_github_actions(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert main(["check", "configs/a.yaml"]) == 0
    assert capsys.readouterr().out.startswith("::warning file=configs/a.yaml,line=1,")
    assert main(["check", "configs/a.yaml", "--format", "text"]) == 0
    assert capsys.readouterr().out.startswith("warning[HX403]")


def test_json_shows_second_places_and_notes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "f.yaml").write_text(CLEAN + "max_seq_len: 131072\nmax_batch_size: 64\nhardware: {gpu: h100}\n")
    _, (found,) = checked(capsys, "f.yaml")
    assert found["code"] == "HX503"
    assert found["related"] == [
        {"message": "the GPU", "file": "f.yaml", "line": 6, "column": 17, "end_line": 6, "end_column": 21}
    ]
    assert isinstance(found["notes"], list) and "KV cache" in found["notes"][2]
