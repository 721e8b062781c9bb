"""docs/hardware.md has the figures that helixc computes with."""

from __future__ import annotations

import json
import re
from typing import get_args

import pytest

from helixc.hardware import COLLECTIVE_LATENCY, GIB, GPUS, ONE_SIDED_LATENCY
from helixc.spec.schema import GpuName
from tests.docs.fences import ROOT

PAGE = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")


def test_the_table_is_the_one_in_the_code() -> None:
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in PAGE.splitlines() if line.startswith("| `")]
    expected = [
        [
            f"`{gpu.name}`",
            f"{gpu.memory / GIB:.0f}",
            f"{gpu.bandwidth / 1e12:.2f}",
            f"{gpu.bfloat16 / 1e12:.0f}",
            f"{gpu.nvlink / 1e9:.0f}",
            f"{gpu.network / 1e9:.0f}",
            str(gpu.gpus_per_node),
            str(gpu.domain),
            gpu.arch,
        ]
        for gpu in GPUS.values()
    ]
    assert rows == expected
    assert list(GPUS) == list(get_args(GpuName))


def test_the_latencies_are_those_that_were_measured() -> None:
    """Of one row."""
    measured = json.loads((ROOT / "bench" / "results" / "exchange.json").read_text(encoding="utf-8"))
    assert measured["gpu"] == "NVIDIA H200"
    row = next(row for row in measured["rows"] if row["op"] == "exchange" and row["rows"] == 1)
    assert row["ours_us"] == pytest.approx(ONE_SIDED_LATENCY * 1e6, rel=0.05)
    assert row["nccl_our_combine_us"] == pytest.approx(COLLECTIVE_LATENCY * 1e6, rel=0.05)
    inside, between = f"{ONE_SIDED_LATENCY * 1e6:g} us", f"{COLLECTIVE_LATENCY * 1e6:g} us"
    assert f"{inside}\namong the GPUs of one host, {between} by NCCL" in PAGE
