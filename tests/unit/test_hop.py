"""HOP-B: the estimate that chooses the groups, the groups' rows, and the order of two streams."""

from __future__ import annotations

import inspect
import json
import random
import sys
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from helixc.hardware import GPUS, JOIN, PROCESSORS
from helixc.model import read_model
from helixc.plan.hop import LEAST_GAIN, LEFT_FREE, MOST_GROUPS, Layer, hop, layer
from helixc.plan.lower import lower
from helixc.plan.place import place
from helixc.plan.show import to_text
from helixc.plan.verify import find_flaws
from helixc.spec.spec import Hardware
from helixc_runtime.manifest import WITHOUT_HOP, Hop, Model
from helixc_runtime.models import pipeline
from helixc_runtime.models.pipeline import Pipeline
from helixc_runtime.ops import DecodeBatch, Partial
from tests.deployments import plan_of, role, spec
from tests.docs.fences import ROOT

H200, H100 = Hardware(None, 8, False), Hardware(None, 8, False, "h100")


def model(name: str) -> Model:
    return lower(spec(name, None, role(), dtype="bfloat16"), read_model(name)).model


@pytest.fixture(autouse=True)
def one_sided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELIXC_COLLECTIVES", raising=False)


# --- The estimate -----------------------------------------------------------------------------------------------

# The ranks that bench/attention.py measures: a model, and the tp that leaves so many heads.
MEASURED = {
    **{f"mla H {128 // tp}": ("deepseek-v3", tp) for tp in (1, 2, 4, 8)},
    "gqa (64,8)": ("llama-3.1-70b", 1),
    "gqa (8,1)": ("llama-3.1-70b", 8),
    "gqa (16,1)": ("llama-3.1-405b", 8),
}


@pytest.mark.parametrize("name", MEASURED)
def test_attention_takes_what_was_measured(name: str) -> None:
    (family, tp), (kind, heads) = MEASURED[name], name.split(" ", 1)
    results = json.loads((ROOT / "bench" / "results" / "attention.json").read_text(encoding="utf-8"))
    assert results["gpu"].startswith("NVIDIA H100")
    found = 0
    for row in results["rows"]:
        case, _, of = row["case"].partition(", ")
        wanted = (row["op"], row["dtype"], row["query_tokens"], of) == (kind, "bfloat16", 1, heads)
        if not wanted or case.startswith("ragged"):
            continue
        found += 1
        rows, tokens = case.split("x")
        one = layer(role(tp=tp), model(family), "value", int(tokens.removesuffix("k")) * 1024, H100)
        seconds = one.attention_start + int(rows) * one.attention_row
        assert seconds * 1e6 == pytest.approx(row["ours_us"], rel=0.2), case
    assert found >= 5


@pytest.mark.parametrize(("transport", "column"), [("one_sided", "ours_us"), ("collective", "nccl_our_combine_us")])
def test_the_exchange_takes_what_was_measured(transport: str, column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two H200, 128 heads in latent space."""
    if transport == "collective":
        monkeypatch.setenv("HELIXC_COLLECTIVES", "1")
    results = json.loads((ROOT / "bench" / "results" / "exchange.json").read_text(encoding="utf-8"))
    one = layer(role(cp=2), model("deepseek-v3"), "latent", 1024, H200)
    measured = [row for row in results["rows"] if row["op"] == "exchange"]
    assert len(measured) >= 4
    for row in measured:
        seconds = one.exchange_start + row["rows"] * one.exchange_row
        assert seconds * 1e6 == pytest.approx(row[column], rel=0.2), row["rows"]


def test_a_pipeline_takes_its_longest_path() -> None:
    """Against every path through attention and exchange of the groups, and by hand."""
    one = Layer(10.0, 1.0, 4.0, 0.5, None)
    assert one.seconds(8) == 10 + 8 + 4 + 4
    assert one.seconds(8, 2) == pytest.approx(2 * 14 + 6 + JOIN)  # the first exchange is hidden
    assert Layer(1.0, 0.0, 4.0, 1.0, None).seconds(8, 2) == pytest.approx(1 + 2 * 8 + JOIN)  # the second attention is
    for _ in range(50):
        one = Layer(*(random.uniform(0.1, 9) for _ in range(4)), None)
        rows, groups, free = random.randint(1, 99), random.randint(2, 5), random.randint(0, 20)
        own, slower = rows / groups, PROCESSORS / (PROCESSORS - free)
        attention = [
            one.attention_start + own * one.attention_row * (slower if group else 1) for group in range(groups)
        ]
        exchange = one.exchange_start + own * one.exchange_row
        paths = [sum(attention[: group + 1]) + (groups - group) * exchange for group in range(groups)]
        assert one.seconds(rows, groups, free) == pytest.approx(max(paths) + JOIN)


def test_few_multiprocessors_take_several_waves() -> None:
    """Of a one-sided exchange: 4 hold 128 warps, so that 2 * 256 of them take 4 times the least."""
    one = Layer(0.0, 0.0, 3.0, 0.0, 256)
    assert one.seconds(4, 2, 4) == pytest.approx(4 * 3 + 3 + JOIN)
    assert one.seconds(4, 2, 16) == pytest.approx(3 + 3 + JOIN)


CASES = [("deepseek-v3", "latent"), ("deepseek-v3", "value"), ("llama-3.1-70b", "value")]


@pytest.mark.parametrize(("name", "space"), CASES)
@pytest.mark.parametrize("collectives", [False, True])
def test_the_least_time_is_chosen(name: str, space: Any, collectives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if collectives:
        monkeypatch.setenv("HELIXC_COLLECTIVES", "1")
    chosen = set()
    for batch in (1, 2, 3, 16, 64, 300, 1024):
        for cp, length in ((2, 2048), (8, 65536)):
            where = (role(cp=cp, batch=batch), model(name), space, length, H200)
            found, one = hop(*where), layer(*where)
            options = [
                (one.seconds(batch, groups, free), groups, free)
                for groups in range(2, 1 + min(batch, MOST_GROUPS))
                for free in LEFT_FREE
            ]
            best = min(options, default=(9e9, 1, 0))
            pays = best[0] <= (1 - LEAST_GAIN) * one.seconds(batch)
            assert (found.groups, found.processors) == (best[1:] if pays else (1, 0))
            chosen.add(found.groups)
            if found.groups > 1:
                assert found.groups <= found.rows <= batch
                for rows in (found.rows, batch):
                    assert one.seconds(rows, *best[1:]) < one.seconds(rows)
    assert 1 in chosen
    assert len(chosen) > 1 or not collectives


def test_slow_transports_are_hidden_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3 on two GPUs of a host: latents of 64 rows one-sided, and by NCCL."""
    where = (role(cp=2, batch=64), model("deepseek-v3"), "latent", 8192, H200)
    assert hop(*where) == Hop(1, 1, 0, hop(*where).reason)  # type: ignore[arg-type]
    assert hop(*where).reason.startswith("in 2 groups, an estimated ")  # type: ignore[arg-type]
    monkeypatch.setenv("HELIXC_COLLECTIVES", "1")
    assert hop(*where).groups == 3  # type: ignore[arg-type]
    assert hop(*where).rows == 64  # type: ignore[arg-type]


def test_under_attention_dp_a_rank_has_its_share_of_the_rows() -> None:
    alone = hop(role(cp=2, batch=256), model("deepseek-v3"), "latent", 2048, H200)
    shared = hop(role(cp=2, batch=1024, tp=4, dp=True), model("deepseek-v3"), "latent", 2048, H200)
    assert alone.groups == shared.groups > 1
    assert alone.processors == shared.processors


def test_the_file_decides() -> None:
    def chosen(**sizes: Any) -> Hop:
        return plan_of("deepseek-v3", None, role(**sizes), dtype="bfloat16").instances[0].hop

    forced = chosen(cp=2, hop_groups=5)
    assert (forced.groups, forced.rows) == (5, 5)
    assert forced.reason.startswith("the file says so; estimated ")
    assert chosen(cp=2, batch=1024, exchange_space="latent", max_seq_len=2048).groups > 1
    off = chosen(cp=2, batch=1024, exchange_space="latent", max_seq_len=2048, hop_groups=1)
    assert off == Hop(1, 1, 0, "the file says so")
    assert chosen(tp=2) == chosen(cp=2, batch=1) == WITHOUT_HOP


def test_a_plan_tells_and_counts_the_groups() -> None:
    plans = [plan_of("deepseek-v3", role(), role(cp=2, hop_groups=groups), dtype="bfloat16") for groups in (1, 3)]
    one, three = map(to_text, plans)
    assert "\n  HOP-B      off: the file says so\n" in one
    assert (
        "\n  HOP-B      from 3 rows on in 3 groups, 4 multiprocessors left to the exchange: the file says so" in three
    )
    assert "HOP-B" not in to_text(plan_of("deepseek-v3", None, role(tp=2)))
    assert plans[1].instances[0].hop == WITHOUT_HOP, "a context instance"
    scratch = [plan.ranks[-1].memory.workspace for plan in plans]
    assert scratch[1] - scratch[0] == 2 * 2 * 148 * 128 * 513 * 4 - max(0, 64 * 8 - 2 * 148) * 128 * 513 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Hop(9, 9, 4, ""), "9 groups of 9 rows, batches of 8"),
        (Hop(3, 2, 4, ""), "3 groups of 2 rows, batches of 8"),
        (Hop(0, 1, 0, ""), "0 groups of 1 rows"),
        (Hop(2, 2, 148, ""), "148 multiprocessors left"),
    ],
)
def test_impossible_groups_are_a_flaw(change: Hop, message: str) -> None:
    plan = plan_of("llama-3.1-8b", None, role(cp=2))
    assert find_flaws(plan) == []
    (flaw,) = find_flaws(replace(plan, instances=(replace(plan.instances[0], hop=change),)))
    assert message in flaw.message


@pytest.mark.parametrize(("context", "generation"), [(role(), role(tp=2)), (role(tp=2), role(cp=2))])
def test_groups_need_an_exchange(context: Any, generation: Any) -> None:
    place_of = 1 if generation.context_parallel_size == 1 else 0
    plan = place(lower(spec("llama-3.1-8b", context, generation), read_model("llama-3.1-8b")), lambda *_: ())
    changed = [replace(i, hop=Hop(2, 2, 4, "")) if n == place_of else i for n, i in enumerate(plan.instances)]
    (flaw,) = find_flaws(replace(plan, instances=tuple(changed)))
    assert "2 groups of rows, and no exchange" in flaw.message


# --- The rows of the groups -------------------------------------------------------------------------------------


def random_batch(rows: int, tokens: int) -> DecodeBatch:
    count = rows * tokens
    return DecodeBatch(
        cos=torch.randn(count, 2),
        sin=torch.randn(count, 2),
        page_table=torch.randint(99, (rows, 3), dtype=torch.int32),
        lengths=torch.randint(99, (count,), dtype=torch.int32),
        owned=torch.randint(2, (count,), dtype=torch.uint8),
        slots=torch.randint(99, (count,)),
    )


@pytest.mark.parametrize("tokens", [1, 3])
def test_groups_are_runs_of_rows(tokens: int) -> None:
    """Together they are the batch, in order; none is empty, and none has more than one row more than another."""
    for rows, groups in ((2, 2), (5, 2), (8, 3), (7, 4), (9, 9)):
        batch = random_batch(rows, tokens)
        parts = list(batch.in_groups(groups))
        assert [part.group for part in parts] == list(range(groups))
        for name in ("cos", "sin", "page_table", "lengths", "owned", "slots"):
            values = [getattr(part, name) for part in parts]
            assert torch.equal(torch.cat(values), getattr(batch, name)), name
            assert all(value.is_contiguous() for value in values)
        sizes = [len(part.page_table) for part in parts]
        assert [len(part.lengths) for part in parts] == [tokens * size for size in sizes]
        assert min(sizes) >= max(1, max(sizes) - 1)


# --- Streams ----------------------------------------------------------------------------------------------------

Launch = tuple[str, int]  # what, and the first row of its group


class Streams:
    """Stands in for the second stream: notes what each launch comes after."""

    def __init__(self) -> None:
        self.after_: dict[Launch, frozenset[Launch]] = {}
        self._ends: dict[str, frozenset[Launch]] = {"first": frozenset(), "second": frozenset()}
        self._current = "first"
        self.partials: list[weakref.ref[Tensor]] = []

    def launch(self, what: Launch) -> None:
        before = self._ends[self._current]
        self.after_[what] = before
        self._ends[self._current] = before | {what}

    def mark(self) -> Any:
        return self._ends[self._current]

    @contextmanager
    def after(self, mark: Any) -> Iterator[None]:
        self._ends["second"] |= mark
        self._current = "second"
        yield
        self._current = "first"

    def join(self) -> None:
        assert all(partial() is not None for partial in self.partials), "memory that the second stream may read is free"
        self._ends["first"] |= self._ends["second"]


def step_on(
    streams: Streams, monkeypatch: pytest.MonkeyPatch, rows: int, groups: int, layers: int = 2, module: Any = pipeline
) -> None:
    """A step's attention and exchange of cp 2 whose results are checked."""
    monkeypatch.setattr(module, "second_stream", lambda device: streams)
    batch = random_batch(rows, 1)
    prepared: list[int] = []

    class Ops:
        def begin_step(self, group: DecodeBatch) -> None:
            prepared.append(group.group)

    class Comm:
        def exchange(self, partial: Partial, ops: Any, what: str, out: Tensor | None = None) -> Tensor:
            streams.launch((f"exchange {what}", int(partial.lse[0, 0])))
            kept = partial.o[:, 2:]
            return kept.clone() if out is None else out.copy_(kept)

    steps = module.Pipeline(Hop(groups, groups, 4, ""), 2, batch, Ops(), Comm())
    assert prepared == list(range(groups))
    for number in range(layers):
        q = torch.randn(rows, 4, 3)

        def attend(part: Tensor, group: DecodeBatch, q: Tensor = q, number: int = number) -> Partial:
            first = next(i for i in range(rows) if torch.equal(q[i], part[0]))
            assert torch.equal(group.lengths, batch.lengths[first : first + len(part)])
            streams.launch((f"attend {number}", first))
            o = 2 * part
            streams.partials.append(weakref.ref(o))
            return Partial(o, torch.full((len(part), 4), float(first)))

        out = steps.run(q, attend, str(number))
        assert torch.equal(out, 2 * q[:, 2:])
        streams.partials.clear()
        streams.launch((f"rest {number}", 0))


def disorder(streams: Streams, layers: int = 2) -> list[str]:
    """What is launched too early, or without need too late."""
    after, flaws = streams.after_, []

    def launches(what: str) -> list[Launch]:
        return sorted(launch for launch in after if launch[0] == what)

    exchanges = [exchange for number in range(layers) for exchange in launches(f"exchange {number}")]
    flaws += [f"{b} may overtake {a}" for a, b in pairwise(exchanges) if a not in after[b]]
    for number in range(layers):
        attended, exchanged = launches(f"attend {number}"), launches(f"exchange {number}")
        pairs = list(zip(attended, exchanged, strict=True))
        flaws += [f"{b} may overtake {a}" for a, b in pairs if a not in after[b]]
        flaws += [f"the layer may overtake {b}" for b in exchanged if b not in after[f"rest {number}", 0]]
        flaws += [f"{b} waits for {a}" for a, (_, b) in zip(attended[1:], pairs, strict=False) if a in after[b]]
        flaws += [f"{a} waits for {b}" for a in attended for b in exchanged if b in after[a]]
    return flaws


@pytest.mark.parametrize(("rows", "groups"), [(2, 2), (5, 2), (7, 3), (4, 4)])
def test_an_exchange_runs_beside_the_next_attention(rows: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams()
    step_on(streams, monkeypatch, rows, groups)
    assert disorder(streams) == []
    assert len(streams.after_) == 2 * (2 * groups + 1)


def test_a_small_batch_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "second_stream", lambda device: pytest.fail("there is nothing to overlap"))
    calls: list[tuple[int, bool]] = []

    class Ops:
        def begin_step(self, group: DecodeBatch) -> None:
            assert group is batch

    class Comm:
        def exchange(self, partial: Partial, ops: Any, what: str, out: Tensor | None = None) -> Tensor:
            calls.append((len(partial.o), out is None))
            return partial.o

    batch = random_batch(3, 1)
    for plan in (Hop(2, 4, 4, ""), WITHOUT_HOP):
        steps: Any = Pipeline(plan, 2, batch, Ops(), Comm())  # type: ignore[arg-type]
        steps.run(torch.randn(3, 4, 3), lambda q, group: Partial(q, q[..., 0]), "")
    assert calls == [(3, True)] * 2


BUGS = {
    "no join": ("        second.join()\n", ""),
    "no fork": ("second.after(attended)", "second.after(frozenset())"),
    "a fork from after the next attention": ("second.after(attended)", "second.after(second.mark())"),
    "one stream": ("with second.after(attended):", "if True:"),
    "the rows of the next group": ("what, out[before])", "what, out[own])"),
    "the partial of the next group": ("exchange(partials[-2]", "exchange(partials[-1]"),
    "the first group's schedule for all": ("attend(q[own], group)", "attend(q[own], first)"),
    "partials that are freed": (
        "partials.append(attend(q[own], group).merged())",
        "partials = [partials[-1], attend(q[own], group)]",
    ),
    "the last group exchanged first": (
        "        second.join()\n",
        "        second.join()\n        second._ends['first'] = attended\n",
    ),
}


@pytest.mark.parametrize(("right", "wrong"), BUGS.values(), ids=BUGS)
def test_a_bug_is_seen(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted in the text of pipeline.py."""
    source = inspect.getsource(pipeline)
    assert source.count(right) == 1
    planted = types.ModuleType("planted")
    monkeypatch.setitem(sys.modules, "planted", planted)
    exec(source.replace(right, wrong), vars(planted))
    streams = Streams()
    with pytest.raises(AssertionError):
        step_on(streams, monkeypatch, 8, 4, module=planted)
        assert disorder(streams) == []


def test_the_gpus_of_the_estimate_exist() -> None:
    for gpu in GPUS:
        found = hop(role(cp=4, batch=1024), model("deepseek-v3"), "latent", 2048, Hardware(None, 8, False, gpu))
        assert found.groups > 1
