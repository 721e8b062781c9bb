"""The kernels' own source, and CudaOps' grids and arguments, against the float64 oracle, without a GPU."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from helixc.codegen.template_root import template_root
from helixc_runtime.attention_shape import AttentionShape
from tests.gpu.kernel_cases import check_append, check_attend, check_combine, gqa, mla, random_case
from tests.simt.cpu_kernel import cpu_ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPU = torch.device("cpu")
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
SHAPES = [
    mla(16, 4),
    mla(3, 32, "float32"),
    gqa(9, 3, 64, 4),
    gqa(8, 1, 128, 32, "float16"),
    gqa(13, 1, 72, 64, "float32"),
]


# A GPU of so many multiprocessors: one split, a few, more than there are tiles of tokens.
@pytest.mark.parametrize(
    ("shape", "processors"),
    list(zip(SHAPES, (1, 8, 400, 8, 60), strict=True)),
    ids=lambda value: str(getattr(value, "heads", value)),
)
def test_kernels_agree_with_the_oracle(
    shape: AttentionShape, processors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    ops = cpu_ops(shape, 3, tmp_path, monkeypatch, processors)
    lengths = [0, 1, 75, 0, random.Random(seed).randint(2, 130)]
    case = random_case(shape, lengths, CPU, seed)
    check_append(ops, case, BOUNDS[shape.dtype])
    check_attend(ops, case, BOUNDS[shape.dtype])
    check_combine(ops, shape, 3, CPU, seed, BOUNDS[shape.dtype])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("dot * C::scale", "dot * C::scale * 1.01f"),
        ("if (!owned[row]) return;", ""),
        ("if (is_minus_infinity(part_lse)) continue;", ""),
        ("expf(part_lse - largest)", "exp2f(part_lse - largest)"),
        ("if (position < end) {", "if (position / C::block <= (end - 1) / C::block) {"),
        ("y * cos[i] + x * sin[i]", "y * cos[i] - x * sin[i]"),
    ],
)
def test_a_wrong_kernel_is_noticed(right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "templates"
    shutil.copytree(template_root(), root)
    changed = 0
    for header in (root / "include").rglob("*.cuh"):
        text = header.read_text()
        changed += text.count(right)
        header.write_text(text.replace(right, wrong))
    assert changed == 1
    seed = random.randrange(1 << 30)
    print("seed", seed)
    _check_all(tmp_path, monkeypatch, template_root(), seed)  # the same problem, unchanged
    with pytest.raises(AssertionError):
        _check_all(tmp_path / "wrong", monkeypatch, root, seed)


def _check_all(folder: Path, monkeypatch: pytest.MonkeyPatch, root: Path, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    shape = gqa(4, 2, 64, 4, "float32")
    ops = cpu_ops(shape, 2, folder, monkeypatch, 8, root)
    case = random_case(shape, [5, 9, 0, 70], CPU, seed)
    check_append(ops, case, 1e-5)
    check_attend(ops, case, 1e-5)
    check_combine(ops, shape, 2, CPU, seed, 1e-5)
