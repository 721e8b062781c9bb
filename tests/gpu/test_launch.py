"""Whole launches with `--device cuda`: context and generation ranks share the GPUs, and --verify must pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helixc.spec.spec import RoleSpec
from tests.deployments import role
from tests.gpu.launches import compiled, launch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.mark.parametrize(
    ("model", "context", "generation"),
    [
        ("deepseek-v3-lite", role(tp=2), role(cp=2, block=32)),
        ("deepseek-v3-lite", role(), role(tp=2, block=64, ep=2)),
        ("deepseek-v3-lite", role(), role(cp=2, block=32, batch=4, hop_groups=2)),
        ("llama-3.1-8b", role(), role(cp=2, block=32, batch=4, hop_groups=3)),
        ("llama-3.1-8b", role(tp=2), role(cp=2, block=32)),
        ("qwen3-235b-a22b", role(), role(cp=2, block=32)),
    ],
    ids=["mla cp2", "mla tp2", "mla cp2, 2 groups", "gqa cp2, 3 groups", "gqa cp2", "qwen3-moe cp2"],
)
def test_float32_equals_one_process(
    model: str, context: RoleSpec, generation: RoleSpec, tmp_path: Path, seed: int
) -> None:
    """In float32 every token must be the same, and the logits within the reference's tolerance."""
    artifact = compiled(tmp_path / "artifact", model, 3, "float32", context, generation)
    found = launch(artifact, [1, 5, 40, 300], 48, tmp_path, seed)
    assert found["verify"]["first_difference"] is None


@pytest.mark.parametrize("groups", [1, 2])
def test_deepseek_v3_lite_in_bfloat16(groups: int, tmp_path: Path, seed: int) -> None:
    """The whole model, `ctx tp2 / gen tp1 cp2`, random weights: within the stated bfloat16 tolerance."""
    generation = role(cp=2, block=32, batch=4, hop_groups=groups)
    artifact = compiled(tmp_path / "artifact", "deepseek-v3-lite", None, "bfloat16", role(tp=2), generation)
    found = launch(artifact, [1, 7, 100, 400], 64, tmp_path, seed)
    assert found["metrics"]["handoff_bytes"] == 508 * 27 * 576 * 2
    assert sum(found["metrics"]["kv_tokens_per_rank"].values()) == 508 + 4 * 63


def test_512_steps_from_an_empty_second_shard(tmp_path: Path, seed: int) -> None:
    """Every step within the tolerance of the unsharded model, every token with one owner, two runs identical."""
    artifact = compiled(tmp_path / "artifact", "deepseek-v3-lite", None, "bfloat16", role(tp=2), role(cp=2, block=32))
    lengths, steps = [1, 31], 512  # within one block of 32, so that the second rank has nothing to attend to at first
    runs = [launch(artifact, lengths, steps, tmp_path / name, seed) for name in ("first", "second")]
    tokens = [[request["token_ids"] for request in run["requests"]] for run in runs]
    assert tokens[0] == tokens[1]
    for run in runs:
        stored = run["metrics"]["kv_tokens_per_rank"]
        assert sum(stored.values()) == sum(length + steps - 1 for length in lengths) and min(stored.values()) > 480
