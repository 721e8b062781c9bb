"""The runtime's ranks as threads of one process, on a stand-in for torch.distributed that keeps a record."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from helixc_runtime import comm, engine, handoff
from helixc_runtime.attention_shape import attention_shape
from helixc_runtime.comm import Comm, Connection, TorchComm
from helixc_runtime.engine import Session, load_decoder, make_writer, serve_context, serve_generation
from helixc_runtime.ffn_shape import ffn_shape
from helixc_runtime.job import Job, Request
from helixc_runtime.manifest import Plan, Rank
from helixc_runtime.ops_torch import TorchOps

GROUPS = ("tp", "cp", "pp", "ffn_tp", "moe_tp", "moe_ep")
WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Call:
    """One communication as a rank issued it. `size`: bytes of what it puts in or receives."""

    kind: str
    ranks: tuple[int, ...]
    size: int
    source: int | None = None


class ThreadDist:
    """The functions of torch.distributed that the runtime calls. A group is the tuple of its ranks."""

    def __init__(self) -> None:
        self.calls: dict[int, list[Call]] = defaultdict(list)
        self._own = threading.local()
        self._lock = threading.Condition()
        self._meetings: dict[tuple[object, int], dict[int, Any]] = defaultdict(dict)
        self._turns: dict[tuple[object, int], int] = defaultdict(int)
        self._boxes: dict[object, queue.Queue[Tensor]] = defaultdict(queue.Queue)

    def become(self, rank: int) -> None:
        """The calling thread is `rank` from now on."""
        self._own.rank = rank

    def all_reduce(self, x: Tensor, group: tuple[int, ...]) -> None:
        x.copy_(sum(self._meet("all_reduce", x.clone(), group)))

    def all_gather(self, out: Tensor, x: Tensor, group: tuple[int, ...]) -> None:
        out.copy_(torch.cat(self._meet("all_gather", x, group)))

    def all_to_all_single(self, out: Tensor, x: Tensor, group: tuple[int, ...]) -> None:
        place = group.index(self._own.rank)
        out.copy_(torch.stack([sent[place] for sent in self._meet("exchange", x, group)]))

    def broadcast(self, x: Tensor, source: int, group: tuple[int, ...]) -> None:
        if len(group) > 1:
            x.copy_(self._meet("broadcast", x.clone(), group, source)[group.index(source)])

    def send(self, x: Tensor, rank: int, group: tuple[int, ...]) -> None:
        pair = (self._own.rank, rank)
        self._record("send", pair, x)
        self._box("pipeline", pair).put(x.clone())

    def isend(self, x: Tensor, rank: int, tag: int) -> Any:
        pair = (self._own.rank, rank)
        self._record("post", pair, x)
        self._box(tag, pair).put(x.clone())
        return _Sent()

    def recv(self, x: Tensor, rank: int, group: object = None, tag: int = 0) -> None:
        pair = (rank, self._own.rank)
        self._record("take" if group is None else "recv", pair, x)
        x.copy_(self._box(tag if group is None else "pipeline", pair).get(timeout=WAIT_S))

    def irecv(self, x: Tensor, rank: int, tag: int) -> Any:
        self.recv(x, rank, tag=tag)
        return _Sent()

    def executor(self, workers: int, name: str) -> ThreadPoolExecutor:
        """Of the calling rank's own threads."""
        return ThreadPoolExecutor(workers, name, initializer=self.become, initargs=(self._own.rank,))

    def _box(self, tag: object, pair: tuple[int, int]) -> queue.Queue[Tensor]:
        with self._lock:  # both ends may ask first
            return self._boxes[tag, pair]

    def _record(self, kind: str, ranks: tuple[int, ...], x: Tensor, source: int | None = None) -> None:
        self.calls[self._own.rank].append(Call(kind, ranks, x.numel() * x.element_size(), source))

    def _meet(self, kind: str, x: Tensor, group: tuple[int, ...], source: int | None = None) -> list[Tensor]:
        """What every member brings, in group order."""
        rank = self._own.rank
        self._record(kind, group, x, source)
        with self._lock:
            turn = self._turns[group, rank]
            self._turns[group, rank] += 1
            meeting = self._meetings[group, turn]
            meeting[rank] = x
            self._lock.notify_all()
            assert self._lock.wait_for(lambda: len(meeting) == len(group), WAIT_S), f"{kind} over {group} hangs"
        return [meeting[member] for member in group]


class _Sent:
    def wait(self, patience: object = None) -> None: ...


class _Store:
    """TCPStore of one process."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        self._values[key] = value

    def get(self, key: str) -> bytes:
        return self._values[key].encode()

    def add(self, key: str, more: int) -> int:
        with self._lock:
            self._values[key] = str(int(self._values.get(key, "0")) + more)
            return int(self._values[key])

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)


class Events:
    """What every rank has told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []

    def emit(self, event: str, **fields: Any) -> None:
        self.told.append((event, fields))


def calls_of(
    plan: Plan,
    requests: tuple[Request, ...],
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_comm: Callable[[Rank, Any], Comm] = TorchComm,
    keep_logits: bool = False,
    events: Events | None = None,
) -> dict[int, list[Call]]:
    """Serve `requests` with every rank of `plan`, as worker processes would; all calls of each rank, in order.

    `make_comm` is called with a rank and its groups, for generation ranks. Logits are kept in `run_dir`.
    """
    fake, store = ThreadDist(), _Store()
    for module in (comm, engine, handoff):
        monkeypatch.setattr(module, "dist", fake)
    monkeypatch.setattr(comm, "_all_gather", fake.all_gather)
    monkeypatch.setattr(handoff, "ThreadPoolExecutor", fake.executor)
    job = Job("", None, "cpu", requests, keep_logits, WAIT_S, 1)
    errors: list[BaseException] = []

    def serve(index: int) -> None:
        rank = plan.ranks[index]
        fake.become(index)
        instance = plan.instance_of(rank)
        groups = {name: getattr(rank.groups, name) for name in GROUPS if len(getattr(rank.groups, name)) > 1}
        connection = Connection(cast(Any, groups), cast(Any, instance.ranks), cast(Any, store))
        emit, device = cast(Any, events or Events()), torch.device("cpu")
        with torch.inference_mode():
            own = make_comm if rank.role == "generation" else TorchComm
            decoder = load_decoder(plan, rank, own(rank, cast(Any, groups)), device, emit)
            session = Session(job, plan, rank, instance, decoder, connection, run_dir, emit)
            if rank.role == "context":
                serve_context(session, make_writer(plan, rank, run_dir, connection, device))
            else:
                shape = attention_shape(plan.model, rank, plan.tokens_per_block)
                serve_generation(session, TorchOps(shape, ffn_shape(plan.model, rank, instance)))

    _run_all([_guarded(serve, index, errors) for index in range(len(plan.ranks))])
    if errors:
        raise errors[0]
    return fake.calls


def _guarded(serve: Callable[[int], None], index: int, errors: list[BaseException]) -> Callable[[], None]:
    def run() -> None:
        try:
            serve(index)
        except BaseException as error:
            errors.append(error)

    return run


def _run_all(targets: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
