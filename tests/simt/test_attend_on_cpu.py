"""The portable attention kernels over FP8 caches and for several query tokens a row, without a GPU."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import pytest
import torch

from helixc.codegen.config import configure
from helixc.codegen.problem import problems
from helixc_runtime import ops_cuda
from helixc_runtime.attention_shape import AttentionShape
from tests.gpu.kernel_cases import check_append, check_attend, check_elements, gqa, mla, random_case
from tests.simt.bugs import Bug, planted
from tests.simt.cpu_kernel import cpu_ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPU = torch.device("cpu")
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
SHAPES = {
    "mla fp8": mla(16, 32, kv_dtype="float8_e4m3fn"),
    "mla 2 tokens": mla(5, 4, query_tokens=2),
    "mla fp8 3 tokens": mla(3, 64, kv_dtype="float8_e4m3fn", query_tokens=3),
    "mla fp8 4 tokens": mla(2, 4, "float32", kv_dtype="float8_e4m3fn", query_tokens=4),
    "gqa fp8": gqa(8, 2, 128, 32, kv_dtype="float8_e4m3fn"),
    "gqa fp8 2 tokens": gqa(4, 2, 200, 4, "float32", kv_dtype="float8_e4m3fn", query_tokens=2),
    "gqa fp8 3 tokens": gqa(13, 1, 72, 64, "float16", kv_dtype="float8_e4m3fn", query_tokens=3),
    "gqa 4 tokens": gqa(9, 3, 64, 32, "float32", query_tokens=4),
}
SMALL = SHAPES["gqa fp8 2 tokens"]


def attend_ops(
    shape: AttentionShape, folder: Path, monkeypatch: pytest.MonkeyPatch, processors: int, root: Path | None = None
) -> ops_cuda.CudaOps:
    """CudaOps with the kernels of attend; its other kernels do nothing."""
    folder.mkdir(exist_ok=True)
    return cpu_ops(shape, 1, folder, monkeypatch, processors, root, idle=("append", "combine"))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attend_agrees_with_the_oracle(
    shape: AttentionShape, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs that give a row one split, a few, and more than there are tiles of tokens."""
    draw = random.Random(seed)
    # New tokens over a page's end, none of them owned, no tokens at all, fewer than are new.
    lengths = [shape.block + 2, draw.randint(1, 70), 0, 1, 70, draw.randint(2, 130)]
    ops = attend_ops(shape, tmp_path, monkeypatch, draw.choice([1, 20, 400]))
    check_attend(ops, random_case(shape, lengths, CPU, seed, appended=True), BOUNDS[shape.dtype])


@pytest.mark.parametrize("name", ["mla fp8 4 tokens", "gqa fp8 3 tokens"])
def test_attend_reads_what_append_stored(name: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[name]
    ops = cpu_ops(shape, 1, tmp_path, monkeypatch, 4)
    case = random_case(shape, [shape.block + 2, 7, 0, 3, 0, 35], CPU, seed)
    check_append(ops, case, BOUNDS[shape.dtype])
    check_attend(ops, case, BOUNDS[shape.dtype])


def test_every_fp8_element_is_read_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = gqa(1, 1, 256, 4, "float32", kv_dtype="float8_e4m3fn")
    check_elements(attend_ops(shape, tmp_path, monkeypatch, 1), shape, CPU)


LOAD, CONVERT = "if (position < end) {", "to_float(element) * scale"
LAST = "query / C::query_tokens * C::query_tokens + C::query_tokens - 1"


@pytest.mark.parametrize(
    "changes",
    [
        {"scales[token]": "scales[token ^ 1]"},
        {CONVERT: "to_float(element)"},
        {"cache_v, v_scale, pages": "cache_v, k_scale, pages"},
        {"8 * half)": "8 * (1 - half))"},
        {LOAD: "if (position / C::block <= (end - 1) / C::block) {"},
        # Unused elements are cleared, and then multiplied with what lies in place of their scales.
        {
            LOAD: "if (position / C::block <= (end - 1) / C::block) {",
            CONVERT: "(element.bits == 0x7f ? 0.0f : to_float(element)) * scale",
        },
        {"lengths[query]": f"lengths[{LAST}]"},
        {"lengths[query]": "lengths[query / C::query_tokens]"},
        {"i64(query / C::query_tokens)": "i64(query % (gridDim.y / C::query_tokens))"},
    ],
    ids=[
        "another token's scale",
        "no scale",
        "values with the keys' scale",
        "elements swapped",
        "unused tokens",
        "unused scales",
        "last query token's bound",
        "row's bound",
        "another row's pages",
    ],
)
def test_a_wrong_kernel_is_noticed(
    changes: dict[str, str], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = planted(tmp_path, [Bug("partial", right, wrong) for right, wrong in changes.items()])
    case = random_case(SMALL, [9, 5, 0, 70], CPU, seed, appended=True)
    with pytest.raises(AssertionError):
        check_attend(attend_ops(SMALL, tmp_path / "wrong", monkeypatch, 8, root), case, BOUNDS[SMALL.dtype])


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, case = attend_ops(SMALL, tmp_path, monkeypatch, 1), random_case(SMALL, [5, 6], CPU, 0, appended=True)
    cache = case.cache
    assert cache.k_scale is not None and cache.v_scale is not None
    with pytest.raises(ValueError, match="k_scale is int8, expected uint8"):
        ops.attend(case.q, dataclasses.replace(cache, k_scale=cache.k_scale.view(torch.int8)), case.batch)
    with pytest.raises(ValueError, match="v_scale is not contiguous"):
        strided = cache.v_scale.transpose(0, 1).contiguous().transpose(0, 1)
        ops.attend(case.q, dataclasses.replace(cache, v_scale=strided), case.batch)
    with pytest.raises(ValueError, match="q has 3 tokens, expected 2 for each of 2 rows"):
        ops.attend(case.q[:3], cache, case.batch)
    kernels = [configure(spec).planned() for spec in problems(SMALL, 1, "sm_100a")]
    with pytest.raises(ValueError, match="has query_tokens 2, this rank needs 1"):
        ops_cuda.CudaOps(dataclasses.replace(SMALL, query_tokens=1), kernels, tmp_path, CPU)
