"""bench/decode.py on the CPU: two processes over gloo, and the arithmetic behind its rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from bench import decode
from helixc.model import read_model
from tests.deployments import plan_of, role

K, M = 1024, 1 << 20


def test_a_tiny_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    assert decode.main(["--only", "tiny", "--out", str(out), "--profile"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["model"], row["batch"], row["tokens"]) for row in rows] == [("tiny", 1, 40), ("tiny", 3, 9)]
    for row in rows:
        assert row["ttl_us"] > 0 and row["tp2_ttl_us"] > 0
        assert row["ratio"] == pytest.approx(row["tp2_ttl_us"] / row["ttl_us"], rel=1e-2)
        assert 0 < row["host_us"] < row["ttl_us"], "what the loop does beside the step"
    assert capfd.readouterr().out.count("c10d::allreduce_") == 4, "a profile for each case and layout"


def test_one_rank_alone_is_no_result(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    assert decode.main(["--only", "tiny", "--layouts", "tp1", "--out", str(out), "--profile"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("tp1: 1 x 40: Measured(") == printed.count("tp1: 3 x 9: Measured(") == 1
    assert "c10d::" not in printed, "there is nobody to talk to"
    assert not out.exists()


def test_a_process_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("a process ended with 1; its traceback is above")

    monkeypatch.setattr(decode, "run_ranks", broken)
    assert decode.main(["--only", "tiny", "--out", str(tmp_path / "decode.json")]) == 1
    assert "tiny: a process ended with 1" in capfd.readouterr().out


def test_the_floor_counts_what_a_step_reads() -> None:
    """DeepSeek-V3's dimensions: one expert more a row as long as rows choose different ones, half of the KV each."""
    plan = plan_of("deepseek-v3", None, role(cp=2, batch=8, max_seq_len=M, block=64), dtype="bfloat16")
    rank, arch = plan.ranks[0], plan.model.arch
    assert arch.moe and arch.mla
    floor = {(batch, n): decode.floor_bytes(plan, rank, batch, n) for batch in (1, 2) for n in (8 * K, 64 * K)}
    cached = 61 * 576 * 2 * (56 * K) / 2
    assert floor[1, 64 * K] - floor[1, 8 * K] == cached
    assert floor[2, 64 * K] - floor[2, 8 * K] == 2 * cached
    expert = 3 * 7168 * 2048 / 2 * 2  # half of its columns, 2 bytes each
    more = 58 * expert * 8 * (1 - 8 / 256)
    assert floor[2, 8 * K] - floor[1, 8 * K] == pytest.approx(more + 61 * 576 * 2 * 4 * K)
    read = rank.memory.weights - 58 * expert * (256 - 8) - 129280 // 2 * 7168 * 2
    assert floor[1, 8 * K] - 61 * 576 * 2 * 4 * K == pytest.approx(read)


def test_what_does_not_fit_is_left_out() -> None:
    arch = read_model("deepseek-v3-lite")
    study = decode.STUDIES["deepseek-v3-lite"]
    fits = {layout: decode.fitting(study, arch, layout) for layout in decode.LAYOUTS}
    assert set(fits[decode.HELIX]) - set(fits[decode.PLAIN]) == {(4, M)}
    assert fits[decode.HELIX] == list(study.cases)


def test_what_a_kernel_adds_to_a_step() -> None:
    """b runs beside the first a and ends after it; the second a begins late; what the host does is not counted."""

    def event(name: str, end: float, on: DeviceType = DeviceType.CUDA) -> Any:
        return SimpleNamespace(name=name, device_type=on, time_range=SimpleNamespace(end=end))

    events = [event("a", 9.0), event("b", 4.5), event("launch", 5.0, DeviceType.CPU), event("a", 4.0), event("c", 1.0)]
    assert decode.ends_moved(events) == {"a": 3.0 + 4.5, "b": 0.5}


def test_the_slower_rank_counts() -> None:
    cases = [
        {"batch": batch, "tokens": 7, "measured": {"ttl": ttl, "device": ttl - 1, "floor_bytes": 3.0}}
        for batch, ttl in ((1, 5.0), (2, 50.0), (1, 6.0))
    ]
    assert decode.of_case(cases, 1, 7) == decode.Measured(6.0, 5.0, 3.0)
    assert decode.of_case(cases, 3, 7) is None


@pytest.mark.parametrize(
    ("fields", "flaws"),
    [
        ({}, []),
        ({"ratio": 1.6}, ["1.6 of tp2, goal 1.7"]),
        ({"tokens": 256 * K, "ratio": 1.6, "floor_share": 0.6, "vllm_us": 9000}, ["60% of the floor, goal 70%"]),
        ({"ttl_us": 6000.0}, ["1.33 of vLLM, goal 1.4"]),
        ({"host_us": 200.0}, ["4.0% host time, goal 3%"]),
        ({"model": "deepseek-v3", "ratio": 1.1, "vllm_us": None}, ["1.1 of tp2, goal 1.2"]),
        ({"model": "llama-3.1-70b", "batch": 8, "ratio": 0.96, "vllm_us": None}, ["0.96 of tp2, goal 0.97"]),
        ({"batch": 4, "ratio": None, "vllm_us": 20200}, []),
    ],
)
def test_goals(fields: dict[str, Any], flaws: list[str]) -> None:
    row = {"model": "deepseek-v3-lite", "batch": 1, "tokens": M, "ttl_us": 5000.0, "ratio": 1.75, "floor_share": 0.8}
    row |= {"host_us": 100.0, "vllm_us": 7980} | fields
    assert list(decode.missed(row)) == flaws
