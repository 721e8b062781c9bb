"""The plan against hand-written tables and counting."""

from __future__ import annotations

import itertools
import json
import random
import time
from dataclasses import replace
from typing import Any

import pytest

from helixc.hardware import GPUS
from helixc.model import read_model
from helixc.plan.collectives import by_request, handoff
from helixc.plan.exchange_space import exchange_space
from helixc.plan.footprint import footprints
from helixc.plan.lower import lower
from helixc.plan.mapping import Mapping, stages
from helixc.plan.place import place
from helixc.plan.show import to_text
from helixc.plan.verify import find_flaws
from helixc.spec.spec import Hardware, RoleSpec
from helixc_runtime.manifest import (
    DTYPE_BYTES,
    ManifestError,
    global_position,
    local_length,
    local_slot,
    owner,
    plan_from_json,
    split,
    to_json,
)
from tests.deployments import plan_of, role, spec

# rank: (pp, tp, cp), tp group, cp group, pp group, ffn tp rank, ffn tp, moe tp, moe ep groups: the semantics' example.
TP2_CP2_PP2_EP2 = {
    0: ((0, 0, 0), (0, 2), (0, 1), (0, 4), 0, (0, 1, 2, 3), (0, 2), (0, 1)),
    1: ((0, 0, 1), (1, 3), (0, 1), (1, 5), 1, (0, 1, 2, 3), (1, 3), (0, 1)),
    2: ((0, 1, 0), (0, 2), (2, 3), (2, 6), 2, (0, 1, 2, 3), (0, 2), (2, 3)),
    3: ((0, 1, 1), (1, 3), (2, 3), (3, 7), 3, (0, 1, 2, 3), (1, 3), (2, 3)),
    4: ((1, 0, 0), (4, 6), (4, 5), (0, 4), 0, (4, 5, 6, 7), (4, 6), (4, 5)),
    5: ((1, 0, 1), (5, 7), (4, 5), (1, 5), 1, (4, 5, 6, 7), (5, 7), (4, 5)),
    6: ((1, 1, 0), (4, 6), (6, 7), (2, 6), 2, (4, 5, 6, 7), (4, 6), (6, 7)),
    7: ((1, 1, 1), (5, 7), (6, 7), (3, 7), 3, (4, 5, 6, 7), (5, 7), (6, 7)),
}


@pytest.mark.parametrize("rank", range(8))
def test_mapping_of_the_semantics_table(rank: int) -> None:
    mapping = Mapping(tp=2, cp=2, pp=2, moe_ep=2)
    at, groups = mapping.coordinates(rank), mapping.groups(rank, first=0)
    found = ((at.pp, at.tp, at.cp), groups.tp, groups.cp, groups.pp, at.ffn_tp)
    assert (*found, groups.ffn_tp, groups.moe_tp, groups.moe_ep) == TP2_CP2_PP2_EP2[rank]


def test_groups_are_global_ranks() -> None:
    plan = plan_of("llama-3.1-8b", role(tp=2), role(n=2, tp=2, cp=2))
    assert plan.ranks[2].groups.ffn_tp == (2, 3, 4, 5)
    assert plan.ranks[9].groups.cp == (8, 9)
    assert [i.ranks for i in plan.instances] == [(0, 1), (2, 3, 4, 5), (6, 7, 8, 9)]


def test_ownership_against_counting() -> None:
    for _ in range(50):
        block, cp = random.randint(1, 40), random.randint(1, 9)
        owned: list[list[int]] = [[] for _ in range(cp)]
        for position in range(random.randint(0, 400)):
            owned[(position // block) % cp].append(position)
            rank = owner(position, block, cp)
            assert owned[rank][-1] == position
            assert local_slot(position, block, cp) == len(owned[rank]) - 1
            assert global_position(len(owned[rank]) - 1, block, cp, rank) == position
            assert [local_length(position + 1, block, cp, r) for r in range(cp)] == [len(o) for o in owned]


def test_seed_example_of_ownership() -> None:
    """ISL 7, two ranks, blocks of 4: tokens 0-3 on rank 0, 4-6 on rank 1, and the first new token on rank 1."""
    assert [owner(p, 4, 2) for p in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [local_length(7, 4, 2, r) for r in (0, 1)] == [4, 3]


def test_split_gives_the_first_parts_more() -> None:
    assert [split(10, 4, i) for i in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]
    assert stages(61, 4, None) == ((0, 16), (16, 31), (31, 46), (46, 61))
    assert stages(4, 2, (3, 1)) == ((0, 3), (3, 4))


MODELS = ("deepseek-v3", "deepseek-v3-lite", "llama-3.1-70b", "qwen3-8b", "qwen3-235b-a22b")


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_proves(model: str) -> None:
    for tp, cp, pp, dp, ctx_tp, ctx_dp in itertools.product(
        (1, 2, 4), (1, 2, 4), (1, 3), (False, True), (1, 2, 8), (False, True)
    ):
        ep = random.choice([n for n in (1, 2, 4, 8, 16) if (tp * cp) % n == 0])
        plan = plan_of(model, role(tp=ctx_tp, pp=2, dp=ctx_dp), role(n=2, tp=tp, cp=cp, pp=pp, ep=ep, dp=dp))
        assert find_flaws(plan) == [], (tp, cp, pp, dp, ctx_tp, ctx_dp, ep)


def test_weights_of_all_ranks_add_up_to_the_model() -> None:
    """DeepSeek-V3 has 671 billion parameters; replicated ones count once a rank."""
    plan = plan_of("deepseek-v3", None, role(), load_format="dummy", dtype="bfloat16")
    assert plan.reference.memory.weights / 2 == pytest.approx(671.03e9, rel=1e-3)
    for name, size in (("llama-3.1-8b", 8.03e9), ("llama-3.1-70b", 70.55e9), ("qwen3-235b-a22b", 235.1e9)):
        assert plan_of(name, None, role(), dtype="bfloat16").reference.memory.weights / 2 == pytest.approx(
            size, rel=2e-3
        )


def test_kv_per_token_of_deepseek_v3() -> None:
    """576 elements a layer, the same on every rank: MLA's latent is not split by heads."""
    plan = plan_of("deepseek-v3", role(tp=8), role(tp=2, cp=4), dtype="bfloat16")
    assert {r.memory.kv_per_token for r in plan.ranks} == {61 * 576 * 2}


@pytest.mark.parametrize(
    ("model", "sizes", "token"),
    [
        ("deepseek-v3", {"tp": 2, "cp": 4}, 61 * (576 + 1)),
        ("llama-3.1-70b", {"tp": 2, "cp": 4}, 80 * 4 * 2 * (128 + 1)),
        ("llama-3.1-70b", {"tp": 2, "pp": 2}, 40 * 4 * 2 * (128 + 1)),
    ],
)
def test_an_fp8_token_is_its_elements_and_scales(
    model: str, sizes: dict[str, int], token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored, handed over, read by the kernels and compared with the GPU is the same number of bytes."""
    monkeypatch.setenv("HELIXC_HOST_HANDOFF", "1")  # what peers write is no message
    context, generation = role(tp=2, kv_dtype="fp8"), role(kv_dtype="fp8", **sizes)
    plan = plan_of(model, context, generation, dtype="bfloat16")
    assert plan.model.kv_dtype == "float8_e4m3fn"
    ranks = [plan.ranks[i] for i in plan.instances[1].ranks]
    assert {r.memory.kv_per_token for r in ranks} == {token}
    weights_and_workspace = {(r.memory.total - r.memory.weights - r.memory.workspace) for r in ranks}
    assert weights_and_workspace == {token * r.memory.kv_capacity_tokens for r in ranks}
    bfloat16 = plan_of(model, role(tp=2), role(**sizes), dtype="bfloat16")
    kept = [[r.memory.kv_per_token for r in p.ranks if r.role == "context"] for p in (plan, bfloat16)]
    assert kept[0] == kept[1], "a prompt's KV is converted when it is handed over"
    deployment = lower(spec(model, context, generation, dtype="bfloat16"), plan.model.arch)
    assert {f.memory.kv_per_token for f in footprints(deployment, deployment.generation)} == {token}
    (moved,) = by_request(plan, *plan.instances)
    for rank in ranks:
        programs = handoff(plan, *plan.instances, moved)
        assert sum(op.size for op in programs[rank.rank] if op.kind == "take") == token
    assert plan_from_json(to_json(plan)) == plan
    assert "bfloat16, KV float8_e4m3fn, weights" in to_text(plan) and "KV float" not in to_text(bfloat16)


def test_shared_gpus_start_over() -> None:
    plan = plan_of("deepseek-v3-lite", role(tp=2), role(cp=2), hardware=Hardware(1, 2, True))
    assert [(r.node, r.device) for r in plan.ranks] == [(0, 0), (0, 1), (0, 0), (0, 1)]
    apart = plan_of("deepseek-v3-lite", role(tp=2), role(cp=2), hardware=Hardware(2, 2, False))
    assert [(r.node, r.device) for r in apart.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_tied_embeddings_on_one_stage_are_held_once() -> None:
    plan = plan_of("qwen3-8b", None, role())
    assert plan.reference.memory.weights == 8_190_735_360 * 4
    tied = lower(spec("qwen3-8b", None, role()), replace(plan.model.arch, tie_embeddings=True))
    one_stage = place(tied, lambda *_: ())
    assert one_stage.reference.memory.weights == (8_190_735_360 - 151936 * 4096) * 4


def test_json_is_deterministic_and_reads_back() -> None:
    plan = plan_of("kimi-k2", role(tp=4), role(n=2, tp=2, cp=4, ep=8))
    text = to_json(plan)
    assert to_json(plan_of("kimi-k2", role(tp=4), role(n=2, tp=2, cp=4, ep=8))) == text
    assert plan_from_json(text) == plan
    data = json.loads(text)
    assert data["name"] == "ctxtp4_gen2xtp2cp4ep8"
    assert data["ranks"][4]["groups"]["cp"] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=99), "plan schema 99"),
        (lambda d: d["ranks"][1].pop("cp_rank"), r"\$.ranks\[1\]: missing key 'cp_rank'"),
        (lambda d: d["ranks"][0]["groups"].update(dp=[0]), r"\$.ranks\[0\].groups: unknown key 'dp'"),
        (lambda d: d["ranks"][0].update(device="0"), r"\$.ranks\[0\].device: expected int, got '0'"),
        (lambda d: d["model"].update(dtype="int8"), r"\$.model.dtype: expected one of"),
        (lambda d: d["ranks"][0].update(layers=[1]), r"\$.ranks\[0\].layers: expected an array"),
    ],
)
def test_a_damaged_plan_names_the_place(change: object, message: str) -> None:
    data = json.loads(to_json(plan_of("qwen3-8b", role(), role(cp=2))))
    change(data)  # type: ignore[operator]
    with pytest.raises(ManifestError, match=message):
        plan_from_json(json.dumps(data))


def test_2048_ranks_in_seconds() -> None:
    """32 generation instances of tp8 cp8. The bound is loose on purpose; bench/plan.py measures."""
    start = time.perf_counter()
    plan = plan_of("deepseek-v3", role(tp=8), role(n=32, tp=8, cp=8, ep=64), dtype="bfloat16")
    assert find_flaws(plan) == []
    to_json(plan)
    assert len(plan.ranks) == 2056
    assert time.perf_counter() - start < 10


def test_text_shows_ranks_and_repurposing() -> None:
    text = to_text(plan_of("deepseek-v3", role(tp=2), role(n=3, tp=2, cp=2, ep=4)))
    assert "attention  pp 1 x tp 2 x cp 2" in text
    assert "the same ranks as pp 1 x tp 4, experts as moe_tp 1 x moe_ep 4" in text
    assert "the other 2 of them alike: ranks 6 to 13" in text


@pytest.mark.parametrize(
    ("generation", "transports"),
    [
        (role(cp=4), ("one_sided", 8)),
        (role(tp=2, cp=2), ("one_sided", 8)),  # ranks 1 to 4 of the first host
        (role(tp=4, cp=2), ("collective", 0)),  # GPUs 1 to 8: the last cp group is on two hosts
        (role(tp=2, cp=7), ("one_sided", 0)),
        (role(tp=4), ("collective", 8)),
        (role(tp=4, batch=4096), ("collective", 8 * 2**20 // (3 * 4096 * 4))),
        (role(), ("collective", 0)),
    ],
)
def test_ranks_of_one_host_are_one_sided(
    generation: RoleSpec, transports: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one context rank, on hosts of 8 GPUs."""
    monkeypatch.delenv("HELIXC_COLLECTIVES", raising=False)
    context, instance = plan_of("qwen3-8b", role(), generation).instances
    assert (context.exchange, context.reduce_rows) == ("collective", 0)
    assert (instance.exchange, instance.reduce_rows) == transports
    monkeypatch.setenv("HELIXC_COLLECTIVES", "1")
    _, instance = plan_of("qwen3-8b", role(), generation).instances
    assert (instance.exchange, instance.reduce_rows) == ("collective", 0)


@pytest.mark.parametrize(
    ("gpu", "cp", "fewest"),
    [(None, 2, 19), ("h200", 8, 19), ("h100", 2, 30), ("b200", 2, 25), (None, 16, 4), ("gb200", 8, 4)],
)
def test_from_how_many_rows_values_are_exchanged(
    gpu: str | None, cp: int, fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the 8 GPUs of a host, or 4 of gb200, the exchange is NCCL's."""
    monkeypatch.delenv("HELIXC_COLLECTIVES", raising=False)
    hardware = Hardware(None, GPUS[gpu].gpus_per_node if gpu else 8, False, gpu)

    def chosen(model: str, **sizes: Any) -> str:
        return exchange_space(role(cp=cp, **sizes), read_model(model), hardware)

    for tp in (1, 4):
        assert {chosen("deepseek-v3", tp=tp, batch=rows) for rows in (1, fewest - 1)} == {"latent"}
        assert {chosen("deepseek-v3", tp=tp, batch=rows) for rows in (fewest, 4096)} == {"value"}
    assert chosen("deepseek-v3", batch=fewest, exchange_space="latent") == "latent"
    assert chosen("deepseek-v3", batch=1, exchange_space="value") == "value"
    assert chosen("llama-3.1-8b", batch=1) == "value"


@pytest.mark.parametrize(("tp", "cp", "dtype"), [(1, 2, "bfloat16"), (4, 8, "float32")])
def test_the_choice_is_the_faster_one(tp: int, cp: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank's whole exchange and product, in bytes: heads, tp, cp and dtype cancel."""
    monkeypatch.delenv("HELIXC_COLLECTIVES", raising=False)
    arch, size, gpu = read_model("deepseek-v3"), DTYPE_BYTES[dtype], GPUS["h200"]

    def seconds(space: str, rows: int) -> float:
        attended, held = 128 // tp, 128 // tp // cp
        width, heads = (512, held) if space == "latent" else (128, attended)
        sent = rows * (attended - held) * (width * size + 4)
        read = heads * (512 * 128 + rows * (512 + 128)) * size
        return sent / (gpu.nvlink * 0.7) + read / (gpu.bandwidth * 0.7)

    for rows in range(1, 100):
        faster = min(("latent", "value"), key=lambda space: seconds(space, rows))
        assert exchange_space(role(tp=tp, cp=cp, batch=rows), arch, Hardware(None, 8, False)) == faster


def test_without_one_sided_kernels_values_pay_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIXC_COLLECTIVES", "1")
    plan = plan_of("deepseek-v3", None, role(cp=2, batch=4))
    assert [rank.exchange_space for rank in plan.ranks] == ["value"] * 2
    monkeypatch.delenv("HELIXC_COLLECTIVES")
    plan = plan_of("deepseek-v3", None, role(cp=2, batch=4))
    assert [rank.exchange_space for rank in plan.ranks] == ["latent"] * 2


def test_values_take_all_of_w_uv() -> None:
    """Its 64 heads of the other rank and, of a batch, partials beside the values; told in words."""
    plans = [plan_of("deepseek-v3", None, role(cp=2, batch=4, exchange_space=space)) for space in ("latent", "value")]
    latent, value = (plan.ranks[0].memory for plan in plans)
    assert value.weights - latent.weights == 61 * 64 * 512 * 128 * 4
    lse = 2 * (8 - 1)  # of a head's latent, for each of its eight pieces
    assert value.workspace - latent.workspace == 4 * 128 * (512 - 2 * (512 - 128) - lse) * 4
    texts = [to_text(plan) for plan in plans]
    assert "exchange one-sided in latent space, W_UV read of 64 heads instead of 128;" in texts[0]
    assert "exchange one-sided after W_UV, 128 columns a head instead of 512;" in texts[1]


def test_instances_choose_for_themselves() -> None:
    """Three instances of 3 GPUs on hosts of 8: the third is torn, and its ranks have other kernels."""
    plan = place(
        lower(spec("qwen3-8b", None, role(n=3, cp=3)), read_model("qwen3-8b")), lambda m, r, i, b: (i.exchange,)
    )
    assert [instance.exchange for instance in plan.instances] == ["one_sided", "one_sided", "collective"]
    assert [rank.kernels[0] for rank in plan.ranks] == ["one_sided"] * 6 + ["collective"] * 3
