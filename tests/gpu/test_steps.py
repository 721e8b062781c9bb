"""Captured decode steps of one rank, whose kernels start before those they follow have ended: they must give the bits
that the same kernels give one by one. A rank of two has its peer looped back.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.loopback import alone
from helixc.spec.spec import RoleSpec
from helixc_runtime.artifact import Artifact, load
from helixc_runtime.comm import TorchComm
from helixc_runtime.engine import load_decoder, make_ops
from helixc_runtime.events import Emitter
from helixc_runtime.kv import KvCache, pages_needed
from helixc_runtime.manifest import Rank
from helixc_runtime.models.decoder import Decoder
from helixc_runtime.step import DecodeStep, RowInput
from tests.deployments import role
from tests.gpu.launches import compiled

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

STEPS, TOKENS = 48, 1024


def run(artifact: Artifact, rank: Rank, decoder: Decoder, lengths: list[int], seed: int) -> list[Tensor]:
    """The tokens of each step, and the caches after the last."""
    device, block = decoder.device, artifact.plan.tokens_per_block
    generator = torch.Generator(device).manual_seed(seed)
    with Path(os.devnull).open("wb") as silent:
        ops = make_ops(artifact, rank, device, Emitter(silent.fileno(), rank.rank))
    width = pages_needed(TOKENS, block, len(rank.groups.cp))
    cache = KvCache(artifact.plan.model, rank, block, len(lengths), width, device)
    for pool in (pool for layer in cache.layers for pool in (layer.k, layer.v) if pool is not None):
        pool.normal_(generator=generator)
    pages = torch.randperm(len(cache.layers[0].k), generator=generator, device=device)
    cache.table.copy_(pages[: cache.table.numel()].view_as(cache.table))
    step, tokens = DecodeStep(decoder, ops, cache), []
    step.capture(sampled=False)
    step.assign([RowInput(slot, slot, length, True, 0.0, 1.0, 0) for slot, length in enumerate(lengths)])
    for _ in range(STEPS):
        result = step()
        assert result is not None
        tokens.append(result.tokens[: len(lengths)].clone())
    torch.cuda.synchronize(device)
    decoder.comm.check()
    return [torch.stack(tokens), cache.arena.memory.clone()]


@pytest.mark.parametrize(
    ("model", "generation"),
    [
        ("deepseek-v3-lite", role(block=64, batch=3)),
        ("deepseek-v3-lite", role(cp=2, block=64, batch=3)),
        ("deepseek-v3", role(cp=2, block=64, batch=3)),
        ("llama-3.1-8b", role(cp=2, block=32, batch=3)),
    ],
    ids=["mla", "mla cp2", "mla cp2, queries of low rank", "gqa cp2"],
)
@torch.inference_mode()
def test_captured_steps_are_those_of_kernels_one_by_one(
    model: str, generation: RoleSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    layers = 5 if model == "deepseek-v3" else 3  # its first three have no experts
    folder = compiled(tmp_path / "artifact", model, layers, "bfloat16", role(), generation, max_seq_len=TOKENS)
    artifact, device = load(folder), torch.device("cuda", torch.cuda.current_device())
    rank = next(rank for rank in artifact.plan.ranks if rank.role == "generation")
    with Path(os.devnull).open("wb") as silent:
        decoder = load_decoder(artifact.plan, rank, TorchComm(rank, {}), device, Emitter(silent.fileno(), rank.rank))
    found = []
    for sync in ("0", "1"):
        monkeypatch.setenv("HELIXC_SYNC", sync)
        comm = alone(artifact, rank, device, 10.0) if len(rank.groups.ffn_tp) > 1 else decoder.comm
        found.append(run(artifact, rank, replace(decoder, comm=comm), [700, 3, 130], seed))
    captured, one_by_one = found
    assert len(captured[0].unique()) > 3, "the tokens must tell steps apart"
    assert all(map(torch.equal, captured, one_by_one)), f"{seed=}"
