"""The handoff between peers: the kernel on every layout, two processes, and whole launches on one GPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.handoff import measure
from helixc.codegen.build import compile_all, render_all
from helixc.codegen.problem import handoff
from helixc_runtime.cubin import device_arch
from tests.deployments import role
from tests.gpu.launches import compiled, launch
from tests.handoff_cases import LAYOUTS, check_launches, random_case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["mla", "gqa pp", "gqa tp", "gqa copies"])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("bfloat16", "auto"), ("bfloat16", "fp8"), ("float32", "auto"), ("float32", "fp8"), ("bfloat16", "float16")],
)
def test_pages(layout: Any, dtype: str, kv_dtype: str, tmp_path: Path, seed: int) -> None:
    """Every sender's launches into every target's arena, bit by bit."""
    device = torch.device("cuda", 0)
    case = random_case(layout, kv_dtype, seed, dtype=dtype, lengths=(1, 300))
    (cubin,) = compile_all(render_all([handoff(case.plan.model, case.plan.tokens_per_block, device_arch(device))]))
    shutil.copytree(cubin.directory, tmp_path / "kernels" / cubin.directory.name)
    plan = replace(case.plan, kernels=(cubin.kernel(),))
    check_launches(case, plan, tmp_path, device)


@pytest.mark.parametrize(("model", "kv_dtype"), [("deepseek-v3-lite", "fp8"), ("llama-3.1-8b", "auto")])
def test_two_processes(model: str, kv_dtype: str, seed: int) -> None:
    """A context and a generation rank, by both ways: the same bytes in the pages, whatever the lengths."""
    gpus = min(2, torch.cuda.device_count())
    rows = list(measure([(model, kv_dtype)], (1, 63, 64, 65, 200, 1000), {"peer": 3, "host": 2}, gpus, seed))
    assert [row["tokens"] for row in rows] == [1, 63, 64, 65, 200, 1000]


@pytest.mark.parametrize("model", ["deepseek-v3-lite", "llama-3.1-8b"])
def test_launches_on_one_gpu(model: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Context and generation rank share the GPU. Both ways: every token that of one process, the same KV moved."""
    found = {}
    for way in ("peer", "host"):
        monkeypatch.setenv("HELIXC_HOST_HANDOFF", str(int(way == "host")))
        artifact = compiled(tmp_path / f"{way}_artifact", model, 3, "float32", role(), role(block=32), gpus=1)
        found[way] = launch(artifact, [1, 5, 40, 300], 24, tmp_path / way, seed, "--verify")
        assert found[way]["verify"]["first_difference"] is None
    peer, host = (found[way]["metrics"] for way in ("peer", "host"))
    assert peer["handoff_peer_bytes"] == peer["handoff_bytes"] == host["handoff_bytes"] > 0
    assert host["handoff_peer_bytes"] == 0
    tokens = [[request["token_ids"] for request in found[way]["requests"]] for way in found]
    assert tokens[0] == tokens[1]
