"""Helix decode over gloo ranks against transformers in float32: every layout, every architecture, fresh weights."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from examples.tiny_checkpoint import make_checkpoint
from helixc.plan.verify import verify
from helixc.spec.spec import RoleSpec
from helixc_runtime.job import Request
from helixc_runtime.sampling import could_sample, sample
from tests.deployments import plan_of, role
from tests.dist.exactness import Comparison, compare, drawn, random_prompts, routing_gap
from tests.dist.harness import deploy, request

MOE = ("deepseek-v3-lite", "deepseek-v2", "qwen3-moe")
FAMILIES = (*MOE, "llama", "qwen3")
LAYOUTS = [(tp, cp, pp) for tp in (1, 2) for cp in (1, 2, 3, 4) for pp in (1, 2)]
LARGE = {  # of four ranks and more, for which two cores take long: each with two families, MLA and GQA
    (1, 2, 2): ("deepseek-v2", "qwen3-moe"),
    (1, 3, 2): ("deepseek-v3-lite", "llama"),
    (1, 4, 1): ("deepseek-v2", "qwen3"),
    (1, 4, 2): ("deepseek-v3-lite", "qwen3"),
    (2, 1, 2): ("deepseek-v3-lite", "qwen3"),
    (2, 2, 1): ("deepseek-v3-lite", "qwen3-moe"),
    (2, 2, 2): ("deepseek-v2", "llama"),
    (2, 3, 1): ("deepseek-v2", "qwen3"),
    (2, 3, 2): ("deepseek-v3-lite", "qwen3-moe"),
    (2, 4, 1): ("deepseek-v2", "qwen3"),
    (2, 4, 2): ("deepseek-v3-lite", "llama"),
}


@pytest.mark.parametrize(
    ("tp", "cp", "pp", "family"), [(*layout, f) for layout in LAYOUTS for f in LARGE.get(layout, FAMILIES)]
)
def test_every_layout_equals_transformers(tp: int, cp: int, pp: int, family: str, tmp_path: Path) -> None:
    """64 greedy tokens for a batch of prompts so short that some cp ranks start empty, and longer ones."""
    drawn(lambda folder: check_layout(family, tp, cp, pp, folder), tmp_path)


def check_layout(family: str, tp: int, cp: int, pp: int, folder: Path) -> Comparison:
    """One random deployment of a layout."""
    seed = random.randrange(2**31)
    pick = random.Random(seed)
    ep = pick.choice([n for n in (1, 2, 3, 4, 6, 8) if tp * cp % n == 0]) if family in MOE else None
    block, context = pick.choice((4, 32)), role(tp=pick.choice((1, 2)), pp=pick.choice((1, 2)))
    space = pick.choice(("latent", "value"))  # of latent attention's exchange
    groups = pick.choice((1, 2, 3)) if cp > 1 else 1
    lengths = [1, pick.randint(2, 8), pick.randint(9, 64), pick.randint(65, 300)]
    checkpoint = make_checkpoint(family, folder / "checkpoint", seed=seed, layers=3)
    generation = role(tp=tp, cp=cp, pp=pp, ep=ep, block=block, exchange_space=space, hop_groups=groups)
    plan = plan_of(str(checkpoint), context, generation)
    verify(plan)
    requests = [request(i, prompt) for i, prompt in enumerate(random_prompts(lengths, seed))]
    found = compare(checkpoint, plan, requests, folder)
    drawn = f"{plan.name=} {block=} {space=} {groups=} {lengths=} {seed=}"
    assert found.exact, f"{found.difference=} {found.same_tokens=} {drawn}"
    stored = sum(length + 63 for length in lengths)
    for instance in plan.instances[1:]:
        of_copy = {(r.pp_rank, r.tp_rank): 0 for r in plan.ranks}
        for rank in (plan.ranks[r] for r in instance.ranks):
            of_copy[rank.pp_rank, rank.tp_rank] += found.outcome.kv_tokens[rank.rank]
        assert set(of_copy.values()) <= {0, stored}, "each token is stored once a copy of the cache"
    return found


@pytest.mark.parametrize("family", ["llama", "deepseek-v3-lite"])
def test_attention_data_parallelism(family: str, tmp_path: Path) -> None:
    def check(folder: Path) -> Comparison:
        seed = random.randrange(2**31)
        checkpoint = make_checkpoint(family, folder / "checkpoint", seed=seed, layers=3)
        plan = plan_of(str(checkpoint), role(tp=2, dp=True), role(tp=2, cp=2, pp=2, dp=True))
        verify(plan)
        requests = [request(i, p, 24) for i, p in enumerate(random_prompts([3, 50, 7, 120, 1], seed))]
        found = compare(checkpoint, plan, requests, folder)
        assert found.exact, f"{found.difference=} {found.same_tokens=} {seed=}"
        return found

    drawn(check, tmp_path)


@pytest.mark.parametrize(
    ("family", "context", "generation", "overrides"),
    [
        ("llama", role(tp=2), role(tp=4), {"num_key_value_heads": 2}),  # tp above the KV heads: each is held twice
        ("llama", role(tp=4), role(tp=2, cp=2), {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("llama", role(), role(cp=2, pp=2), {"tie_word_embeddings": True, "attention_bias": True}),
        ("qwen3", role(tp=2), role(cp=3), {"vocab_size": 265, "intermediate_size": 200, "attention_bias": True}),
        ("deepseek-v3-lite", role(tp=2), role(cp=2, ep=2), {"attention_bias": True, "q_lora_rank": 40}),
        ("deepseek-v3-lite", role(), role(tp=2, cp=3, exchange_space="value"), {"v_head_dim": 40}),  # wider than latents
        ("llama", role(tp=3), role(cp=3), {"num_attention_heads": 3, "num_key_value_heads": 3}),
    ],
    ids=["tp above kv heads", "one kv head, tied", "tied over two stages", "uneven shards", "q_lora with biases", "wide values", "one head a rank"],
)
def test_less_common_models(
    family: str, context: RoleSpec, generation: RoleSpec, overrides: dict[str, Any], tmp_path: Path
) -> None:
    def check(folder: Path) -> Comparison:
        seed = random.randrange(2**31)
        checkpoint = make_checkpoint(family, folder / "checkpoint", seed=seed, layers=2, **overrides)
        plan = plan_of(str(checkpoint), context, generation)
        verify(plan)
        requests = [request(i, p, 16) for i, p in enumerate(random_prompts([3, 50, 9], seed))]
        found = compare(checkpoint, plan, requests, folder)
        assert found.exact, f"{found.difference=} {found.same_tokens=} {seed=}"
        return found

    drawn(check, tmp_path)


@pytest.mark.parametrize(
    ("family", "groups", "cp", "sizes"),
    [
        ("llama", 2, 2, {"tp": 2, "kv_dtype": "float32"}),
        ("qwen3", 3, 3, {}),
        ("qwen3-moe", 2, 3, {"pp": 2}),
        ("deepseek-v3-lite", 3, 2, {"exchange_space": "latent"}),
        ("deepseek-v3-lite", 2, 3, {"exchange_space": "value", "ep": 3}),
        ("llama", 3, 2, {"tp": 2, "dp": True}),
    ],
)
def test_rows_in_groups(family: str, groups: int, cp: int, sizes: dict[str, Any], tmp_path: Path) -> None:
    """HOP-B: as many groups as rows and fewer, rows without tokens on a rank, requests that come and go."""

    def check(folder: Path) -> Comparison:
        seed = random.randrange(2**31)
        checkpoint = make_checkpoint(family, folder / "checkpoint", seed=seed, layers=2)
        plan = plan_of(str(checkpoint), role(), role(cp=cp, batch=5, hop_groups=groups, **sizes))
        verify(plan)
        assert plan.instances[-1].hop.groups == groups
        prompts = random_prompts([1, 33, 2, 3, 90, 7, 4, 26, 1], seed)
        wanted = [20, 9, 14, 1, 5, 16, 7, 11, 3]
        requests = [request(i, p, n) for i, (p, n) in enumerate(zip(prompts, wanted, strict=True))]
        found = compare(checkpoint, plan, requests, folder)
        assert found.exact, f"{found.difference=} {found.same_tokens=} {seed=}"
        return found

    drawn(check, tmp_path)


def test_requests_come_and_go(tmp_path: Path) -> None:
    """Two rows at a time, two instances of each role, lengths that end at different steps, one that ends at once."""
    seed = random.randrange(2**31)
    checkpoint = make_checkpoint("qwen3", tmp_path / "checkpoint", seed=seed, layers=2)
    plan = plan_of(str(checkpoint), role(n=2, tp=2), role(n=2, cp=2, batch=2))
    prompts = random_prompts([5, 40, 2, 90, 17, 33, 8, 1, 61], seed)
    wanted = [9, 1, 30, 2, 17, 5, 40, 12, 3]
    requests = [request(i, p, n) for i, (p, n) in enumerate(zip(prompts, wanted, strict=True))]
    found = compare(checkpoint, plan, requests, tmp_path)
    assert found.exact, f"{found.difference=} {found.same_tokens=} {seed=}"
    assert [len(found.outcome.tokens[r.index]) for r in requests] == wanted
    assert set(found.outcome.reasons.values()) == {"length"}


def test_pages_are_given_back(tmp_path: Path) -> None:
    """A pool that holds one long request at a time serves them all."""
    seed = random.randrange(2**31)
    checkpoint = make_checkpoint("llama", tmp_path / "checkpoint", seed=seed, layers=2)
    plan = plan_of(str(checkpoint), role(), role(cp=2, max_tokens=40, max_seq_len=80))
    requests = [request(i, p, 10) for i, p in enumerate(random_prompts([60, 66, 9, 70, 30], seed))]
    found = compare(checkpoint, plan, requests, tmp_path)
    assert found.exact, f"{found.difference=} {found.same_tokens=} {seed=}"


def test_stop_tokens_end_a_request(tmp_path: Path) -> None:
    """A token that the model does generate is declared a stop token: generation ends with it."""
    seed = random.randrange(2**31)
    checkpoint = make_checkpoint("llama", tmp_path / "checkpoint", seed=seed, layers=2)
    plan = plan_of(str(checkpoint), role(), role(cp=2))
    free = request(0, random_prompts([20], seed)[0], 40)
    tokens = compare(checkpoint, plan, [free], tmp_path).outcome.tokens[0]
    stop = tokens[17]
    model = replace(plan.model, arch=replace(plan.model.arch, eos_token_ids=(stop,)))
    (tmp_path / "second").mkdir()
    again = replace(free, ignore_eos=False)
    found = compare(checkpoint, replace(plan, model=model), [again], tmp_path / "second")
    assert found.outcome.tokens[0] == tokens[: tokens.index(stop) + 1]
    assert found.outcome.reasons[0] == "stop"


def test_sampling_repeats_and_follows_the_logits(tmp_path: Path) -> None:
    """Same seed, same tokens on any layout; another seed, other tokens; never outside the top-p set."""
    seed = random.randrange(2**31)
    checkpoint = make_checkpoint("qwen3", tmp_path / "checkpoint", seed=seed, layers=2)
    prompt = random_prompts([30], seed)[0]
    requests = [request(i, prompt, 24, temperature=0.9, top_p=0.8, seed=s) for i, s in enumerate((1, 1, 2))]
    outcomes = []
    for name, generation in (("a", role(cp=2)), ("b", role(tp=2, cp=2, pp=2))):
        (tmp_path / name).mkdir()
        plan = plan_of(str(checkpoint), role(), generation)
        outcomes.append(deploy(plan, requests, tmp_path / name))
    first, second = outcomes
    for item in requests:
        for step, (one, other) in enumerate(zip(first.tokens[item.index], second.tokens[item.index], strict=True)):
            if one != other:  # only where rounding decides, and then the texts go their own ways
                assert could_sample(first.logits[item.index][step], item, len(prompt) + step, other, 1e-4), f"{seed=}"
                break
    assert first.tokens[0] == first.tokens[1] != first.tokens[2]
    for item in requests:
        logits = first.logits[item.index]
        assert [sample(row, item, len(prompt) + i) for i, row in enumerate(logits)] == first.tokens[item.index]
        for row, token in zip(logits, first.tokens[item.index], strict=True):
            p = (row.double() / 0.9).softmax(-1)
            assert p[p > p[token]].sum() < 0.8


def test_dummy_weights_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("deepseek-v3-lite", tmp_path / "checkpoint", seed=1, layers=2)
    requests: list[Request] = [request(i, p, 16) for i, p in enumerate(random_prompts([9, 40], 3))]
    tokens = []
    for name, generation in (("a", role()), ("b", role(tp=2, cp=2, ep=2))):
        (tmp_path / name).mkdir()
        plan = plan_of(str(checkpoint), role(tp=2), generation, load_format="dummy")
        outcome = deploy(plan, requests, tmp_path / name)
        tokens.append((outcome.tokens, outcome.logits))
    assert tokens[0][0] == tokens[1][0]
    assert all((tokens[0][1][i] - tokens[1][1][i]).abs().max() < 1e-4 for i in (0, 1))


@pytest.mark.parametrize("family", MOE)
def test_a_tie_between_experts_is_seen(family: str, tmp_path: Path) -> None:
    """Random weights leave a gap; a router that gives all experts the same score does not."""
    checkpoint = make_checkpoint(family, tmp_path / "checkpoint", seed=random.randrange(2**31), layers=3)
    plan = plan_of(str(checkpoint), role(), role())
    assert 0 < routing_gap(plan, random_prompts([5], 1)[0]) < 1
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("gate.weight"):
            tensor.zero_()
        if name.endswith("e_score_correction_bias"):
            tensor.fill_(0.5)
    save_file(tensors, file)
    assert routing_gap(plan, random_prompts([5], 1)[0]) == 0
