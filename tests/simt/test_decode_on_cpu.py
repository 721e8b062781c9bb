"""A decode step of a whole model by the kernels, without a GPU: they take what the model gives them as it lies."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.tiny_checkpoint import make_checkpoint
from helixc.codegen.problem import problems
from helixc.codegen.select import select
from helixc_runtime.attention_shape import attention_shape
from helixc_runtime.comm import TorchComm
from helixc_runtime.ffn_shape import ffn_shape
from helixc_runtime.kv import KvCache, Row
from helixc_runtime.models.decoder import Decoder
from helixc_runtime.ops import GatedMlp, Mixture, Ops
from helixc_runtime.ops_torch import TorchOps
from helixc_runtime.step import DecodeStep, RowInput
from helixc_runtime.weights import load_weights
from tests.deployments import plan_of, role
from tests.gpu.ffn_cases import MARGIN, check_rows, choices, margins
from tests.simt.cpu_kernel import Gpu, Overlap, cpu_ops, unseen

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPU = torch.device("cpu")
ARCH = "sm_100a"  # the tiny models' heads are not those of Hopper's kernels
BOUND = 2e-2  # torch rounds to bfloat16 where the kernels do not


class Compared:
    """The kernels' Ops, whose projections and FFNs must be what torch makes of the same arguments."""

    def __init__(self, kernels: Ops, torch_ops: TorchOps) -> None:
        self.kernels, self.torch_ops = kernels, torch_ops
        self.calls = {"linear": 0, "mlp": 0, "mixture": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        self.calls["linear"] += 1
        got = self.kernels.linear(x, weight)
        with unseen():
            check_rows(got, self.torch_ops.linear(x, weight), BOUND)
        return got

    def mlp(self, x: Tensor, weights: GatedMlp) -> Tensor:
        self.calls["mlp"] += 1
        got = self.kernels.mlp(x, weights)
        with unseen():
            check_rows(got, self.torch_ops.mlp(x, weights), BOUND)
        return got

    def mixture(self, x: Tensor, weights: Mixture) -> Tensor:
        assert self.torch_ops.ffn and self.torch_ops.ffn.moe
        moe = self.torch_ops.ffn.moe
        self.calls["mixture"] += 1
        got = self.kernels.mixture(x, weights)
        with unseen():
            clear = margins(moe, choices(moe, x, weights)) > MARGIN
            check_rows(got[clear], self.torch_ops.mixture(x, weights)[clear], BOUND)
        return got


@pytest.mark.parametrize(
    ("family", "calls"),
    [
        ("deepseek-v3-lite, values", {"linear": 3 * 3 + 1, "mlp": 1, "mixture": 2}),
        ("deepseek-v3-lite", {"linear": 3 * 3 + 1, "mlp": 1, "mixture": 2}),
        ("deepseek-v2", {"linear": 3 * 4 + 1, "mlp": 1, "mixture": 2}),
        ("qwen3-moe", {"linear": 3 * 2 + 1, "mlp": 1, "mixture": 2}),
        ("llama", {"linear": 3 * 2 + 1, "mlp": 3, "mixture": 0}),
    ],
)
def test_a_step(family: str, calls: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    family, _, values = family.partition(", ")
    checkpoint = make_checkpoint(family, tmp_path / "checkpoint", seed=seed, layers=3)
    plan = plan_of(str(checkpoint), role(), role(block=4, batch=4), dtype="bfloat16")
    if values:  # W_UV before the exchange that one rank has with itself
        plan = replace(plan, ranks=tuple(replace(rank, exchange_space="value") for rank in plan.ranks))
    rank = plan.ranks[-1]
    shape = attention_shape(plan.model, rank, plan.tokens_per_block)
    ffn = ffn_shape(plan.model, rank, plan.instance_of(rank))
    weights = load_weights(plan.model, plan.shards[rank.shard], CPU, lambda *_: None)
    decoder = Decoder(plan.model.arch, rank, weights, TorchComm(rank, {}), CPU, torch.bfloat16)
    cache = KvCache(plan.model, rank, plan.tokens_per_block, 4, 20, CPU)
    more = [spec for spec in select(plan, (ARCH,)) if spec not in problems(shape, 1, ARCH)]
    kernels = cpu_ops(shape, 1, tmp_path, monkeypatch, Gpu(3, seed, watched=True), arch=ARCH, more=more, ffn_shape=ffn)
    for name in ("mix", "gated_mlp", "linear"):
        monkeypatch.setattr(f"helixc_runtime.ffn_cuda.{name}", _never)
    ops = Compared(kernels, TorchOps(shape, ffn))
    step = DecodeStep(decoder, ops, cache, keep_logits=True)
    for slot in (0, 2):
        cache.reserve(Row(slot, slot, 9, 20))
    step.assign([RowInput(slot, 5 + slot, 0, True, 0.0, 1.0, seed) for slot in (0, 2)])
    with Overlap():
        result = step()
    assert result is not None and result.logits is not None and result.logits[[0, 2]].isfinite().all()
    assert ops.calls == calls


def _never(*arguments: object) -> Tensor:
    raise AssertionError("torch ran in place of the kernels")
