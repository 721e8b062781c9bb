"""bench/rank.py on the CPU: a tiny model alone, and what NVLink adds, without any work on a GPU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import exchange, rank
from bench.decode import Measured
from bench.loopback import Loopback
from helixc_runtime import one_sided, ops_cuda

CPU = torch.device("cpu")
HERE_US = 1000.0 / exchange.LAUNCHES  # of one call, where a replay takes a millisecond


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a rank on the CPU has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_tiny_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rank.json"
    assert rank.main(["--only", "tiny", "--out", str(out), "--profile"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["model"], row["layers"], row["batch"], row["tokens"]) for row in rows] == [
        ("tiny", 2, 1, 40),
        ("tiny", 2, 3, 9),
    ]
    for row in rows:
        assert row["rank_us"] == row["estimate_us"] > row["host_us"] > 0, "there is no GPU to estimate from"
        assert row["missed"] == [flaw for flaw in row["missed"] if "host time" in flaw], "it has no other goals"
        assert row["ratio"] == pytest.approx(row["tp2_rank_us"] / row["rank_us"], rel=1e-2)
    printed = capfd.readouterr().out
    assert "c10d::" not in printed, "there is nobody to talk to"
    assert printed.count("aten::mm") == 4, "a profile for each case and layout"


def test_a_model_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(bench: rank.Bench, name: str, *others: Any) -> Iterator[dict[str, Any]]:
        if name == "llama-3.1-70b":
            raise RuntimeError("out of memory")
        yield {"model": name}

    monkeypatch.setattr(rank.Bench, "rows", rows)
    out = tmp_path / "rank.json"
    assert rank.main(["--only", "llama-3.1-70b,tiny", "--out", str(out)]) == 1
    assert "llama-3.1-70b: out of memory" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == [{"model": "tiny"}]


@pytest.fixture
def idle_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that does nothing, each span of whose time is a millisecond."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 1.0)
    for name, value in {
        "Event": lambda enable_timing: event,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph, capture_error_mode: contextlib.nullcontext(),
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=132),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(ops_cuda, "LoadedKernel", lambda *a, **k: SimpleNamespace(launch=lambda grid, *values: None))
    monkeypatch.setattr(rank, "device_arch", lambda device: "sm_90a")
    for module in (ops_cuda, one_sided):
        monkeypatch.setattr(module, "check_arch", lambda arches, device: "sm_90a")


def test_what_nvlink_adds(idle_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the results of bench/exchange.py, by the bytes that go to the other GPU."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs helixc[nvrtc]")
    times = {"heads": 128, "width": 512, "goal_us": 6.0}
    rows: list[dict[str, Any]] = [
        {"op": "exchange", "rows": 4, "ours_us": HERE_US + 3} | times,
        {"op": "exchange", "rows": 1, "ours_us": HERE_US + 1} | times,
        {"op": "merge_exchange", "case": "1x4k", "rows": 1, "heads": 16},
        {"op": "reduce", "rows": 1, "hidden": 2048, "ours_us": HERE_US + 0.5},
        {"op": "reduce", "rows": 1, "hidden": 7168, "ours_us": HERE_US + 2.5},
        {"op": "reduce", "rows": 1024, "hidden": 7168, "ours_us": HERE_US + 99},
    ]
    (tmp_path / "exchange.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(exchange, "RESULTS", tmp_path / "exchange.json")
    with torch.inference_mode(), rank.world_of_one():
        link = rank.link_of(CPU)
    row = 64 * (512 * 2 + 8 * 4)  # of 64 heads, in bfloat16, and an LSE a piece
    assert link == {
        "exchange": [(row, pytest.approx(1, abs=0.01)), (4 * row, pytest.approx(3, abs=0.01))],
        "reduce": [(4096, pytest.approx(0.5, abs=0.01)), (14336, pytest.approx(2.5, abs=0.01))],
    }


def test_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    link = {"exchange": [(1000, 1.0), (3000, 2.0)], "reduce": [(100, 0.5), (300, 1.5)]}
    comm = object.__new__(Loopback)
    sent = [("exchange", 2000, 27), ("reduce", 400, 55), ("argmax", 8, 1)]
    monkeypatch.setattr(Loopback, "messages", lambda self, rows: [(what, rows * size, n) for what, size, n in sent])
    found = rank.Found(27, [], comm)
    measured = Measured(1000.0, 990.0, 1.0)
    assert found.estimate(measured, 1, link) == pytest.approx(1000 + 27 * 1.5 + 55 * 1.5 + 0.5)
    assert found.estimate(measured, 2, link) == pytest.approx(1000 + 27 * 2.0 + 55 * 1.5 + 0.5)
