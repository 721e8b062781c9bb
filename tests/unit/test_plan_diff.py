"""`helixc plan A B`: what moves between two plans, against counting and against cases done by hand."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from helixc.cli import main
from helixc.plan.diff import Diff, compare
from helixc.plan.overlap import missing_elements, uncovered
from helixc.plan.show_diff import to_text
from helixc.spec.spec import Hardware
from helixc_runtime.manifest import Piece, Plan, Range
from tests.deployments import plan_of, role

CLI_PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


# --- Weights ----------------------------------------------------------------------------------------------------


def random_range(size: int) -> Range:
    a, b = sorted(random.choices(range(size + 1), k=2))
    return a, b


def test_uncovered_elements_against_counting() -> None:
    for _ in range(200):
        shape = [random.randint(1, 5) for _ in range(random.randint(1, 3))]
        box, *others = [tuple(random_range(n) for n in shape) for _ in range(random.randint(1, 5))]
        covered = {e for other in others for e in product(*(range(*r) for r in other))}
        own = set(product(*(range(*r) for r in box)))
        assert uncovered(box, others) == len(own - covered)


def test_pieces_count_by_tensor_layer_and_expert() -> None:
    def piece(name: str, layers: tuple[int, ...], experts: Range | None, rows: Range) -> Piece:
        return Piece(name, f"{{layer}}.{name}", layers, experts, (8, 2), (rows, (0, 2)))

    wanted = [piece("a", (0, 1), None, (0, 4)), piece("b", (1,), (0, 4), (0, 8))]
    assert missing_elements(wanted, []) == 2 * 8 + 4 * 16
    assert missing_elements(wanted, [piece("a", (1, 2), None, (2, 8))]) == 8 + 4 + 4 * 16
    assert missing_elements(wanted, [piece("b", (1,), (3, 8), (0, 2))]) == 2 * 8 + 4 * 16 - 1 * 4
    assert missing_elements([wanted[0], wanted[0]], []) == 2 * 8


def test_a_plan_and_itself() -> None:
    plan = plan_of("qwen3-235b-a22b", role(tp=2), role(n=2, tp=2, cp=2, ep=4))
    diff = compare(plan, plan)
    assert diff.alike
    assert to_text(diff).endswith("\nnothing changes\n")


def test_from_nothing_everything_is_loaded() -> None:
    """The generation ranks move to GPUs that had none."""
    before = plan_of("llama-3.1-8b", None, role(tp=2))
    after = plan_of("llama-3.1-8b", role(tp=2), role(tp=2))
    diff = compare(before, after)
    gone_to_context = [r for r in diff.ranks if r.role == "context"]
    assert [(r.was, r.load) for r in gone_to_context] == [(None, 0), (None, 0)], "the same shards, under another role"
    assert all(r.load == r.weights for r in diff.ranks if r.role == "generation")
    assert diff.freed == (0, 1)


def test_another_dtype_or_model_keeps_nothing() -> None:
    plan = plan_of("llama-3.1-8b", None, role(cp=2))
    for other in (
        plan_of("llama-3.1-8b", None, role(cp=2), dtype="bfloat16"),
        plan_of("qwen3-8b", None, role(cp=2)),
        plan_of("llama-3.1-8b", None, role(cp=2), load_format="dummy"),
    ):
        diff = compare(plan, other)
        assert not diff.same_model
        assert all(r.load == r.weights for r in diff.ranks)
        assert diff.kv.moved == diff.kv.after
        assert not diff.alike


def test_more_ranks_keep_what_overlaps() -> None:
    """cp 1 to cp 2: queries and KV heads stay whole, so only halves of everything else are dropped."""
    one, two = plan_of("qwen3-8b", None, role()), plan_of("qwen3-8b", None, role(cp=2))
    found = compare(one, two)
    assert found.ranks[0].load == 0
    assert found.ranks[1].load == found.ranks[1].weights
    (back,) = compare(two, one).ranks
    hidden, layers, heads, inner, vocab = 4096, 36, 32 * 128, 12288, 151936
    halves = layers * (heads * hidden + 3 * inner * hidden) // 2 + vocab * hidden  # o, mlp; embedding and head
    assert back.load == halves * 4
    assert compare(two, one).freed == (1,)


def test_shared_gpus_count_what_any_rank_of_the_gpu_holds() -> None:
    shared = {"hardware": Hardware(1, 8, True)}
    before = plan_of("llama-3.1-8b", role(tp=2), role(cp=2), **shared)
    after = plan_of("llama-3.1-8b", role(tp=2), role(tp=2), **shared)
    assert [rank.load for rank in compare(before, after).ranks] == [0, 0, 0, 0], "context ranks had the same shards"


# --- KV, groups, traffic ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        ({"cp": 4, "tp": 2}, {"cp": 8}, 0.0),  # every new owner is a subset of an old one on the same GPU
        ({"cp": 2}, {"cp": 4}, 0.5),
        ({"cp": 2, "block": 4}, {"cp": 2, "block": 8}, 0.5),
        ({"cp": 3}, {"cp": 2}, 1 - 1 / 3),  # of 6 blocks, 0 and 1 stay
        ({"pp": 2}, {"cp": 2}, 0.5),  # layers against positions: half of each quarter's diagonal
    ],
)
def test_moved_kv_of_a_latent(before: dict[str, int], after: dict[str, int], moved: float) -> None:
    sides = [plan_of("deepseek-v3", None, role(**sizes)) for sizes in (before, after)]
    layers = 61
    kv = compare(*sides).kv
    if "pp" in before:  # 31 and 30 layers
        moved = 1 - (31 / layers + 30 / layers) / 2
    assert kv.moved / kv.after == pytest.approx(moved)


def test_moved_kv_against_counting() -> None:
    """Position by position, layer by layer, head by head, for random pairs of layouts."""
    for _ in range(12):
        sizes = [
            {"tp": random.choice((1, 2, 4)), "cp": random.randint(1, 4), "pp": random.randint(1, 2)} for _ in range(2)
        ]
        for found in sizes:
            found["block"] = random.randint(1, 5)
            found["cp"] = random.choice([c for c in (1, 2, 4, 8) if 32 % (found["tp"] * c) == 0])
        before, after = (plan_of("llama-3.1-8b", None, role(**found)) for found in sizes)
        period = before.tokens_per_block * before.instances[0].cp * after.tokens_per_block * after.instances[0].cp
        then, now = (stored(plan, period) for plan in (before, after))
        width = after.model.arch.kv_width * 4
        kv = compare(before, after).kv
        assert kv.before == pytest.approx(len(then) * width / period)
        assert kv.after == pytest.approx(len(now) * width / period)
        assert kv.moved == pytest.approx(len(now - then) * width / period, abs=1e-6)


def stored(plan: Plan, positions: int) -> set[tuple[int, int, int, int]]:
    """(GPU, layer, head, position) of every cached element."""
    block, cp = plan.tokens_per_block, plan.instances[0].cp
    return {
        (rank.device + 8 * rank.node, layer, head, position)
        for rank in plan.ranks
        for layer in range(*rank.layers)
        for head in range(*rank.kv_heads)
        for position in range(positions)
        if position // block % cp == rank.cp_rank
    }


def test_groups_are_compared_by_gpu() -> None:
    """One context rank more shifts all numbers; on shared GPUs nothing else happens to the generation ranks."""
    shared = {"hardware": Hardware(1, 8, True)}
    before = plan_of("deepseek-v3-lite", role(), role(tp=2, cp=2), **shared)
    after = plan_of("deepseek-v3-lite", role(tp=2), role(tp=2, cp=2), **shared)
    generation = [rank for rank in compare(before, after).ranks if rank.role == "generation"]
    assert [rank.was for rank in generation] == [1, 2, 3, 4]
    assert [rank.rank for rank in generation] == [2, 3, 4, 5]
    assert all(not rank.groups and not rank.load for rank in generation)
    changed = compare(after, plan_of("deepseek-v3-lite", role(tp=2), role(tp=1, cp=4), **shared))
    assert {rank.groups for rank in changed.ranks if rank.role == "generation"} == {("tp", "cp")}


def test_memory_and_traffic() -> None:
    before = plan_of("deepseek-v3", None, role(cp=2, batch=2), dtype="bfloat16")
    after = plan_of("deepseek-v3", None, role(tp=2, cp=2, pp=2, batch=2), dtype="bfloat16")
    (change,) = compare(before, after).roles
    assert change.memory["total"].before == before.ranks[0].memory.total
    assert change.memory["total"].after == max(rank.memory.total for rank in after.ranks)
    assert change.traffic["exchange"].before == 61 * 128 * (512 * 2 + 4)
    assert change.traffic["exchange"].after == 31 * 64 * (512 * 2 + 4)
    assert change.traffic["send"].before == 0
    assert change.traffic["send"].after == 7168 * 2


def test_a_large_plan_is_listed_by_what_its_ranks_have_in_common() -> None:
    before = plan_of("deepseek-v3", role(tp=8), role(n=16, tp=8, cp=8, ep=64))
    after = plan_of("deepseek-v3", role(tp=8), role(n=16, tp=4, cp=16, ep=64))
    lines = to_text(compare(before, after)).splitlines()
    assert len(lines) < 60
    assert any("8,9..1031" in line or "8-1031" in line for line in lines), lines


# --- The command ------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    text = "model: deepseek-v3\nload_format: dummy\nmax_seq_len: 131072\nparallelism: ctx tp8 / gen "
    paths = tmp_path / "a.yaml", tmp_path / "b.yaml"
    for path, sizes in zip(paths, ("tp2 cp4 ep8", "tp1 cp8 ep8"), strict=True):
        path.write_text(text + sizes + "\n")
    return str(paths[0]), str(paths[1])


def test_the_page_shows_what_is_printed(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *files]) == 0
    section = CLI_PAGE.read_text().split("\n## plan\n", 1)[1].split("\n## ", 1)[0]
    (shown,) = re.findall(r"^```text\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert shown == capsys.readouterr().out


def test_json(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *files, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(Diff.__dataclass_fields__)
    assert found["same_model"] is True
    assert [rank["was"] for rank in found["ranks"]] == list(range(16))
    assert found["roles"][1]["after"]["cp"] == 8


def test_a_file_with_mistakes(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model: deepseek-v3\nload_format: dummy\nparallelism: gen tp3\n")
    assert main(["plan", files[0], str(wrong)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "HX301" in err
    assert main(["plan", str(tmp_path), files[0]]) == 2


def test_a_change_of_the_seed_is_another_model() -> None:
    plan = plan_of("qwen3-8b", None, role(), load_format="dummy")
    other = replace(plan, model=replace(plan.model, seed=1))
    assert not compare(plan, other).same_model
    assert compare(plan, replace(plan, model=replace(plan.model, name="other"))).same_model is False
