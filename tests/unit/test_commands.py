"""`helixc compile` and `helixc plan`: what they write, print and return."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helixc.cli import main
from helixc.codegen import build as kernels
from helixc.codegen.nvrtc import NvrtcMissing
from helixc.commands import artifact_for_launch
from helixc_runtime.artifact import ArtifactError, load

SPEC = """\
model: deepseek-v3-lite
load_format: dummy
parallelism: ctx tp2 / gen tp1 cp2
max_batch_size: 1
max_seq_len: 4096
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "deployment.yaml"
    path.write_text(SPEC)
    return path


def without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NvrtcMissing("compiling kernels needs NVRTC: pip install 'helixc[nvrtc]'")

    monkeypatch.setattr(kernels, "Nvrtc", missing)


def test_compile_writes_a_whole_artifact(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(file), "-o", "out", "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["artifact"], result["name"], result["ranks"]) == ("out", "ctxtp2_gentp1cp2", 4)
    artifact = load(Path("out"))
    assert artifact.spec == SPEC
    assert {k["name"] for k in result["kernels"]} == {k.name for k in artifact.plan.kernels}
    for kernel in artifact.plan.kernels:
        assert kernel.cubin is not None
        folder = Path("out", kernel.cubin).parent
        assert {f.name for f in folder.iterdir()} == {"kernel.cu", "kernel.cubin", "meta.json"}
    named = {name for rank in artifact.plan.ranks for name in rank.kernels}
    assert named == {kernel.name for kernel in artifact.plan.kernels}


def test_compile_says_what_the_kernels_use(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(file)]) == 0
    out = capsys.readouterr().out
    assert "ctxtp2_gentp1cp2: 4 ranks (2 context, 2 generation), proven" in out
    assert "us on h100, memory" in out
    assert "wrote artifacts/ctxtp2_gentp1cp2: run it with `helixc launch artifacts/ctxtp2_gentp1cp2`" in out


def test_compile_keeps_what_is_not_an_artifact(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine", "thesis.txt").write_text("years of work")
    assert main(["compile", str(file), "-o", "mine"]) == 2
    assert "is not empty and holds no manifest.json" in capsys.readouterr().err
    assert Path("mine", "thesis.txt").read_text() == "years of work"


def test_compile_replaces_an_artifact(file: Path) -> None:
    assert main(["compile", str(file), "-o", "out"]) == 0
    file.write_text(SPEC.replace("tp1 cp2", "tp2 cp2"))
    assert main(["compile", str(file), "-o", "out"]) == 0
    assert load(Path("out")).plan.name == "ctxtp2_gentp2cp2"


def test_compile_without_nvrtc_says_what_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_nvrtc(monkeypatch)
    assert main(["compile", str(file), "-o", "out"]) == 2
    assert "error: compiling kernels needs NVRTC: pip install 'helixc[nvrtc]'" in capsys.readouterr().err
    assert not Path("out").exists()


def test_launch_without_nvrtc_has_no_kernels(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_nvrtc(monkeypatch)
    assert artifact_for_launch(file, needs_kernels=True) == 2
    directory = artifact_for_launch(file, needs_kernels=False)
    assert isinstance(directory, Path)
    plan = load(directory).plan
    assert plan.kernels == () and all(rank.kernels == () for rank in plan.ranks)
    assert "runs on CPUs only" in capsys.readouterr().err


def test_launch_compiles_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = artifact_for_launch(file, needs_kernels=True)
    without_nvrtc(monkeypatch)
    assert artifact_for_launch(file, needs_kernels=True) == first


def test_findings_are_exit_1_and_write_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(SPEC.replace("cp2", "cp3"))
    assert main(["compile", str(file), "-o", "out", "--format", "json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["artifact"] is None and result["diagnostics"][0]["code"] == "HX301"
    assert main(["plan", str(file)]) == 1
    assert not Path("out").exists()


def test_plan_of_a_file_and_of_its_artifact_agree(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(file), "-o", "out"]) == 0
    capsys.readouterr()
    plans = []
    for path in (str(file), "out"):
        assert main(["plan", path, "--format", "json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    for plan in plans:
        for kernel in plan["kernels"]:  # what only compiling tells
            for key in ("cubin", "registers", "shared_bytes", "spill_bytes"):
                kernel.pop(key)
    assert plans[0] == plans[1]


def test_a_changed_file_of_an_artifact_is_noticed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(file), "-o", "out"]) == 0
    plan = Path("out", "plan.json")
    plan.write_text(plan.read_text().replace('"cp_rank":1', '"cp_rank":0'))
    with pytest.raises(ArtifactError, match="is not the file that was compiled"):
        load(Path("out"))
    assert main(["plan", "out"]) == 2
    assert "compile again" in capsys.readouterr().err
