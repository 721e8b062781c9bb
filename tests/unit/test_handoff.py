"""The handoff between peers: the protocol with ranks as threads over shared memory, its faults and planted bugs."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helixc_runtime import arena as arena_module
from helixc_runtime import engine, handoff, page_writer
from helixc_runtime.arena import Arena, map_arena, map_gpu_arena
from helixc_runtime.handoff import HandoffError, HandoffLost
from helixc_runtime.manifest import Rank, Transfer
from helixc_runtime.page_writer import TorchPageWriter
from helixc_runtime.peer_memory import PeerMemoryError
from tests.handoff_cases import CPU, LAYOUTS, Case, check_cache, hand_over, random_case

IDS = ["mla", "gqa pp", "gqa tp", "gqa copies"]


def check_all(case: Case, make_writer: Callable[..., Any] = TorchPageWriter) -> dict[str, int]:
    """Hand over, and compare all caches; the bytes that took each way."""
    caches, moved, errors = hand_over(case, make_writer)
    assert not errors
    held = sum(check_cache(case, case.plan.ranks[rank], *caches[rank]) for rank in caches)
    assert held == sum(moved.values())
    return moved


@pytest.mark.parametrize("gpus_per_node", [1, 5, 100], ids=["hosts", "mixed", "peers"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_owners_hold_what_was_computed(layout: Any, gpus_per_node: int, seed: int) -> None:
    kv_dtype = random.Random(seed).choice(("auto", "float16", "fp8"))
    moved = check_all(random_case(layout, kv_dtype, seed, gpus_per_node))
    if gpus_per_node != 5:
        assert list(moved) == ["host" if gpus_per_node == 1 else "peer"]


def test_ranks_of_a_host_are_peers_and_others_are_not(seed: int) -> None:
    """GPUs 0 to 3 prefill and 4 to 11 decode, 5 a host: rank 4 alone shares a host with senders."""
    case = random_case(LAYOUTS[2], "auto", seed, gpus_per_node=5, lengths=(40, 70))
    moved = check_all(case)
    of_first = [t for t in case.plan.transfers if t.target == 0]
    share = len(of_first) / len(case.plan.transfers)
    assert set(moved) == {"host", "peer"} and share == 1 / 8
    assert [case.plan.shares(case.plan.ranks[0], case.plan.ranks[rank]) for rank in (4, 5, 6, 7)] == [True] + 3 * [
        False
    ]


# --- Planted bugs -----------------------------------------------------------------------------------------------


class SlowWriter(TorchPageWriter):
    """Copies like a GPU: `write` returns before it has begun."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._thread, self._copies = ThreadPoolExecutor(1), list[Future[None]]()

    def write(self, *arguments: Any) -> None:
        def later() -> None:
            time.sleep(0.05)
            super(SlowWriter, self).write(*arguments)

        self._copies.append(self._thread.submit(later))

    def wait(self, patience: float) -> None:
        for copy in self._copies:
            copy.result(patience)
        self._copies.clear()


class HastyWriter(SlowWriter):
    """Says that all is written when it was started."""

    def wait(self, patience: float) -> None: ...


def test_a_copy_takes_its_time(seed: int) -> None:
    check_all(random_case(LAYOUTS[0], "auto", seed), SlowWriter)


def test_a_reply_before_the_copy_is_complete_is_noticed(seed: int) -> None:
    with pytest.raises(AssertionError):
        check_all(random_case(LAYOUTS[0], "auto", seed), HastyWriter)


def next_owner(position: Tensor, block: int, cp: int) -> Tensor:
    """The owner of the block before."""
    return (position // block + 1) % cp


def layer_late(t: Transfer, rank: Rank) -> slice:
    """Wraps around within the stage."""
    count = rank.layers[1] - rank.layers[0]
    first = (t.layers[0] - rank.layers[0] + 1) % count
    return slice(first, first + t.layers[1] - t.layers[0])


def other_pages(plan: Any, rank: Any, request: Any, row: Any, cache: Any, transport: Any, peers: Any) -> Any:
    """Tells the pages in reverse."""
    pages = torch.full((plan.most_pages(plan.instance_of(rank)),), -1, dtype=torch.int32)
    own = torch.tensor(cache.pages(row)[::-1], dtype=torch.int32)
    pages[: len(own)] = own
    return [transport.isend(pages, source, request.index) for source in peers]


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (page_writer, "owner", next_owner),
        (page_writer, "_local", layer_late),
        (handoff, "_tell", other_pages),
    ],
    ids=["owner", "layer", "pages"],
)
def test_a_wrong_handoff_is_noticed(
    module: Any, name: str, wrong: object, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(LAYOUTS[1], "auto", seed, lengths=(64, 70))
    check_all(case)
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        check_all(case)


def test_pages_are_told_when_the_gpu_has_done_its_work(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step under way may append to pages that were given back: what a peer writes must come after it."""
    case = random_case(LAYOUTS[0], "auto", seed)
    rank, order = case.ranks("generation")[0], list[str]()
    cache, row = case.cache(rank)
    cache.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(f"waited for {device}"))

    class Recorder:
        def isend(self, x: Tensor, rank: int, tag: int) -> Any:
            order.append(f"told {rank} {x[: len(cache.pages(row))].tolist()}")

    recorder: Any = Recorder()
    handoff._tell(case.plan, rank, case.request, row, cache, recorder, [1, 0])
    pages = cache.pages(row)
    assert order == ["waited for cuda:0", f"told 1 {pages}", f"told 0 {pages}"]


# --- Faults -----------------------------------------------------------------------------------------------------


class FailingWriter(TorchPageWriter):
    """Cannot write to the first generation rank."""

    def write(self, t: Transfer, target: Rank, cached: Sequence[Tensor], pages: Tensor, tokens: int) -> None:
        if t.target == 0:
            raise PeerMemoryError("mapping KV pages: refused")
        super().write(t, target, cached, pages, tokens)


class StuckWriter(TorchPageWriter):
    """Its copies never end."""

    def wait(self, patience: float) -> None:
        raise TimeoutError(f"the GPU has not written it within {patience:g} s")


def test_a_copy_that_fails_is_told_and_the_others_are_made(seed: int) -> None:
    """Both ends name it. Who is served by the same sender has its KV."""
    case = random_case(LAYOUTS[0], "auto", seed, lengths=(60, 70))
    caches, _, errors = hand_over(case, FailingWriter)
    first, *others = caches
    sender = next(t.source for t in case.plan.transfers if t.target == 0)
    assert set(errors) == {first, sender}
    for error in errors.values():
        assert isinstance(error, HandoffError)
        assert str(error) == (
            f"the KV of request 3, from rank {sender} to rank {first}: PeerMemoryError: mapping KV pages: refused"
        )
    for rank in others:
        check_cache(case, case.plan.ranks[rank], *caches[rank])


def test_a_copy_that_does_not_end_is_no_reply(seed: int) -> None:
    """Nobody may give the pages to another request: they may still be written."""
    case = random_case(LAYOUTS[0], "auto", seed)
    begin = time.monotonic()
    _, moved, errors = hand_over(case, StuckWriter, patience=0.5)
    assert not moved and errors and all(isinstance(error, HandoffLost) for error in errors.values())
    assert any("the GPU has not written it within 0.5 s" in str(error) for error in errors.values())
    assert any("silent for 0.5 s" in str(error) for error in errors.values())
    assert time.monotonic() - begin < 15


def test_a_sender_that_never_comes_is_named(seed: int) -> None:
    case = random_case(LAYOUTS[1], "auto", seed, lengths=(60, 70))
    missing = case.plan.transfers[0].source
    senders = [rank.rank for rank in case.ranks("context") if rank.rank != missing]
    _, _, errors = hand_over(case, TorchPageWriter, patience=0.5, senders=senders)
    waited = {len(case.ranks("context")) + t.target for t in case.plan.transfers if t.source == missing}
    assert set(errors) == waited
    assert all(f"from rank {missing} to rank {rank}: peer lost" in str(error) for rank, error in errors.items())


# --- Shared memory ----------------------------------------------------------------------------------------------


def test_what_one_maps_the_other_sees_and_nothing_is_left() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    arena = Arena(5000, CPU, shared=True)
    handle, other = arena.handle(), map_arena(arena.handle(), 5000)
    other[4999] = 7
    assert arena.memory[4999] == 7 and len(other) == 5000
    del arena
    gc.collect()
    with pytest.raises(PeerMemoryError, match=r"mapping the KV pages of process \d+: .*HELIXC_HOST_HANDOFF=1"):
        map_arena(handle, 5000)
    del other
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_less_memory_than_both_ends_believe_is_refused() -> None:
    arena = Arena(100, CPU, shared=True)
    with pytest.raises(PeerMemoryError, match="mapping the KV pages"):
        map_arena(arena.handle(), 1 << 20)


class Driver:
    """CUDA's part in sharing memory: an allocation of 10 MB at address 1 << 40, mapped elsewhere at 1 << 44."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.opened = status, b""

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: Any) -> int:
        base._obj.value, size._obj.value = 1 << 40, 10_000_000
        return 0

    def cuIpcGetMemHandle(self, handle: Any, base: Any) -> int:
        assert base.value == 1 << 40
        handle._obj.bytes[:] = range(64)
        return self.status

    def cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: int) -> int:
        self.opened, address._obj.value = bytes(handle.bytes), 1 << 44
        return self.status

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"
        return 0


class GpuMemory:
    """What an Arena asks of its tensor."""

    device = torch.device("cuda", 1)

    def data_ptr(self) -> int:
        return (1 << 40) + 4096


def test_the_handle_of_a_gpus_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who maps it finds it where it lies in its allocation."""
    driver, arena = Driver(), Arena(1, CPU, shared=False)
    monkeypatch.setattr(arena_module, "_driver", lambda: driver)
    monkeypatch.setattr(arena_module, "_current", contextlib.nullcontext)
    arena.memory = GpuMemory()  # type: ignore[assignment]
    assert map_gpu_arena(arena.handle(), GpuMemory.device) == (1 << 44) + 4096
    assert driver.opened == bytes(range(64))
    handle, driver.status = arena.handle(), 217
    for call in (arena.handle, lambda: map_gpu_arena(handle, GpuMemory.device)):
        with pytest.raises(PeerMemoryError, match=r"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED\. .*HELIXC_HOST_HANDOFF=1"):
            call()


@pytest.mark.parametrize("error", [HandoffError, HandoffLost])
def test_pages_are_given_back_if_nobody_writes_them(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A peer that is lost may still write."""

    def fail(*arguments: object) -> None:
        raise error("the copy")

    monkeypatch.setattr(engine, "receive", fail)
    case = random_case(LAYOUTS[0], "auto", seed)
    rank = case.ranks("generation")[0]
    generation: Any = engine.Generation.__new__(engine.Generation)
    generation.cache, row = case.cache(rank)
    generation.session = SimpleNamespace(plan=case.plan, rank=rank, job=SimpleNamespace(deadline_s=1.0))
    generation.transport, held = None, list(generation.cache.pages(row))
    with pytest.raises(error, match="the copy"):
        generation._receive(case.request, row)
    if error is HandoffLost:
        assert generation.cache.pages(row) == held
    else:
        with pytest.raises(KeyError):
            generation.cache.pages(row)


def test_a_request_is_offered_when_all_its_ranks_are_ready(seed: int) -> None:
    counts: dict[str, int] = {}
    offered: dict[str, str] = {}

    def add(key: str, by: int) -> int:
        counts[key] = counts.get(key, 0) + by
        return counts[key]

    store, request = SimpleNamespace(add=add, set=offered.__setitem__), random_case(LAYOUTS[0], "auto", seed).request
    session: Any = SimpleNamespace(connection=SimpleNamespace(store=store), instance=SimpleNamespace(ranks=(0, 1, 2)))
    for _ in range(2):
        engine._offer(session, request, 7)
    assert not offered
    engine._offer(session, request, 7)
    assert list(offered.values()) == ["7"]
