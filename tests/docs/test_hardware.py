"""docs/hardware.md has the figures that helixc computes with."""

from __future__ import annotations

import json
import re
from typing import cast, get_args

import pytest

from helixc.hardware import (
    ATTENTION_OPERATIONS_SHARE,
    ATTENTION_READ_SHARE,
    ATTENTION_START,
    EXCHANGE_SHARE,
    EXCHANGE_START,
    GIB,
    GPUS,
    JOIN,
    NETWORK_LATENCY,
    NVLINK_LATENCY,
    PROJECTION_SHARE,
)
from helixc.spec.schema import GpuName
from helixc_runtime.manifest import Transport
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


def test_the_shares_are_those_that_were_measured() -> None:
    """Bytes between 1 and 64 rows over the time between them."""
    measured = json.loads((ROOT / "bench" / "results" / "exchange.json").read_text(encoding="utf-8"))
    assert measured["gpu"] == "NVIDIA H200"
    few, many = (next(r for r in measured["rows"] if r["op"] == "exchange" and r["rows"] == n) for n in (1, 64))
    sent = 63 * many["heads"] // 2 * (many["width"] * 2 + 4)
    for transport, column in (("one_sided", "ours_us"), ("collective", "nccl_our_combine_us")):
        share = EXCHANGE_SHARE[cast(Transport, transport)]
        assert sent / (many[column] - few[column]) * 1e6 / GPUS["h200"].nvlink == pytest.approx(share, rel=0.25)
        assert f"{share:.0%}" in PAGE
    assert f"{PROJECTION_SHARE:.0%}" in PAGE


def test_the_times_of_hop_are_those_in_the_code() -> None:
    """tests/unit/test_hop.py holds them against what was measured."""
    words = " ".join(PAGE.split())
    mla, gqa = (f"{ATTENTION_START[kind] * 1e6:.0f} us" for kind in ("mla", "gqa"))
    read, operations = f"{ATTENTION_READ_SHARE:.0%}", f"{ATTENTION_OPERATIONS_SHARE:.0%}"
    assert f"Attention starts in {mla} (MLA) or {gqa} (GQA), then reads at {read} of" in words
    assert f"computes at {operations} of the tensor cores' rate" in words
    ours, nccl = (f"{EXCHANGE_START[way] * 1e6:g} us" for way in get_args(Transport))
    assert f"the exchange starts in {ours} one-sided or {nccl} by NCCL" in words
    assert f"A kernel that waits for two streams costs {JOIN * 1e6:.0f} us: an assumption" in words


def test_the_latencies_are_those_in_the_code() -> None:
    inside, between = f"{NVLINK_LATENCY * 1e6:.0f} us", f"{NETWORK_LATENCY * 1e6:.0f} us"
    assert f"{inside}\ninside an NVLink domain, {between} over the network" in PAGE
