"""Rendered kernels against the texts beside this file. HELIXC_UPDATE_GOLDEN=1 writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helixc.codegen.build import render_all
from helixc.codegen.problem import attention, exchange, merge_exchange, problems
from helixc.codegen.render import KernelSource
from tests.gpu.kernel_cases import gqa, mla

_HERE = Path(__file__).parent
_SOURCES = render_all(
    (
        *problems(mla(64, 32), 2, "sm_100a"),
        attention(mla(16, 64, kv_dtype="float8_e4m3fn", query_tokens=4), "sm_100a")[0],
        *attention(mla(128, 32), "sm_90a"),
        merge_exchange(mla(128, 32), 2, "sm_90a"),
        exchange(gqa(64, 8, 128, 64), 2, "sm_90a"),
        *attention(gqa(64, 8, 128, 64), "sm_90a"),
        attention(gqa(8, 2, 64, 32, kv_dtype="float8_e4m3fn", query_tokens=4), "sm_90a")[1],
        problems(gqa(8, 1, 128, 64, "float16"), 1, "sm_90a")[1],
        problems(gqa(9, 3, 64, 4, "float32"), 3, "sm_90a")[0],
    )
)


@pytest.mark.parametrize("source", _SOURCES, ids=lambda source: source.config.spec.name)
def test_text(source: KernelSource) -> None:
    golden = _HERE / f"{source.config.spec.name}.cu"
    if os.environ.get("HELIXC_UPDATE_GOLDEN") == "1":
        golden.write_text(source.text)
    assert source.text == golden.read_text()


def test_no_golden_text_is_stale() -> None:
    assert {path.stem for path in _HERE.glob("*.cu")} == {source.config.spec.name for source in _SOURCES}
