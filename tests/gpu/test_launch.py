"""Whole launches with `--device cuda`: context and generation ranks share the GPUs, and --verify must pass.

On a single GPU all ranks share it. What gathers logits, as --verify does, then goes over gloo, which no graph can hold:
the steps that --verify sees are launched one by one, and a second launch, of captured steps, must give the same tokens.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helixc.spec.spec import RoleSpec
from tests.deployments import role
from tests.gpu.launches import compiled, launch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SHARED = torch.cuda.device_count() < 2
WHOLE = 3 if SHARED else None  # layers: those of two ranks wait for each other by time slices


def verified(artifact: Path, lengths: list[int], max_tokens: int, directory: Path, seed: int) -> dict[str, Any]:
    """What a launch with --verify reports. Requests start in the same steps whenever their prompts are ready."""
    run = partial(launch, artifact, lengths, max_tokens, HELIXC_DETERMINISTIC="1")
    if not SHARED:
        return run(directory, seed, "--verify")
    found = run(directory / "eager", seed, "--verify", HELIXC_EAGER="1")
    again = run(directory / "captured", seed)
    assert tokens_of(again) == tokens_of(found)
    return found


def tokens_of(found: dict[str, Any]) -> list[list[int]]:
    return [request["token_ids"] for request in found["requests"]]


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
    found = verified(artifact, [1, 5, 40, 300], 48, tmp_path, seed)
    assert found["verify"]["first_difference"] is None


@pytest.mark.parametrize("groups", [1, 2])
def test_deepseek_v3_lite_in_bfloat16(groups: int, tmp_path: Path, seed: int) -> None:
    """`ctx tp2 / gen tp1 cp2`, random weights, the whole model on two GPUs: within the stated bfloat16 tolerance."""
    generation = role(cp=2, block=32, batch=4, hop_groups=groups)
    artifact = compiled(tmp_path / "artifact", "deepseek-v3-lite", WHOLE, "bfloat16", role(tp=2), generation)
    found = verified(artifact, [1, 7, 100, 400], 64, tmp_path, seed)
    expected = 508 * (WHOLE or 27) * 576 * 2
    assert found["metrics"]["handoff_bytes"] == found["metrics"]["handoff_peer_bytes"] == expected
    assert sum(found["metrics"]["kv_tokens_per_rank"].values()) == 508 + 4 * 63


def test_512_steps_from_an_empty_second_shard(tmp_path: Path, seed: int) -> None:
    """Every step within the tolerance of the unsharded model, every token with one owner, two runs identical."""
    artifact = compiled(tmp_path / "artifact", "deepseek-v3-lite", WHOLE, "bfloat16", role(tp=2), role(cp=2, block=32))
    lengths, steps = [1, 31], 512  # within one block of 32, so that the second rank has nothing to attend to at first
    runs = [verified(artifact, lengths, steps, tmp_path / name, seed) for name in ("first", "second")]
    assert tokens_of(runs[0]) == tokens_of(runs[1])
    for run in runs:
        stored = run["metrics"]["kv_tokens_per_rank"]
        assert sum(stored.values()) == sum(length + steps - 1 for length in lengths) and min(stored.values()) > 480
