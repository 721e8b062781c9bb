"""The benches without a GPU: every line runs, on small problems, with torch in place of the kernels."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench import attention, ffn, gpu_timing, launch, peers, steps
from helixc_runtime.ffn_cuda import CudaFfn
from helixc_runtime.ops import DecodeBatch, LayerCache, Partial, Projections
from helixc_runtime.ops_torch import TorchOps
from tests.gpu.ffn_cases import V3_LITE
from tests.gpu.ffn_cases import ffn as mixture_of
from tests.gpu.kernel_cases import gqa, mla

CPU = torch.device("cpu")


class Event:
    """Each span of time is a millisecond."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Graph:
    """What torch.cuda.CUDAGraph offers."""

    def replay(self) -> None: ...


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which all takes the same time."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph, stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda: "a GPU",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    no_work = SimpleNamespace(launch=lambda grid, *values: None)
    for module in (attention, ffn, steps, launch):
        monkeypatch.setattr(module, "first_gpu", lambda: CPU)
        if hasattr(module, "compiled"):
            monkeypatch.setattr(module, "compiled", lambda *arguments, **options: no_work)
        if hasattr(module, "empty_kernel"):
            monkeypatch.setattr(module, "empty_kernel", lambda folder: no_work)
        if hasattr(module, "BLOCK"):
            monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(attention, "make_ops", lambda shape, bench: TorchOps(shape))
    monkeypatch.setattr(attention, "POOL_BYTES", 1)
    monkeypatch.setattr(attention, "LEAST_PAGES", 64)
    monkeypatch.setattr(attention, "L2_BYTES", 1)
    monkeypatch.setattr(attention, "MOST_LAUNCHES", 2)
    monkeypatch.setattr(steps, "make_ops", lambda bench, shape, cp: TorchOps(shape))
    for module in (ffn, steps):
        monkeypatch.setattr(module, "copy_bandwidth", lambda device: 3e12)
    monkeypatch.setattr(ffn, "make_ffn", lambda shape, folder, device: CudaFfn(shape, [], {}, 1, device))
    for name, value in {"ROWS": (1, 4), "LEAST_LAUNCHES": 2, "MOST_SETS": 2}.items():
        monkeypatch.setattr(ffn, name, value)
    small_moe = replace(V3_LITE, experts=8, top_k=2)
    monkeypatch.setattr(ffn, "MIXTURES", {"a mixture": mixture_of(small_moe, 64, 16, 8, experts=(0, 4))})
    monkeypatch.setattr(ffn, "MLPS", {"an MLP": mixture_of(None, 64, dense=24)})
    monkeypatch.setattr(ffn, "LINEARS", {"plain": ((24, 64), "rows"), "heads": ((2, 16, 8), "columns")})
    for name, value in {"PAGES": 8, "MOST_SETS": 2, "LEAST_LAUNCHES": 2, "BATCHES": (1, 4), "RANKS": (2,)}.items():
        monkeypatch.setattr(steps, name, value)
    monkeypatch.setattr(steps, "SHAPES", [mla(4, 16), gqa(4, 2, 128, 16)])
    monkeypatch.setattr(launch, "make_ops", lambda bench, shape, cp: TorchOps(shape))
    monkeypatch.setattr(launch, "host_us", lambda call: (call(), 5.0)[1])


def small_parts() -> dict[str, list[attention.Case]]:
    """As PARTS, on small shapes."""
    lengths = {"1x100": [100], "2x70": [70, 70], "ragged": [1, 99, 33]}
    small = (mla(16, 16), gqa(8, 2, 128, 16))
    return {
        "mla": [(small[0], lengths)],
        "gqa": [(small[1], lengths)],
        "fp8": [(replace(shape, kv_dtype="float8_e4m3fn"), lengths) for shape in small],
        "queries": [(replace(shape, query_tokens=4), {"2x70": [70, 70]}) for shape in small],
    }


def torch_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    assert q.shape[2] == 1 and k.shape[1] == 2 and k.is_contiguous()
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True), q


def test_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(attention, "PARTS", small_parts())
    monkeypatch.setattr(peers, "flash", torch_flash)
    out = tmp_path / "attention.json"
    assert attention.main(["--out", str(out)]) == 0
    result = json.loads(out.read_text())
    found = [(attention.part_of(row), row["op"], row["case"], row["peer"]) for row in result["rows"]]
    bfloat16, sdpa = "ours, bfloat16 cache", "torch sdpa"
    cases = ("1x100", "2x70", "ragged")
    assert found == [
        *(("mla", "mla", f"{case}, H 16", None) for case in cases),
        *(("gqa", "gqa", f"{case}, (8,2)", None if case == "ragged" else sdpa) for case in cases),
        *(("fp8", "mla", f"{case}, H 16", bfloat16) for case in cases),
        *(("fp8", "gqa", f"{case}, (8,2)", bfloat16) for case in cases),
        ("queries", "mla", "2x70, H 16, 4 query tokens", None),
        ("queries", "gqa", "2x70, (8,2), 4 query tokens", None),
    ]
    assert all(row["ratio"] == (None if row["peer"] is None else 1.0) for row in result["rows"])
    assert "goals missed: 6 of 8" in capsys.readouterr().out
    assert not any(attention.PARTS[part] == [] for part in attention.PARTS)


def test_a_part_measured_again_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PARTS", small_parts())
    monkeypatch.setattr(peers, "flash", torch_flash)
    out = tmp_path / "attention.json"
    attention.main(["--out", str(out), "--only", "gqa,queries"])
    first = json.loads(out.read_text())
    first["rows"][0]["ours_us"] = -1  # of gqa
    out.write_text(json.dumps(first))
    attention.main(["--out", str(out), "--only", "queries"])
    again = json.loads(out.read_text())
    assert again["rows"][0] == first["rows"][0] and len(again["rows"]) == len(first["rows"]) == 5
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    attention.main(["--out", str(out), "--only", "queries"])
    assert {attention.part_of(row) for row in json.loads(out.read_text())["rows"]} == {"queries"}


def test_what_fails_is_told_and_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(TorchOps):
        def attend(self, q: torch.Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
            o, lse = super().attend(q, cache, batch)
            return Partial(o * 1.05 if cache.k.dtype == torch.float8_e4m3fn else o, lse)

    monkeypatch.setattr(attention, "make_ops", lambda shape, bench: Wrong(shape))
    monkeypatch.setattr(attention, "PARTS", small_parts())
    assert attention.main(["--out", str(tmp_path / "out.json"), "--only", "fp8,queries"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("not measured: ") == 2
    assert "not measured: H 16, fp8: AssertionError: ours, bfloat16 cache differs from ours by 0.04" in printed
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 2


def test_attention_names_the_goals_missed() -> None:
    row = {"op": "mla", "dtype": "bfloat16", "case": "8x32k, H 16", "ours_us": 5, "peer": "a peer", "peer_us": 4.0}
    rows = [row | {"ratio": 0.8}, row | {"ratio": 1.0}, row | {"ratio": None}]
    missed = "goals missed: 1 of 2\n  mla 8x32k, H 16: 5 us, a peer 4.0 us (0.8, goal 1.0)"
    assert attention.summary(rows, []) == missed


def test_every_row_has_the_goal_of_its_shape() -> None:
    def goal(op: str, case: str, dtype: str = "bfloat16", tokens: int = 1) -> float:
        return attention.goal_of({"op": op, "dtype": dtype, "case": case, "query_tokens": tokens})

    assert [goal("mla", f"1x64k, H {heads}") for heads in (128, 64, 16)] == [1.35, 1.7, 1.7]
    assert [goal("mla", f"{lengths}, H 16") for lengths in ("1x16k", "1x512k", "32x8k")] == [1.5, 1.1, 1.0]
    assert [goal("mla", f"{lengths}, H 128") for lengths in ("1x512k", "ragged 16x1k-256k")] == [1.0, 1.0]
    assert [goal("gqa", f"1x64k, {heads}") for heads in ("(8,1)", "(64,8)")] == [1.5, 1.0]
    assert [goal("gqa", f"8x32k, {heads}") for heads in ("(16,1)", "(64,4)")] == [1.1, 1.0]
    assert [goal("mla", f"1x64k, H {heads}", "float8_e4m3fn") for heads in (128, 64)] == [1.0, 1.7]
    assert goal("gqa", "1x64k, (8,1), 4 query tokens", tokens=4) == 1.0


def test_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.main(["--out", str(tmp_path / "steps.json")]) == 0
    result = json.loads((tmp_path / "steps.json").read_text())
    heads = ("MLA H 4", "GQA (4,2)")
    assert [(row["op"], row["dtype"], row["case"]) for row in result["rows"]] == [
        *(
            ("append", dtype, f"{name}, batch {batch}")
            for name in heads
            for dtype in ("bfloat16", "float8_e4m3fn")
            for batch in (1, 4)
        ),
        *(("combine", "bfloat16", f"{name}, cp 2, batch {batch}") for name in heads for batch in (1, 4)),
    ]
    row = result["rows"][1]  # append, MLA H 4, bfloat16, batch 4: queries in and out, latent in and out, angles, slot
    moved = 4 * (2 * 4 * 576 * 2 + 2 * 576 * 2 + 64 * 4 + 9)
    assert row["floor_us"] == pytest.approx(moved / 3e12 * 1e6, abs=6e-4)
    assert row["ours_us"] == 500 and row["share"] == pytest.approx(row["floor_us"] / 500, abs=6e-4)
    assert "goals missed: 0 of 12" in capsys.readouterr().out  # everything takes as long as an empty kernel
    steps.main(["--out", str(tmp_path / "steps.json"), "--only", "append"])
    again = json.loads((tmp_path / "steps.json").read_text())
    assert again["rows"] == result["rows"][8:] + result["rows"][:8]


def test_a_step_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refusing(TorchOps):
        def append(self, new: Projections, cache: LayerCache, batch: DecodeBatch) -> torch.Tensor:
            raise ValueError("no such kernel")

    monkeypatch.setattr(steps, "make_ops", lambda bench, shape, cp: Refusing(shape))
    assert steps.main(["--out", str(tmp_path / "steps.json")]) == 1
    assert capsys.readouterr().out.count("not measured: append: ValueError: no such kernel") == 4
    assert {row["op"] for row in json.loads((tmp_path / "steps.json").read_text())["rows"]} == {"combine"}


@pytest.mark.parametrize(
    ("batch", "ours_us", "share", "is_missed"),
    [(1, 3.1, 0.1, False), (1, 3.3, 0.1, True), (8, 9.0, 0.1, False), (128, 9.0, 0.86, False), (128, 9.0, 0.8, True)],
)
def test_goals_of_steps(
    batch: int, ours_us: float, share: float, is_missed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "BATCHES", (1, 8, 128))
    row: dict[str, Any] = {"op": "append", "case": "any", "dtype": "bfloat16", "batch": batch}
    row |= {"ours_us": ours_us, "empty_us": 1.2, "share": share}
    assert steps.missed(row) is is_missed
    assert steps.summary([row], ["x"]).endswith("not measured: x") and ("any" in steps.summary([row], [])) is is_missed


def test_ffn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ffn.main(["--out", str(tmp_path / "ffn.json")]) == 0
    rows = json.loads((tmp_path / "ffn.json").read_text())["rows"]
    assert [(row["op"], row["case"]) for row in rows] == [
        (op, f"{name}, batch {batch}")
        for op, name in (("mixture", "a mixture"), ("mlp", "an MLP"), ("linear", "plain"), ("linear", "heads"))
        for batch in (1, 4)
    ]
    assert all(row["ours_us"] == row["torch_us"] == 500 and row["ratio"] == 1 for row in rows)
    assert rows[2]["floor_us"] == pytest.approx(3 * 24 * 64 * 2 / 3e12 * 1e6, abs=0.005)
    assert "torch / ours: 1.00 (geometric mean of 8)" in capsys.readouterr().out


def test_an_ffn_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> CudaFfn:
        raise ValueError("no such kernel")

    monkeypatch.setattr(ffn, "make_ffn", refuse)
    assert ffn.main(["--only", "mlp", "--out", str(tmp_path / "ffn.json")]) == 1
    assert "mlp: ValueError: no such kernel" in capsys.readouterr().out


def test_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch.main(["--out", str(tmp_path / "launch.json")])
    rows = json.loads((tmp_path / "launch.json").read_text())["rows"]
    assert [row["what"].split(",")[0] for row in rows if row["launches"]] == [
        "a launch without arguments",
        "a launch of 8 pointers and 2 int32",
        *["append", "attend", "combine", "begin_step"] * 2,
    ]
    assert "goals missed: 0 of 2" in capsys.readouterr().out


def test_medians_divide_by_the_launches_of_a_graph() -> None:
    seen: list[int] = []
    times = gpu_timing.medians({"ours": seen.append}, 3, 6)
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1, 2]  # warmed up, then captured
    assert times == {"ours": pytest.approx(1000 / 6)}


def test_the_shapes_measured_are_served_by_hopper_s_kernels() -> None:
    from helixc.codegen.problem import attention as kernels

    for part in ("mla", "gqa"):
        for shape, cases in attention.PARTS[part]:
            assert "partial" not in {spec.template for spec in kernels(shape, "sm_90a")} and cases
