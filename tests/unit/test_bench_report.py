"""docs/performance.md is what bench/report.py makes of the committed results; sections come and go with their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report

MACHINE = {"gpu": "a GPU", "versions": {"torch": "2.9"}}


def write(folder: Path, name: str, **fields: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(fields))


def row(dtype: str = "bfloat16", op: str = "mla", **fields: Any) -> dict[str, Any]:
    peer = {"peer": "a peer", "peer_us": 12.0, "ratio": 1.5, "floor_us": 7.0, "tflops": 31}
    return {"op": op, "dtype": dtype, "case": "1x64k, H 16", "ours_us": 8.0} | peer | fields


def test_the_page_is_up_to_date() -> None:
    assert report.page(report.RESULTS) == report.PAGE.read_text(), "run `make bench-report`"


def test_no_results_no_sections(tmp_path: Path) -> None:
    assert report.page(tmp_path) == report.HEAD


def test_attention(tmp_path: Path) -> None:
    rows = [
        row(),  # as of a file from before there were several query tokens
        row(query_tokens=1, ours_us=4.0, ratio=1 / 1.5),
        row("float8_e4m3fn", "gqa", query_tokens=1, case="8x32k, (8,1)", peer="ours, bfloat16 cache"),
        row(query_tokens=4, case="alone", peer=None, peer_us=None, ratio=None),
    ]
    peers = {"mla": {"a peer": "0.7", "flashmla": "1"}, "fp8": {"fa3": "0.7"}, "queries": {}}
    write(tmp_path, "attention", **MACHINE, peers=peers, rows=rows)
    page = report.page(tmp_path)
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# Performance",
        "## Decode attention",
        "### MLA, latent 512 + rope 64, bfloat16",
        "### GQA, FP8 cache against the same values in bfloat16",
        "### MLA, several query tokens a row, bfloat16",
    ]
    assert "Geometric mean of the ratios: 1.00. Rows where the peer is faster: 1 of 2." in page
    assert "| 8x32k, (8,1) | 8.0 | 12.0 (ours, bfloat16 cache) | 1.50 | 7.0 | 31 |" in page
    assert "No peer could run these." in page and "| alone | 8.0 | - | - | 7.0 | 31 |" in page
    assert page.count("Peers: ") == 1 and "Peers: a peer 0.7, flashmla 1." in page


def test_hop(tmp_path: Path) -> None:
    same = {
        "model": "deepseek-v3",
        "layers": 8,
        "transport": "one_sided",
        "space": "latent",
        "batch": 8,
        "tokens": 65536,
    }
    rows = [
        same | {"groups": 1, "step_us": 1234.5, "saved_us": 0.0, "estimated_us": 0.0},
        same | {"groups": 2, "step_us": 1250.4, "saved_us": -1.99, "estimated_us": -8.06},
    ]
    write(tmp_path, "hop", **MACHINE, rows=rows)
    page = report.page(tmp_path)
    assert "### deepseek-v3, 8 layers" in page
    assert "| one-sided, latents | 8x64k | 1 | 1234 | - | - |" in page
    assert "| one-sided, latents | 8x64k | 2 | 1250 | -2.0 | -8.1 |" in page


@pytest.mark.parametrize("ops", [("append",), ("combine",), ("append", "combine")])
def test_steps(ops: tuple[str, ...], tmp_path: Path) -> None:
    times = {"ours_us": 2.11, "empty_us": 0.93, "floor_us": 0.318, "share": 0.151}
    rows = [{"op": op, "dtype": "bfloat16", "case": "MLA H 16, batch 8", "batch": 8} | times for op in ops]
    write(tmp_path, "steps", **MACHINE, copy_bandwidth=3.012, rows=rows)
    page = report.page(tmp_path)
    assert page.count("| MLA H 16, batch 8 | bfloat16 | 2.11 | 0.93 | 0.32 | 15% |") == len(ops)
    titles = [line for line in page.splitlines() if line.startswith("### ")]
    assert [title.removeprefix("### ").split(":")[0].lower() for title in titles] == list(ops)
    assert "`python bench/steps.py`" in page and "3.012 TB/s" in page


@pytest.mark.parametrize("ops", [("mixture",), ("mlp", "linear")])
def test_ffn(ops: tuple[str, ...], tmp_path: Path) -> None:
    times = {"ours_us": 29.214, "torch_us": 161.61, "ratio": 5.53, "floor_us": 28.49, "share": 0.975}
    write(tmp_path, "ffn", **MACHINE, copy_bandwidth=2.43, rows=[{"op": op, "case": "a case"} | times for op in ops])
    page = report.page(tmp_path)
    assert page.count("| a case | 29.21 | 161.61 | 5.53 | 28.49 | 98% |") == len(ops) == page.count("\n### ")
    assert "`python bench/ffn.py`" in page and "2.43 TB/s" in page


def test_launch(tmp_path: Path) -> None:
    rows = [{"what": "a launch", "us": 3.14, "launches": 1}, {"what": "an allocation", "us": 1.5, "launches": 0}]
    write(tmp_path, "launch", **MACHINE, host="Python 3.12.3", rows=rows)
    page = report.page(tmp_path)
    assert "Machine: a GPU; torch 2.9, Python 3.12.3.\nRepeat with `python bench/launch.py`." in page
    assert "| a launch | 3.1 | 1 |" in page and "| an allocation | 1.5 | - |" in page


def test_exchange(tmp_path: Path) -> None:
    times = {"rows": 4, "ours_us": 3.7, "nccl_us": 36.76}
    rows = [
        {"op": "exchange", **times, "nccl_our_combine_us": 30.99, "goal_us": 7.0},
        {"op": "reduce", **times, "nccl_our_norm_us": 9.5, "hidden": 2048},
        {"op": "merge_exchange", "case": "1x64k", "heads": 16, "one_us": 4.0, "two_us": 6.125, "attend_one_us": 39.5}
        | {"attend_two_us": 41.0},
    ]
    write(tmp_path, "exchange", **MACHINE, rows=rows)
    page = report.page(tmp_path)
    assert "Machine: two of a GPU; torch 2.9." in page
    assert "| 4 | 3.70 | 36.76 | 30.99 | 7 |" in page
    assert "| 4 | 3.70 | 36.76 | 9.50 | 2048 |" in page
    assert "| 1x64k, H 16 | 4.00 | 6.12 | 39.50 | 41.00 |" in page


def test_decode(tmp_path: Path) -> None:
    row = {"layers": 27, "batch": 1, "tokens": 1 << 20, "ttl_us": 5000.4, "tp2_ttl_us": 9000.4, "ratio": 1.8}
    row |= {"floor_share": 0.845, "host_us": 12.3, "kv_capacity_ratio": 1.997}
    rows = [
        {"model": "one", "vllm_us": 7980} | row,
        {"model": "one", "vllm_us": 20200} | row | {"batch": 4, "tp2_ttl_us": None, "ratio": None},
        {"model": "other", "vllm_us": None} | row | {"tokens": 8192},
    ]
    write(tmp_path, "decode", **MACHINE, rows=rows)
    page = report.page(tmp_path)
    assert "### one, 27 layers" in page and "### other, 27 layers" in page
    assert "| 1x1024k | 5000 | 84% | 12 | 9000 | 1.80 | 7980 | 1.60 |" in page
    assert "| 4x1024k | 5000 | 84% | 12 | does not fit | - | 20200 | 4.04 |" in page
    assert "| 1x8k | 5000 | 84% | 12 | 9000 | 1.80 |\n" in page
    assert "from the plans: 2.00" in page and page.count("measured on another day") == 1


def test_rank(tmp_path: Path) -> None:
    row = {"layers": 27, "batch": 1, "tokens": 1 << 20, "rank_us": 5347.8, "estimate_us": 5410.7, "floor_share": 0.926}
    row |= {"host_us": -0.4, "tp2_rank_us": 9277.3, "ratio": 1.722, "missed": []}
    rows = [
        {"model": "one", "vllm_us": 7980} | row,
        {"model": "one", "vllm_us": 20200} | row | {"batch": 4, "tp2_rank_us": None, "ratio": None},
        {"model": "other", "vllm_us": None} | row | {"tokens": 8192, "missed": ["one goal", "another"]},
    ]
    write(tmp_path, "rank", **MACHINE, rows=rows)
    page = report.page(tmp_path)
    assert "Machine: one of a GPU; torch 2.9.\n" in page and "peers looped back" in page
    assert "### one, 27 layers, a rank alone" in page and "### other, 27 layers, a rank alone" in page
    assert "| 1x1024k | 5348 | 5411 | 93% | 0 | 9277 | 1.72 | 7980 | 1.47 |" in page
    assert "| 4x1024k | 5348 | 5411 | 93% | 0 | does not fit | - | 20200 | 3.73 |" in page
    assert "| 1x8k | 5348 | 5411 | 93% | 0 | 9277 | 1.72 |\n" in page
    assert page.count("measured on another day") == 1
    assert page.count("estimates miss: none.") == 1 and "estimates miss: 1x8k: one goal, another." in page


@pytest.mark.parametrize(("gpus", "said"), [(1, "one GPU, which the two processes share"), (2, "two GPUs")])
def test_handoff(gpus: int, said: str, tmp_path: Path) -> None:
    cache = {"model": "deepseek-v3", "kv_dtype": "float8_e4m3fn", "tokens": 8192, "bytes": 144_000_000}
    write(tmp_path, "handoff", **MACHINE, gpus=gpus, copy_gb_s=350.5, rows=[{**cache, "peer_ms": 0.5, "host_ms": 96.0}])
    page = report.page(tmp_path)
    assert f"Machine: {said}: a GPU; torch 2.9.\n" in page and "reached 350.5 GB/s" in page
    assert "| deepseek-v3, float8_e4m3fn | 8k | 144.0 | 0.50 | 96.00 | 288 | 1.5 | 192.0 |" in page
