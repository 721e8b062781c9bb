"""`helixc init`: what it writes passes `helixc check`, for every model and many numbers of GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from helixc.cli import main
from helixc.frontend import analyse
from helixc.hardware import GPUS
from helixc.model import builtin_names


@pytest.mark.parametrize("model", builtin_names())
@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16])
def test_what_it_writes_is_clean(model: str, gpus: int, tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    assert main(["init", str(file), "--model", model, "--gpus", str(gpus)]) == 0
    analysis = analyse(file)
    assert analysis.diagnostics == () and analysis.spec is not None
    role = analysis.spec.generation
    assert role.tensor_parallel_size * role.context_parallel_size == gpus
    assert role.context_parallel_size > 1 or gpus == 1


@pytest.mark.parametrize("gpu", GPUS)
def test_flags_are_in_the_file(gpu: str, tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    sizes = ["--ctx", "2x tp4", "--gen", "tp2 cp4", "--max-seq-len", "50000", "--max-batch-size", "3", "--gpu", gpu]
    assert main(["init", str(file), *sizes]) == 0
    spec = analyse(file).spec
    assert spec is not None and spec.context is not None
    assert (spec.context.num_instances, spec.context.tensor_parallel_size) == (2, 4)
    assert (spec.generation.tensor_parallel_size, spec.generation.context_parallel_size) == (2, 4)
    assert (spec.generation.max_seq_len, spec.generation.max_batch_size) == (50000, 3)
    assert spec.hardware.gpu == gpu


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("mine")
    assert main(["init", str(file)]) == 2
    assert "exists" in capsys.readouterr().err and file.read_text() == "mine"


def test_sizes_that_do_not_work_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "d.yaml"
    assert main(["init", str(file), "--gpus", "7"]) == 2
    assert "1, 2, 4, 8, 16 or 32" in capsys.readouterr().err
    assert main(["init", str(file), "--gen", "tp8 cp3"]) == 1
    assert "HX301" in capsys.readouterr().err
    assert main(["init", str(file), "--model", "deepseek-v3", "--gpus", "8", "--gpu", "h100"]) == 1
    assert "HX503" in capsys.readouterr().err
    assert main(["init", str(file), "--model", "deepsek-v3"]) == 1
    assert "did you mean `deepseek-v3`" in capsys.readouterr().err
    assert not file.exists()


def test_a_dash_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "-"]) == 0
    assert "parallelism: ctx tp2 / gen tp1 cp2" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
