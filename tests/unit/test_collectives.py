"""The derived order of communication against what the runtime does, and the search for deadlocks against known ones."""

from __future__ import annotations

import random
import secrets
import threading
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from examples.tiny_checkpoint import VOCAB, make_checkpoint
from helixc.plan.collectives import admission, by_request, collectives, decode_step, handoff, prefill, traffic
from helixc.plan.rendezvous import Op, flaws
from helixc.spec.spec import Hardware
from helixc_runtime import comm
from helixc_runtime.attention_shape import attention_shape
from helixc_runtime.comm import TorchComm, backend_for
from helixc_runtime.job import Request
from helixc_runtime.manifest import Plan, Rank, local_length, split
from helixc_runtime.ops import Partial
from helixc_runtime.ops_torch import TorchOps
from tests.deployments import on_gpus, plan_of, role
from tests.threads import Call, ThreadDist, calls_of

# --- What the runtime does --------------------------------------------------------------------------------------

DEPLOYMENTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("deepseek-v3-lite", {"tp": 2, "pp": 2}, {"tp": 2, "cp": 2, "pp": 2, "ep": 2}),
    ("llama", {"tp": 2}, {"tp": 2, "cp": 3, "pp_partition": (3, 1), "pp": 2}),
    ("llama", {"tp": 3, "kv_dtype": "fp8"}, {"tp": 2, "cp": 2, "kv_dtype": "fp8"}),
    ("deepseek-v2", {"kv_dtype": "fp8"}, {"cp": 3, "kv_dtype": "fp8"}),
    ("deepseek-v2", {}, {"cp": 4, "ep": 4}),
    ("qwen3-moe", {"pp": 3}, {"tp": 4}),
    ("qwen3", {"dp": True, "tp": 2}, {"tp": 2, "cp": 2, "dp": True, "pp": 2}),
    ("llama", {}, {"tp": 2, "cp": 3, "pp": 2, "hop_groups": 2}),
]


def request(index: int, length: int, tokens: int = 3) -> Request:
    """A prompt of random tokens that generates exactly `tokens` more."""
    prompt = tuple(secrets.randbelow(VOCAB) for _ in range(length))
    return Request(index, prompt, tokens, 0.0, 1.0, 0, True)


def made(op: Op, rows: int) -> Call:
    """The call that `op` is, for `rows` tokens."""
    return Call(op.kind, op.ranks, op.size * (1 if op.kind == "broadcast" else rows), op.source)


def moves(plan: Plan, rank: Rank, of: Request) -> list[Call]:
    """What the handoff of the only request asks of `rank`; parts without tokens are not sent."""
    source, target = (next(i for i in plan.instances if i.role == role) for role in ("context", "generation"))
    (moved,) = by_request(plan, source, target)[:1]
    owned = {t: local_length(len(of.token_ids), plan.tokens_per_block, target.cp, t.cp_rank) for t in moved}
    ops = handoff(plan, source, target, [t for t, tokens in owned.items() if tokens])[rank.rank]
    tokens = {target.ranks[t.target]: count for t, count in owned.items()}
    return [made(op, tokens[op.ranks[1]] if op.what.startswith("KV") else 1) for op in ops]


@pytest.mark.parametrize("gpus_per_node", [1, 5, 100], ids=["host", "mixed", "peers"])
@pytest.mark.parametrize(("family", "context", "generation"), DEPLOYMENTS, ids=[d[0] for d in DEPLOYMENTS])
def test_every_rank_issues_what_was_derived(
    family: str,
    context: dict[str, Any],
    generation: dict[str, Any],
    gpus_per_node: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_checkpoint(family, tmp_path / "model", seed=secrets.randbelow(1000), layers=4)
    plan = plan_of(str(folder), role(**context), role(**generation), hardware=Hardware(None, gpus_per_node, False))
    assert list(collectives(plan)) == []
    prompt = request(0, random.randint(1, 30), tokens=4)
    greedy = random.random() < 0.5
    if not greedy:
        prompt = replace(prompt, temperature=0.7)
    recorded = calls_of(plan, (prompt,), tmp_path, monkeypatch)
    for rank in plan.ranks:
        instance = plan.instance_of(rank)
        if rank.role == "context":
            rows = len(prompt.token_ids)
            derived = [made(op, 1 if op.what == "logits" else rows) for op in prefill(plan, instance, rank)]
            expected = derived + moves(plan, rank, prompt)
            assert recorded[rank.rank] == expected, rank.rank
        else:
            step = [made(op, 1) for op in decode_step(plan, instance, rank, greedy=greedy)]
            told = [made(op, 1) for op in admission(instance)]
            expected = [*told, *moves(plan, rank, prompt), *step, *step, *step, *told]
            assert recorded[rank.rank] == expected, rank.rank


def test_an_exchange_among_one_rank_copies_nothing() -> None:
    """But it still masks what is empty: another data-parallel rank's row."""
    plan = plan_of("llama-3.1-8b", None, role(tp=2))
    shape, own = attention_shape(plan.model, plan.ranks[0], 4), TorchComm(plan.ranks[0], {})
    part = Partial(torch.randn(3, shape.heads, shape.partial_dim), torch.randn(3, shape.heads))
    part.o[1], part.lse[1] = torch.nan, -torch.inf
    for sent, received in zip(part, own.all_to_all(part), strict=True):
        assert received.shape == (1, *sent.shape) and received.data_ptr() == sent.data_ptr()
    merged = own.exchange(part, TorchOps(shape), "partials")
    torch.testing.assert_close(merged, torch.where(part.lse.isinf().unsqueeze(-1), 0.0, part.o))


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_are_exchanged_one_after_another(groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four requests, of which the first steps have fewer: each step is what is derived of its padded size."""
    folder = make_checkpoint("qwen3", tmp_path / "model", seed=secrets.randbelow(1000), layers=2)
    plan = plan_of(str(folder), role(), role(cp=2, tp=2, batch=4, hop_groups=groups))
    assert list(collectives(plan)) == []
    recorded = calls_of(plan, tuple(request(i, 3 + 5 * i, 40) for i in range(4)), tmp_path, monkeypatch)
    for rank in plan.ranks[1:]:
        calls = [call for call in recorded[rank.rank] if call.kind not in ("broadcast", "post", "take")]
        steps = {rows: step_of(plan, rank, rows, groups if rows >= groups else 1) for rows in (1, 2, 4)}
        seen = []
        while calls:
            seen.append(next(rows for rows, step in steps.items() if calls[: len(step)] == step))
            del calls[: len(steps[seen[-1]])]
        assert 4 in seen


def step_of(plan: Plan, rank: Rank, rows: int, groups: int) -> list[Call]:
    """The calls of a step of so many rows, in so many groups."""
    found, sizes = [], cycle(hi - lo for lo, hi in (split(rows, groups, group) for group in range(groups)))
    for op in decode_step(plan, plan.instance_of(rank), rank, groups, greedy=True):
        found.append(made(op, next(sizes) if op.kind == "exchange" else rows))
    return found


def test_ranks_without_rows_take_part_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention dp with requests that come and go: every step is the derived one, whoever has rows in it."""
    folder = make_checkpoint("qwen3", tmp_path / "model", seed=secrets.randbelow(1000), layers=2)
    plan = plan_of(str(folder), role(), role(tp=2, cp=2, dp=True))
    recorded = calls_of(plan, tuple(request(i, 5 + i, 3 + 3 * i) for i in range(3)), tmp_path, monkeypatch)
    for rank in plan.ranks[1:]:
        step = [(op.kind, op.ranks) for op in decode_step(plan, plan.instance_of(rank), rank)]
        calls = [
            (call.kind, call.ranks) for call in recorded[rank.rank] if call.kind not in ("broadcast", "post", "take")
        ]
        steps, rest = divmod(len(calls), len(step))
        assert rest == 0 and calls == step * steps
        assert steps >= 8, "as many as the longest request has tokens left"


def test_traffic_is_the_sum_of_the_step() -> None:
    """DeepSeek-V3 with cp 4: 128 heads of 512 bf16 and one fp32 a layer, and two sums of 7168 a layer."""
    plan = plan_of("deepseek-v3", None, role(cp=4), dtype="bfloat16")
    found = traffic(plan, decode_step(plan, plan.instances[0], plan.ranks[0]))
    assert found == {
        "exchange": 61 * 128 * (512 * 2 + 4),
        "all_reduce": (2 * 61 + 1) * 7168 * 2,
        "all_gather": 129280 // 4 * 2,
    }


def test_the_largest_of_all_ranks_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, shares of 4, 3 and 3 columns: torch's argmax of all; of equal logits the first, NaN before all."""
    widths, fake, no_ops = (4, 3, 3), ThreadDist(), cast(Any, None)
    monkeypatch.setattr(comm, "_all_gather", fake.all_gather)
    logits = torch.randint(3, (60, 10)).float()
    logits[::4, secrets.randbelow(10)] = torch.nan
    logits[1::4] = -torch.inf
    plan = plan_of("llama-3.1-8b", None, role(tp=2, cp=4))
    ranks = [replace(rank, groups=replace(rank.groups, ffn_tp=(0, 1, 2))) for rank in plan.ranks[:3]]
    found: dict[int, Tensor] = {}

    def body(rank: Rank) -> None:
        fake.become(rank.rank)
        own = TorchComm(rank, cast(Any, {"ffn_tp": rank.groups.ffn_tp}))
        x = logits.bfloat16().split(widths, dim=1)[rank.rank]
        row = torch.full((2, len(x)), -1)[1]
        found[rank.rank] = own.argmax(x, sum(widths[: rank.rank]), no_ops, "tokens", row)
        assert found[rank.rank] is row

    threads = [threading.Thread(target=body, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for tokens in found.values():
        assert torch.equal(tokens, logits.argmax(-1))


# --- What cannot end --------------------------------------------------------------------------------------------


def both(what: str, ranks: tuple[int, ...] = (0, 1), size: int = 8) -> Op:
    return Op("all_reduce", ranks, size, what)


def test_programs_in_the_same_order_end() -> None:
    programs = {0: [both("a"), both("b")], 1: [both("a"), both("b")]}
    assert flaws(programs) == []


def test_a_swapped_order_is_told() -> None:
    (flaw,) = flaws({0: [both("a"), both("b")], 1: [both("b"), both("a")]})
    assert flaw == "ranks 0,1 meet in different operations: all_reduce of 8 B for b and all_reduce of 8 B for a"


def test_unlike_sizes_are_told() -> None:
    (flaw,) = flaws({0: [both("a")], 1: [both("a", size=16)]})
    assert "8 B" in flaw
    assert "16 B" in flaw


def test_a_cycle_over_groups_is_followed() -> None:
    """Each pair agrees on its own order; together they wait in a circle."""
    ab, bc, ca = (0, 1), (1, 2), (0, 2)
    programs = {
        0: [both("ab", ab), both("ca", ca)],
        1: [both("bc", bc), both("ab", ab)],
        2: [both("ca", ca), both("bc", bc)],
    }
    (flaw,) = flaws(programs)
    assert flaw.startswith("3 ranks wait forever: rank 0 in all_reduce over 0,1 (ab), waits for rank 1 in")
    assert flaw.endswith("waits for rank 0 again")


def test_two_sends_that_face_each_other_block() -> None:
    """As they may with rendezvous: neither send returns before the other side receives."""
    there, back = (0, 1), (1, 0)
    programs = {
        0: [Op("send", there, 8, "x"), Op("recv", back, 8, "y")],
        1: [Op("send", back, 8, "y"), Op("recv", there, 8, "x")],
    }
    (flaw,) = flaws(programs)
    assert "2 ranks wait forever: rank 0 in send to 1 (x), waits for rank 1 in send to 0 (y)" in flaw
    assert flaws({0: programs[0], 1: programs[1][::-1]}) == []


def test_a_message_nobody_takes() -> None:
    post = Op("post", (0, 1), 8, "KV")
    assert flaws({0: [post], 1: []}) == ["rank 0: nobody takes its post to 1 (KV)"]
    assert flaws({0: [post], 1: [Op("take", (0, 1), 8, "KV")]}) == []
    (flaw,) = flaws({0: [], 1: [Op("take", (0, 1), 8, "KV")]})
    assert flaw.endswith("waits for rank 0, which has nothing left to do")


def test_messages_of_one_pair_arrive_in_order() -> None:
    posts = [Op("post", (0, 1), 8, what) for what in ("a", "b")]
    takes = [Op("take", (0, 1), 8, what) for what in ("b", "a")]
    (flaw,) = flaws({0: posts, 1: takes})
    assert "ranks 0,1 meet in different operations" in flaw


def test_a_rank_outside_its_group_is_told() -> None:
    assert flaws({2: [both("a")]}) == ["rank 2 takes no part in the all_reduce over 0,1 (a) it issues"]


def test_random_interleavings_agree_with_the_one_that_was_run() -> None:
    """Programs dealt out from one global order always end; with two neighbours of one rank swapped they may not."""
    for _ in range(200):
        count = random.randint(2, 6)
        programs: dict[int, list[Op]] = {rank: [] for rank in range(count)}
        for number in range(random.randint(1, 12)):
            group = tuple(sorted(random.sample(range(count), random.randint(2, count))))
            for rank in group:
                programs[rank].append(both(str(number), group))
        assert flaws(programs) == []
        rank = random.randrange(count)
        if len(programs[rank]) > 1:
            at = random.randrange(len(programs[rank]) - 1)
            programs[rank][at : at + 2] = programs[rank][at : at + 2][::-1]
            assert bool(flaws(programs)) == bool(_stuck_in_any_order(programs))


def _stuck_in_any_order(programs: dict[int, list[Op]]) -> bool:
    """Run in random order, one complete operation at a time: an independent answer."""
    left = {rank: list(program) for rank, program in programs.items()}
    while any(left.values()):
        able = [ops[0] for ops in left.values() if ops and all(left[r] and left[r][0] == ops[0] for r in ops[0].ranks)]
        if not able:
            return True
        for rank in random.choice(able).ranks:
            left[rank].pop(0)
    return False


def test_ranks_that_share_a_gpu_do_without_nccl() -> None:
    """Context and generation may share one; two of a group only where a test has put them."""
    plan = plan_of("llama-3.1-8b", role(), role(cp=2), hardware=Hardware(1, 2, True))
    gpu, group = torch.device("cuda", 0), plan.ranks[1].groups.cp
    assert backend_for(plan, group, gpu) == "nccl"
    assert backend_for(plan, group, torch.device("cpu")) == "gloo"
    assert backend_for(on_gpus(plan, 1), group, gpu) == "gloo"
    assert on_gpus(plan, 2) == plan
