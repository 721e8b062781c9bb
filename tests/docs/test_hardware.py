"""docs/hardware.md has the figures that helixc computes with."""

from __future__ import annotations

import re
from typing import get_args

from helixc.hardware import GIB, GPUS, NETWORK_LATENCY, NVLINK_LATENCY
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


def test_the_latencies_are_those_in_the_code() -> None:
    inside, between = f"{NVLINK_LATENCY * 1e6:.0f} us", f"{NETWORK_LATENCY * 1e6:.0f} us"
    assert f"{inside}\ninside an NVLink domain, {between} over the network" in PAGE
