"""One decode step: who owns what, padding, and that nothing in it waits for the host."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.tiny_checkpoint import make_checkpoint
from helixc_runtime.attention_shape import AttentionShape, attention_shape
from helixc_runtime.comm import TorchComm
from helixc_runtime.ffn_shape import FfnShape, ffn_shape
from helixc_runtime.kv import KvCache, Row
from helixc_runtime.manifest import Moe, Plan, local_length, local_slot, owner
from helixc_runtime.models import layers
from helixc_runtime.models.decoder import Decoder
from helixc_runtime.models.layers import gated_mlp, mixture, route
from helixc_runtime.models.rotary import Rotary
from helixc_runtime.ops import (
    DecodeBatch,
    GatedMlp,
    LayerCache,
    Mixture,
    MlaProjections,
    Norm,
    Ops,
    Partial,
    Projections,
)
from helixc_runtime.ops_torch import TorchOps
from helixc_runtime.step import DecodeStep, RowInput, padded_sizes
from helixc_runtime.weights import Weights, load_weights
from tests.deployments import plan_of, role

FAMILIES = ("deepseek-v3-lite", "deepseek-v2", "qwen3-moe", "llama", "qwen3")
CPU, META = torch.device("cpu"), torch.device("meta")
ROWS, WIDTH = 5, 6


def test_batches_are_padded_to_powers_of_two_or_the_largest() -> None:
    assert padded_sizes(1) == [1]
    assert padded_sizes(8) == [1, 2, 4, 8]
    assert padded_sizes(11) == [1, 2, 4, 8, 11]


@pytest.mark.parametrize("cp", [1, 2, 3, 5])
def test_a_batch_says_what_the_formulas_say(cp: int, tmp_path: Path) -> None:
    seed = random.randrange(2**31)
    source, block = random.Random(seed), 4
    plan = _plan("llama", tmp_path, cp=cp, block=block)
    positions = [source.randrange(WIDTH * block * cp) for _ in range(ROWS)]
    attended = [source.random() < 0.7 for _ in range(ROWS)]
    owners = [0] * ROWS
    for rank in plan.ranks:
        if rank.role == "context":
            continue
        cache = KvCache(plan.model, rank, block, ROWS + 2, WIDTH, CPU)
        cache.table.copy_(torch.randint(100, cache.table.shape, dtype=torch.int32))
        rotary = Rotary(plan.model.arch.rope, plan.model.arch.rope_dim, CPU)
        batch = cache.batch(torch.tensor(positions), torch.tensor(attended), rotary)
        for row, (position, mine) in enumerate(zip(positions, attended, strict=True)):
            note = f"{seed=} {rank.cp_rank=} {position=}"
            length = local_length(position + 1, block, cp, rank.cp_rank) if mine else 0
            assert batch.lengths[row] == length, note
            assert batch.owned[row] == (mine and owner(position, block, cp) == rank.cp_rank), note
            owners[row] += int(batch.owned[row])
            if batch.owned[row]:
                page, offset = divmod(local_slot(position, block, cp), block)
                assert batch.slots[row] == cache.table[row, page] * block + offset, note
    assert owners == [int(mine) for mine in attended], f"{seed=}: each attended row has one owner"


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, tmp_path: Path) -> None:
    """Rows at slots 0 and 3 of 8, against the same rows at slots 0 and 1 of 2: same logits, same cache."""
    plan, seed = _plan(family, tmp_path), random.randrange(2**31)
    results = {}
    for slots in ((0, 1), (0, 5)):
        generator = torch.Generator().manual_seed(seed)
        decoder, cache, ops = _parts(plan, CPU, 8)
        for layer in cache.layers:
            for pages in (layer.k, layer.v):
                if pages is not None:
                    pages.copy_(torch.randn(pages.shape, generator=generator))
        step = DecodeStep(decoder, ops, cache, keep_logits=True)
        inputs = []
        for index, slot in enumerate(slots):
            cache.reserve(Row(index, slot, 20, 40))
            inputs.append(RowInput(slot, 17 + index, 20 + 3 * index, True, 0.8 * index, 0.9, seed))
        step.assign(inputs)
        result = step()
        assert result is not None and result.logits is not None
        assert len(result.tokens) == {(0, 1): 2, (0, 5): 8}[slots]
        results[slots] = [(result.logits[slot].clone(), int(result.tokens[slot])) for slot in slots], cache.layers
    (alone, caches), (padded, padded_caches) = results.values()
    for (logits, token), (other, other_token) in zip(alone, padded, strict=True):
        assert (logits - other).abs().max() <= 1e-4, f"{seed=}"
        assert token == other_token, f"{seed=}"
    for one, two in zip(caches, padded_caches, strict=True):
        assert (one.k - two.k).abs().max() <= 1e-4
        assert (one.k != two.k).sum() <= one.k[:1].numel(), "at most the new tokens are rounded otherwise"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draws", [False, True])
def test_a_step_reads_nothing_on_the_host(family: str, draws: bool, tmp_path: Path) -> None:
    """On tensors without values: what needs one, or another device's memory, fails."""
    decoder, cache, ops = _parts(_plan(family, tmp_path, dtype="bfloat16"), META, 8)
    result = DecodeStep(decoder, ops, cache)._compute(4, draws)
    assert result is not None
    assert result.tokens.shape == (4,)


def test_a_host_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, cache, ops = _parts(_plan("qwen3-moe", tmp_path, dtype="bfloat16"), META, 8)

    def reading(moe: Moe, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        experts, factors = route(moe, logits, bias)
        assert torch.unique(experts).tolist()
        return experts, factors

    monkeypatch.setattr("helixc_runtime.models.layers.route", reading)
    with pytest.raises((RuntimeError, NotImplementedError)):
        DecodeStep(decoder, ops, cache)._compute(4, draws=False)


@pytest.mark.parametrize("routed_rows", [3, layers.ROUTED_ROWS])
@pytest.mark.parametrize("experts", [(0, 8), (0, 3), (5, 8), (2, 3)])
def test_the_mixture_is_the_sum_over_its_experts(
    experts: tuple[int, int], routed_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loop over rows and experts; other ranks' experts, and experts that no row chose, add nothing."""
    monkeypatch.setattr(layers, "ROUTED_ROWS", routed_rows)
    seed = random.randrange(2**31)
    plan = _plan("deepseek-v3-lite", tmp_path, seed=seed)
    rank, arch = plan.ranks[-1], plan.model.arch
    assert arch.moe
    layer = next(i for i in range(arch.num_layers) if arch.is_moe(i))
    weights = load_weights(plan.model, plan.shards[rank.shard], CPU, lambda *_: None)
    x = torch.randn(7, arch.hidden_size, generator=torch.Generator().manual_seed(seed))
    lo, hi = experts
    chosen, factors = route(arch.moe, F.linear(x, weights("router", layer)), weights.get("router_bias", layer))
    gate, up, down = (weights(f"expert_{part}", layer) for part in ("gate", "up", "down"))
    want = gated_mlp(x, *(weights(f"shared_{part}", layer) for part in ("gate", "up", "down")))
    for row in range(len(x)):
        for expert, factor in zip(chosen[row].tolist(), factors[row], strict=True):
            if lo <= expert < hi:
                want[row] += factor * gated_mlp(x[row], gate[expert], up[expert], down[expert])
    part = _Slice(weights, lo, hi)
    got = mixture(part, layer, arch.moe, replace(rank, experts=experts), x)
    assert (got - want).norm() / want.norm() <= 1e-5, f"{seed=}"


@pytest.mark.parametrize(("family", "names"), [("llama", ("q", "k", "v")), ("deepseek-v2", ("q_a", "kv_a"))])
def test_projections_of_the_same_input_are_one_matrix(family: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """Without a copy, also once widened; and a copy where they lie apart."""
    plan = _plan(family, tmp_path, dtype="bfloat16")
    weights = load_weights(plan.model, plan.shards[plan.ranks[-1].shard], CPU, lambda *_: None)
    for _ in range(2):
        parts = [weights(name, 0) for name in names]
        whole = weights.fused(names, 0)
        assert torch.equal(whole, torch.cat(parts)) and whole.data_ptr() == parts[0].data_ptr()
        weights.to_float32()
    assert whole.dtype == torch.float32
    apart = Weights({(name, 0): part.clone() for name, part in zip(names, parts, strict=True)})
    assert torch.equal(apart.fused(names, 0), whole)


def test_absorbed_queries_are_multiplied_by_rows(tmp_path: Path) -> None:
    plan = _plan("deepseek-v3-lite", tmp_path)
    weights = load_weights(plan.model, plan.shards[plan.ranks[-1].shard], CPU, lambda *_: None)
    assert weights("k_up", 0).transpose(1, 2).is_contiguous()


class _Slice(Weights):
    """The weights of a rank that has experts [lo, hi)."""

    def __init__(self, whole: Weights, lo: int, hi: int) -> None:
        super().__init__({key: t[lo:hi] if key[0].startswith("expert_") else t for key, t in whole._tensors.items()})


class _Nothing:
    """Ops that compute nothing, of the right shapes, without a host read, as CudaOps."""

    def __init__(self, shape: AttentionShape, ffn: FfnShape) -> None:
        self.shape, self.ffn = shape, ffn

    def make_batch(self, cache: KvCache, positions: Tensor, attends: Tensor, rotary: Rotary) -> DecodeBatch:
        return TorchOps.make_batch(TorchOps(self.shape), cache, positions, attends, rotary)

    def begin_step(self, batch: DecodeBatch) -> None:
        pass

    def embed(self, tokens: Tensor, table: Tensor, first: int) -> Tensor:
        return table.new_empty(len(tokens), table.shape[1])

    def append(self, new: Projections, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        q = new.q_latent if isinstance(new, MlaProjections) else new.q
        return q.new_empty(len(q), self.shape.heads, self.shape.head_dim)

    def attend(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
        size = (len(q), self.shape.heads)
        return Partial(q.new_empty(*size, self.shape.partial_dim), q.new_empty(size, dtype=torch.float32))

    attend_split = attend

    def combine(self, o: Tensor, lse: Tensor) -> Partial:
        return Partial(o[0], lse[0])

    def add_norm(
        self, x: Tensor, residual: Tensor | None, bias: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return layers.linear(x, weight)

    def argmax(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.argmax(x, -1, out=out)

    def mlp(self, x: Tensor, weights: GatedMlp) -> Tensor:
        return gated_mlp(x, weights.gate, weights.up, weights.down)

    def mixture(self, x: Tensor, weights: Mixture) -> Tensor:
        assert self.ffn.moe and self.ffn.experts
        return layers.mix(self.ffn.moe, self.ffn.experts, weights, x)


def _plan(family: str, folder: Path, *, cp: int = 1, block: int = 4, seed: int = 0, dtype: str = "float32") -> Plan:
    checkpoint = make_checkpoint(family, folder / "checkpoint", seed=seed, layers=3)
    return plan_of(str(checkpoint), role(), role(cp=cp, block=block), dtype=dtype)


def _parts(plan: Plan, device: torch.device, rows: int) -> tuple[Decoder, KvCache, Ops]:
    rank = plan.ranks[-1]
    weights = load_weights(plan.model, plan.shards[rank.shard], device, lambda *_: None)
    decoder = Decoder(plan.model.arch, rank, weights, TorchComm(rank, {}), device, getattr(torch, plan.model.dtype))
    shape = attention_shape(plan.model, rank, plan.tokens_per_block)
    ffn = ffn_shape(plan.model, rank, plan.instance_of(rank))
    cache = KvCache(plan.model, rank, plan.tokens_per_block, rows, 20, device)
    return decoder, cache, TorchOps(shape, ffn) if device == CPU else _Nothing(shape, ffn)
