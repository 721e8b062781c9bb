"""The decode loop, a step ahead of the tokens it reads: traced over a hundred steps, with requests that come and go."""

from __future__ import annotations

import random
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from examples.tiny_checkpoint import VOCAB, make_checkpoint
from helixc_runtime import step
from helixc_runtime.attention_shape import attention_shape
from helixc_runtime.comm import TorchComm
from helixc_runtime.engine import Flight, Generation, load_decoder
from helixc_runtime.job import Request
from helixc_runtime.kv import KvCache, Row
from helixc_runtime.manifest import Plan
from helixc_runtime.models.decoder import Decoder
from helixc_runtime.ops import DecodeBatch
from helixc_runtime.ops_torch import TorchOps
from helixc_runtime.step import DecodeStep, Readback, RowInput, StepResult, TokensOnTheWay
from tests import threads
from tests.deployments import plan_of, role
from tests.threads import Events, calls_of

CPU = torch.device("cpu")
LAYOUTS: dict[str, dict[str, Any]] = {
    "cp 2": {"cp": 2},
    "tp 2 cp 3": {"tp": 2, "cp": 3},
    "data parallel": {"tp": 2, "cp": 2, "dp": True},
    "two stages": {"cp": 2, "pp": 2},
}
ROWS, STOPS = 3, 12  # stop tokens of VOCAB
# Of each third request the stop tokens are ignored, each first is all but sure to meet one.
LENGTHS = (90, 1, 120, 90, 30, 2, 90, 3, 40, 90, 17, 60)


@dataclass(frozen=True)
class Launch:
    """One step of one rank: its rows, as (request, slot), and what it computed with, by slot."""

    rows: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    attends: tuple[bool, ...]
    owned: tuple[bool, ...]


class Trace:
    """Every launch of every rank. What a step computes with is what the device has."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: dict[int, list[Launch]] = defaultdict(list)
        seen = threading.local()
        launch, batch, decode = Generation._launch, KvCache.batch, Decoder.decode

        def traced_launch(generation: Generation) -> Flight:
            flight = launch(generation)
            rows = tuple((row.index, row.slot) for row in flight.rows)
            self.launches[generation.session.rank.rank].append(Launch(rows, *seen.tokens, *seen.batch))
            return flight

        def traced_batch(cache: KvCache, positions: Tensor, attends: Tensor, rotary: Any) -> DecodeBatch:
            made = batch(cache, positions, attends, rotary)
            seen.batch = [tuple(x.tolist()) for x in (positions, attends, made.owned.bool())]
            return made

        def traced_decode(decoder: Decoder, tokens: Tensor, *rest: Any) -> Tensor:
            seen.tokens = [tuple(tokens.tolist())]
            return decode(decoder, tokens, *rest)

        monkeypatch.setattr(Generation, "_launch", traced_launch)
        monkeypatch.setattr(KvCache, "batch", traced_batch)
        monkeypatch.setattr(Decoder, "decode", traced_decode)


@dataclass(frozen=True)
class Served:
    """What became of some requests."""

    plan: Plan
    requests: tuple[Request, ...]
    launches: dict[int, list[Launch]]
    tokens: dict[int, list[int]]
    reasons: dict[int, str]
    stored: int  # over all ranks


def serve(
    layout: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, stop_tokens: int = STOPS
) -> Served:
    """Requests of LENGTHS, three at a time; drawn tokens, of which some are stop tokens."""
    pick = random.Random(seed)
    checkpoint = make_checkpoint("llama", folder / "checkpoint", seed=seed, layers=2)
    plan = plan_of(str(checkpoint), role(), role(**layout, batch=ROWS))
    stops = tuple(pick.sample(range(VOCAB), stop_tokens))
    plan = replace(plan, model=replace(plan.model, arch=replace(plan.model.arch, eos_token_ids=stops)))
    requests = tuple(
        Request(
            index,
            token_ids=tuple(pick.randrange(VOCAB) for _ in range(pick.choice((1, 3, 4, 5, 17, 40)))),
            max_tokens=LENGTHS[index],
            temperature=pick.choice((0.0, 1.5)) if index % 3 else 1.5,
            top_p=1.0,
            seed=index,
            ignore_eos=index % 3 == 2,
        )
        for index in range(len(LENGTHS))
    )
    trace, events = Trace(monkeypatch), Events()
    calls_of(plan, requests, folder, monkeypatch, events=events)
    tokens: dict[int, list[int]] = defaultdict(list)
    for name, fields in events.told:
        if name in ("prefilled", "token"):
            tokens[fields["request"]].append(fields["token"])
    reasons = {fields["request"]: fields["reason"] for name, fields in events.told if name == "finished"}
    stored = sum(fields["tokens"] for name, fields in events.told if name == "kv_tokens")
    return Served(plan, requests, trace.launches, tokens, reasons, stored)


def flaws(served: Served) -> Iterator[str]:
    """Whatever a request has been through that it should not."""
    ranks = [rank for rank in served.plan.ranks if rank.role == "generation"]
    stops, steps = served.plan.model.arch.eos_token_ids, served.launches[ranks[0].rank]
    if any(
        [launch.rows for launch in served.launches[rank.rank]] != [launch.rows for launch in steps] for rank in ranks
    ):
        yield "the ranks do not take the same steps"
    for request in served.requests:
        tokens, length = served.tokens[request.index], len(request.token_ids)
        ends = [i for i, token in enumerate(tokens) if token in stops and not request.ignore_eos]
        due = ("stop", ends[0] + 1) if ends else ("length", request.max_tokens)
        if (end := (served.reasons.get(request.index), len(tokens))) != due:
            yield f"request {request.index} ends with {end}, not {due}"
        for rank in ranks:
            own = [
                (launch.positions[slot], launch.tokens[slot])
                for launch in served.launches[rank.rank]
                for index, slot in launch.rows
                if index == request.index
            ]
            if [position for position, _ in own] != list(range(length, length + len(own))):
                yield f"rank {rank.rank}: request {request.index} is at positions {[p for p, _ in own]}"
            if rank.layers[0] == 0 and [token for _, token in own[: len(tokens) - 1]] != tokens[:-1]:
                yield f"rank {rank.rank}: request {request.index} continues other tokens than were told"
            if not len(tokens) - 1 <= len(own) <= len(tokens) - (0 if ends and served.plan.instances[1].pp == 1 else 1):
                yield f"request {request.index} takes {len(own)} steps for {len(tokens)} tokens"
    for number, launch in enumerate(steps):
        for index, slot in launch.rows:
            owners = Counter(
                (rank.pp_rank, rank.tp_rank) for rank in ranks if served.launches[rank.rank][number].owned[slot]
            )
            copies = {(rank.pp_rank, rank.tp_rank) for rank in ranks}
            if served.plan.instances[1].attention_dp:
                copies = {copy for copy in copies if copy[1] == index % served.plan.instances[1].tp}
            if owners != Counter(copies):
                yield f"step {number}: request {index} is stored by {dict(owners)}"
        used = {slot for _, slot in launch.rows}
        for rank in ranks:
            mine = served.launches[rank.rank][number]
            if any(mine.attends[slot] for slot in range(len(mine.attends)) if slot not in used):
                yield f"step {number}: rank {rank.rank} attends for a slot that is not in use"
    copies = sum(rank.cp_rank == 0 for rank in ranks) // (2 if served.plan.instances[1].attention_dp else 1)
    cached = sum(
        len(request.token_ids) + len(served.tokens[request.index]) - 1
        for request in served.requests
        if len(served.tokens[request.index]) > 1
    )
    if served.stored != copies * cached:
        yield f"{served.stored} tokens are stored, not {copies} times {cached}"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_step_is_one_position_on(
    layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    served = serve(layout, tmp_path, monkeypatch, seed)
    assert list(flaws(served)) == [], f"{seed=}"
    assert len(served.launches[1]) >= max(LENGTHS) - 1 and "stop" in served.reasons.values(), f"{seed=}"


@pytest.mark.parametrize("deterministic", [True, False])
def test_steps_of_two_runs(deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """With HELIXC_DETERMINISTIC=1 they have the same rows, however long the prompts take; else they have not."""
    monkeypatch.setenv("HELIXC_DETERMINISTIC", str(int(deterministic)))
    check, steps = threads._Store.check, []
    for name, unready in (("first", 0), ("second", 7)):
        asked = Counter[str]()

        def late(store: Any, keys: list[str], asked: Counter[str] = asked, unready: int = unready) -> bool:
            asked.update(keys)
            return asked[keys[0]] > unready and check(store, keys)

        with monkeypatch.context() as patch:
            patch.setattr(threads._Store, "check", late)
            served = serve({"cp": 2}, tmp_path / name, patch, seed)
        assert list(flaws(served)) == [], f"{seed=}"
        steps.append([launch.rows for launch in served.launches[1]])
    assert (steps[0] == steps[1]) == deterministic, f"{seed=}"


# --- Planted bugs -----------------------------------------------------------------------------------------------


def repeats_a_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device goes on one step in seven late."""
    compute, count = DecodeStep._compute, Counter[int]()

    def mutant(self: DecodeStep, size: int, draws: bool) -> StepResult | None:
        before = self._control[step._Field.position].clone()
        result = compute(self, size, draws)
        count[id(self)] += 1
        if count[id(self)] % 7 == 0:
            self._control[step._Field.position] = before
        return result

    monkeypatch.setattr(DecodeStep, "_compute", mutant)


def feeds_the_token_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is fed what the one before it was."""
    compute = DecodeStep._compute

    def mutant(self: DecodeStep, size: int, draws: bool) -> StepResult | None:
        before = self._control[step._Field.token].clone()
        result = compute(self, size, draws)
        told = replace(result, tokens=result.tokens.clone()) if result else None
        self._control[step._Field.token] = before
        return told

    monkeypatch.setattr(DecodeStep, "_compute", mutant)


def counts_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host takes positions from the tokens it has read, a step behind: a repetition when rows come or go."""
    make = Generation._input
    monkeypatch.setattr(Generation, "_input", lambda self, row: replace(make(self, row), position=row.cached))


def gives_the_token_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """When rows come or go, the others get the last token that was read."""
    make = Generation._input

    def mutant(self: Generation, row: Row) -> RowInput:
        return replace(make(self, row), token=row.tokens[-1])

    monkeypatch.setattr(Generation, "_input", mutant)


def tells_what_follows_a_stop_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Row, "ended", property(lambda row: False, lambda row, value: None))


def goes_on_behind_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row leaves only when its last token was read, also where its last step was known."""
    leave = Generation._leave

    def mutant(self: Generation, row: Row) -> None:
        if row.ended:
            leave(self, row)

    monkeypatch.setattr(Generation, "_leave", mutant)


BUGS: list[Callable[[pytest.MonkeyPatch], None]] = [
    repeats_a_position,
    feeds_the_token_late,
    counts_what_was_read,
    gives_the_token_it_has,
    tells_what_follows_a_stop_token,
    goes_on_behind_the_end,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda f: f.__name__)
def test_a_planted_bug_is_seen(
    plant: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    plant(monkeypatch)
    assert list(flaws(serve({"cp": 2}, tmp_path, monkeypatch, seed))) != [], f"{seed=}"


def test_a_rank_that_chooses_other_tokens_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    tokens = Generation._tokens

    def mutant(self: Generation, flight: Flight) -> list[int]:
        return [token ^ (self.session.rank.rank == 2) for token in tokens(self, flight)]

    monkeypatch.setattr(Generation, "_tokens", mutant)
    monkeypatch.setattr(threads, "WAIT_S", 10.0)  # the other rank waits in vain
    with pytest.raises(RuntimeError, match="rank 2 has chosen other tokens than rank 1"):
        serve({"cp": 2}, tmp_path, monkeypatch, seed, stop_tokens=0)


# --- Host memory ------------------------------------------------------------------------------------------------


class SlowCopies(step._HostBuffer):
    """Memory that must not be touched from when a copy is enqueued until it was waited for."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._memory, self._copying = torch.zeros(shape, dtype=torch.int64), False

    @property
    def tensor(self) -> Tensor:  # type: ignore[override]
        assert not self._copying, "touched too early"
        return self._memory

    def enqueued(self) -> None:
        self._copying = True

    def wait(self) -> None:
        self._copying = False


class Impatient(SlowCopies):
    """A planted bug: nobody waits."""

    def wait(self) -> None:
        pass


def copies(buffer: type[SlowCopies], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """What the host does between steps: rows change twice in a row, and tokens are read one step late."""
    monkeypatch.setattr(step, "_HostBuffer", buffer)
    checkpoint = make_checkpoint("llama", folder / "checkpoint", seed=0, layers=1)
    plan = plan_of(str(checkpoint), None, role())
    rank = plan.ranks[0]
    decoder = load_decoder(plan, rank, TorchComm(rank, {}), CPU, cast(Any, Events()))
    ops = TorchOps(attention_shape(plan.model, rank, plan.tokens_per_block))
    runner = DecodeStep(decoder, ops, KvCache(plan.model, rank, plan.tokens_per_block, 4, 20, CPU))
    readback, ways = Readback(4, 2, CPU), deque[TokensOnTheWay]()

    def assign() -> None:
        runner.assign([RowInput(slot, None, 3, True, 0.0, 1.0, 0) for slot in range(3)])

    def advance() -> None:
        result = runner()
        assert result
        ways.append(readback.start(result.tokens))
        if len(ways) > 1:
            assert len(ways.popleft().wait()) == 4

    yield from (assign, assign, advance, advance, assign, advance, assign, assign, advance)


def test_host_memory_is_used_again_after_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for act in copies(SlowCopies, tmp_path, monkeypatch):
        act()


def test_host_memory_used_too_early_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    early = 0
    for act in copies(Impatient, tmp_path, monkeypatch):
        try:
            act()
        except AssertionError as error:
            assert "touched too early" in str(error)
            early += 1
    assert early >= 4


def test_tokens_that_nobody_has_read_are_not_overwritten() -> None:
    readback = Readback(4, 2, CPU)
    ways = [readback.start(torch.tensor([i, 9])) for i in range(2)]
    with pytest.raises(AssertionError, match="would be lost"):
        readback.start(torch.tensor([2, 9]))
    assert [way.wait() for way in ways] == [[0, 9], [1, 9]]
