"""OneSidedComm on the CPU, a thread a rank: the kernels' own source, host memory for inboxes."""

from __future__ import annotations

import random
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.loopback import Echo, Loopback
from examples.tiny_checkpoint import VOCAB, make_checkpoint
from helixc.codegen.build import render_all
from helixc.codegen.select import names_for, select
from helixc_runtime import comm as comm_module
from helixc_runtime import one_sided, ops_cuda
from helixc_runtime.attention_shape import attention_shape
from helixc_runtime.comm import Comm, GroupName, PeerTimeout
from helixc_runtime.engine import load_decoder
from helixc_runtime.job import Request
from helixc_runtime.manifest import Kernel, Plan, Rank
from helixc_runtime.models.decoder import Decoder
from helixc_runtime.one_sided import OneSidedComm
from helixc_runtime.ops import Norm, Partial, SplitPartial
from helixc_runtime.ops_torch import TorchOps
from helixc_runtime.peer_memory import NOTHING
from helixc_runtime.reference import kept_logits
from tests import threads
from tests.deployments import plan_of, role
from tests.gpu.kernel_cases import check_partial, random_case, relative_error, to_double
from tests.simt.cpu_kernel import CpuKernel, Gpu, build, cpu_ops
from tests.threads import Events, ThreadDist, calls_of

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

ARCH, CPU = "sm_100a", torch.device("cpu")
PATIENCE_S = 20.0
EPS = 1e-6  # of the tiny checkpoints


class Host:
    """Stands in for peer_memory: inboxes that threads share, each held by its group and its turn."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._inboxes: dict[tuple[object, ...], dict[int, Tensor]] = defaultdict(dict)
        self._turns: dict[tuple[object, ...], int] = defaultdict(int)

    def open_inboxes(
        self, size: int, group: GroupName, members: int, index: int, comm: Comm, device: torch.device
    ) -> Tensor:
        ranks = getattr(comm.rank.groups, group)  # type: ignore[attr-defined]
        with self._arrived:
            turn = self._turns[group, ranks, index]
            self._turns[group, ranks, index] += 1
            meeting = self._inboxes[group, ranks, turn]
            meeting[index] = torch.full((size // 4,), NOTHING - (1 << 32), dtype=torch.int32)
            self._arrived.notify_all()
            assert self._arrived.wait_for(lambda: len(meeting) == members, 20)
        return torch.tensor([meeting[member].data_ptr() for member in range(members)])

    def at_rest(self) -> bool:
        """Nothing lies unread."""
        inboxes = [inbox for meeting in self._inboxes.values() for inbox in meeting.values()]
        return bool(inboxes) and all(bool((inbox == NOTHING - (1 << 32)).all()) for inbox in inboxes)


@pytest.fixture
def host(seed: int, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(CpuKernel, "gpu", Gpu(4, seed), raising=False)
    monkeypatch.setattr(ops_cuda, "LoadedKernel", CpuKernel)
    monkeypatch.setattr(one_sided, "check_arch", lambda arches, device: ARCH)
    monkeypatch.setattr(one_sided, "open_inboxes", host.open_inboxes)
    return host


def with_kernels(plan: Plan, folder: Path, arch: str = ARCH) -> tuple[Plan, Callable[[Rank], Path]]:
    """The plan with its one-sided kernels built, and the folder of a rank: each has its own copy, as a GPU has."""
    libraries, kernels = [], []
    for source in render_all(select(plan, (arch,))):
        planned = source.config.planned()
        if planned.template in ("exchange", "merge_exchange", "reduce", "argmax"):
            libraries.append(build(source))
            kernels.append(replace(planned, cubin=libraries[-1].name))

    def folder_of(rank: Rank) -> Path:
        own = folder / f"rank{rank.rank}"
        own.mkdir(parents=True, exist_ok=True)
        for library in libraries:
            shutil.copy(library, own)
        return own

    return replace(plan, kernels=tuple(kernels)), folder_of


def make_plan(family: str, folder: Path, seed: int, reduce_rows: int | None = None, **sizes: Any) -> Plan:
    checkpoint = make_checkpoint(family, folder / "checkpoint", seed=seed, layers=2)
    plan = plan_of(str(checkpoint), role(), role(**sizes))
    if reduce_rows is not None:
        plan = replace(plan, instances=(plan.instances[0], replace(plan.instances[1], reduce_rows=reduce_rows)))
    return plan


def run(plan: Plan, body: Callable[[Rank], None], ranks: range | None = None) -> None:
    """`body` on every generation rank, or on some by their place, a thread each; the first error, if any."""
    generation = [rank for rank in plan.ranks if rank.role == "generation"]
    errors: list[BaseException] = []

    def guarded(rank: Rank) -> None:
        try:
            body(rank)
        except BaseException as error:
            errors.append(error)

    chosen = [generation[i] for i in ranks or range(len(generation))]
    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in chosen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_steps_of_any_size(host: Host, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """tp2 cp2: steps of few rows, and of more rows than are reduced one-sidedly, against float64."""
    plan, folder_of = with_kernels(make_plan("llama", tmp_path, seed, reduce_rows=3, tp=2, cp=2), tmp_path)
    instance, hidden = plan.instances[1], plan.model.arch.hidden_size
    fake, generator = ThreadDist(), torch.Generator().manual_seed(seed)
    monkeypatch.setattr(comm_module, "dist", fake)
    sizes = [random.Random(seed + i).randint(1, instance.max_batch_size) for i in range(6)]
    shape = attention_shape(plan.model, plan.ranks[-1], plan.tokens_per_block)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    bias, norm = normal(hidden), Norm(normal(hidden), EPS)
    work = []
    for rows in sizes:
        heads = (rows, shape.heads)
        parts = {rank.rank: Partial(normal(*heads, shape.partial_dim), normal(*heads)) for rank in plan.ranks[1:]}
        work.append((parts, {rank.rank: normal(rows, hidden) for rank in plan.ranks[1:]}, normal(rows, hidden)))
    results: dict[int, list[Tensor]] = defaultdict(list)

    def body(rank: Rank) -> None:
        fake.become(rank.rank)
        groups: Any = {"cp": rank.groups.cp, "ffn_tp": rank.groups.ffn_tp}
        own = OneSidedComm(rank, groups, instance, plan.kernels, folder_of(rank), CPU, PATIENCE_S)
        ops = TorchOps(shape)
        for parts, summands, residual in work:
            own.begin_step()
            merged = exchanged(own, parts[rank.rank], ops)
            first = own.reduce(summands[rank.rank].clone(), residual, bias, norm, ops, "o_proj")
            second = own.reduce(summands[rank.rank].clone(), None, None, None, ops, "FFN")
            row = torch.full((2, len(first[0])), -1)[1] if len(results[rank.rank]) % 2 else None
            tokens = own.argmax(first[0], rank.ffn_tp_rank * hidden, ops, "tokens", row)
            assert row is None or tokens is row
            own.end_step()
            results[rank.rank] += [merged, *first, second[0], tokens]
        own.check()

    run(plan, body)
    assert host.at_rest()
    for rank in plan.ranks[1:]:
        keep = shape.heads // 2
        mine = slice(rank.cp_rank * keep, (rank.cp_rank + 1) * keep)
        wanted = []
        for parts, summands, residual in work:
            o, lse = (torch.stack([parts[r][i][:, mine].double() for r in rank.groups.cp]) for i in (0, 1))
            total = torch.stack([summands[r].double() for r in rank.groups.ffn_tp]).sum(0)
            exact = TorchOps(shape).add_norm(total, residual.double(), bias.double(), Norm(norm.weight.double(), EPS))
            # All ranks have the same sums: the first rank's, which is the first column, counts.
            wanted += [TorchOps(shape).combine(o, lse).o, *exact, total, exact[0].argmax(-1)]
        assert max(map(relative_error, results[rank.rank], wanted)) <= 1e-5


def exchanged(comm: Comm, partial: Partial, ops: TorchOps) -> Tensor:
    """The rows one by one, as groups are, after all of them at once: the same."""
    whole = comm.exchange(partial, ops, "partials")
    out = torch.full_like(whole, torch.nan)
    for row in range(len(out)):
        rows = slice(row, row + 1)
        comm.exchange(Partial(partial.o[rows], partial.lse[rows]), ops, "a group's partials", out[rows])
    assert torch.equal(out, whole)
    return out


@pytest.mark.parametrize(
    ("family", "sizes", "keep_logits"),
    [
        ("llama", {"tp": 2, "cp": 2}, True),
        ("llama", {"cp": 3}, False),
        ("deepseek-v3-lite", {"cp": 3, "ep": 3, "exchange_space": "latent"}, True),
        ("deepseek-v3-lite", {"cp": 3, "ep": 3, "exchange_space": "value"}, True),
        ("deepseek-v3-lite", {"tp": 2, "cp": 2}, False),
        ("llama", {"tp": 2, "cp": 2, "hop_groups": 2}, True),
        ("deepseek-v3-lite", {"cp": 3, "ep": 3, "exchange_space": "latent", "hop_groups": 3}, False),
    ],
)
def test_a_deployment_computes_the_same(
    family: str,
    sizes: dict[str, Any],
    keep_logits: bool,
    host: Host,
    tmp_path: Path,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole requests through the engine: the logits of collectives, and their largest."""
    plan, folder_of = with_kernels(make_plan(family, tmp_path, seed, **sizes), tmp_path)
    source = random.Random(seed)
    requests = tuple(
        Request(i, tuple(source.randrange(VOCAB) for _ in range(3 + 8 * i)), 5, 0.0, 1.0, 0, True) for i in range(3)
    )
    made: list[OneSidedComm] = []

    def one_sided_comm(rank: Rank, groups: Any) -> Comm:
        instance = plan.instance_of(rank)
        made.append(OneSidedComm(rank, groups, instance, plan.kernels, folder_of(rank), CPU, PATIENCE_S))
        return made[-1]

    for name in ("collective", "one_sided"):
        (tmp_path / name).mkdir()

    def aligned(*arguments: Any) -> Decoder:
        """As weights on a GPU are; a file's may start anywhere."""
        decoder = load_decoder(*arguments)
        tensors = decoder.weights._tensors
        tensors.update({key: tensor.clone() for key, tensor in tensors.items()})
        return decoder

    monkeypatch.setattr(threads, "load_decoder", aligned)
    calls_of(plan, requests, tmp_path / "collective", monkeypatch, keep_logits=True)
    found = Events()
    calls = calls_of(plan, requests, tmp_path / "one_sided", monkeypatch, one_sided_comm, keep_logits, found)
    kinds = {"post", "take", "broadcast"} | ({"all_gather"} if keep_logits else set())
    assert {call.kind for call in calls[plan.ranks[-1].rank]} == kinds, "without need the logits stay where they are"
    assert host.at_rest()
    for comm in made:
        comm.check()
    for request in requests:
        theirs = kept_logits(tmp_path / "collective", request)
        if keep_logits:
            assert (theirs - kept_logits(tmp_path / "one_sided", request)).abs().max() <= 1e-4
        for token, logits in zip(tokens_of(found)[request.index], theirs[1:], strict=True):
            assert logits[token] >= logits.max() - 2e-4
            if token != logits.argmax():  # a tie, after which the requests go on differently
                break


def tokens_of(events: Events) -> dict[int, list[int]]:
    """By request."""
    found: dict[int, list[int]] = defaultdict(list)
    for event, fields in events.told:
        if event == "token":
            found[fields["request"]].append(fields["token"])
    assert {len(tokens) for tokens in found.values()} == {4}, "the first is the context's"
    return found


def test_from_attention_to_the_exchange(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Attention and Comm of two ranks, on GPUs that cut rows differently: merged before the exchange, and by it."""
    plan = plan_of("deepseek-v3-lite", None, role(cp=2, batch=4, block=32), dtype="bfloat16")
    instance = replace(plan.instances[0], reduce_rows=0)
    plan, folder_of = with_kernels(replace(plan, instances=(instance,)), tmp_path, "sm_90a")
    monkeypatch.setattr(one_sided, "check_arch", lambda arches, device: "sm_90a")
    shape, draw = attention_shape(plan.model, plan.ranks[0], 32), random.Random(seed)
    lengths = [[draw.randint(300, 900), 0, 64, 1], [draw.choice([0, 100]), 0, draw.randint(200, 500), 2]]
    cases = [random_case(shape, of_rank, CPU, seed + i, appended=True) for i, of_rank in enumerate(lengths)]
    cases[1] = replace(cases[1], q=cases[0].q)
    exact = [TorchOps(shape).attend(case.q.double(), to_double(case.cache), case.batch) for case in cases]
    folder = tmp_path / "attention"
    folder.mkdir()
    idle = ("append", "combine")
    each = [cpu_ops(shape, 2, folder, monkeypatch, Gpu(n, seed), None, "sm_90a", idle=idle) for n in (7, 12)]
    left: list[list[Partial | SplitPartial]] = []
    for ops, case in zip(each, cases, strict=True):
        merged, split = ops.attend(case.q, case.cache, case.batch), ops.attend_split(case.q, case.cache, case.batch)
        assert isinstance(split, SplitPartial) and int(split.count) > 0
        left.append([merged, split])
    results: dict[int, list[Tensor]] = {}

    def body(rank: Rank) -> None:
        comm = OneSidedComm(rank, {}, instance, plan.kernels, folder_of(rank), CPU, 20.0)
        comm.begin_step()
        both = [comm.exchange(partial, each[rank.cp_rank], "partials") for partial in left[rank.cp_rank]]
        wrong = replace(left[rank.cp_rank][1], o=torch.zeros(3, 8, 512))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="the splits' o has shape"):
            comm.exchange(wrong, each[rank.cp_rank], "of another schedule")
        comm.end_step()
        comm.check()
        results[rank.cp_rank] = both

    run(plan, body)
    assert host.at_rest()
    for rank in range(2):
        mine = slice(rank * 8, rank * 8 + 8)
        want = TorchOps(shape).combine(*(torch.stack([part[i][:, mine] for part in exact]) for i in (0, 1)))
        for got in results[rank]:
            check_partial(Partial(got, want.lse), want, 6e-3)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama", {"tp": 2, "cp": 2}), ("deepseek-v3-lite", {"cp": 3, "ep": 3, "exchange_space": "latent"})],
)
def test_a_rank_alone(family: str, sizes: dict[str, Any], host: Host, tmp_path: Path, seed: int) -> None:
    """Whichever it is: its peers' heads and summands are its own, as bench/loopback.py has them for the CPU."""
    plan, folder_of = with_kernels(make_plan(family, tmp_path, seed, **sizes), tmp_path)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rank, instance, hidden = draw.choice(plan.ranks[1:]), plan.instances[1], plan.model.arch.hidden_size
    shape = attention_shape(plan.model, rank, plan.tokens_per_block)
    ops, members = TorchOps(shape), len(rank.groups.ffn_tp)
    comm, echo = Loopback(rank, {}, instance, plan.kernels, folder_of(rank), CPU, 2.0), Echo(rank)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    for _ in range(3):
        rows = draw.randint(1, instance.max_batch_size)
        partial = Partial(normal(rows, shape.heads, shape.partial_dim), normal(rows, shape.heads))
        x, norm, places = normal(rows, hidden), Norm(normal(hidden), EPS), range(0, members * hidden, hidden)
        comm.begin_step()
        for _ in range(3):
            merged = comm.exchange(partial, ops, "partials")
            assert relative_error(merged, echo.exchange(partial, ops, "partials").double()) <= 1e-5
            both = [one.reduce(x.clone(), x, None, norm, ops, "sum") for one in (comm, echo)]
            assert max(map(relative_error, both[0], (wanted.double() for wanted in both[1]))) <= 1e-5
        tokens = comm.argmax(x, places[rank.ffn_tp_rank], ops, "tokens")
        assert torch.equal(tokens, x.argmax(-1) + places[rank.ffn_tp_rank])
        comm.end_step()
        comm.check()
    assert {what: (size, count) for what, size, count in comm.messages(2)} == {
        "exchange": (2 * shape.heads // len(rank.groups.cp) * (shape.partial_dim + 1) * 4, 3),
        "reduce": (2 * hidden * 4, 3),
        "argmax": (2 * 8, 1),
    }
    assert all(bool((inbox == NOTHING - (1 << 32)).all()) for inbox in comm.inboxes)


def test_a_peer_that_never_sends_is_named(host: Host, tmp_path: Path, seed: int) -> None:
    plan, folder_of = with_kernels(make_plan("llama", tmp_path, seed, cp=2), tmp_path)
    survivor, gone = plan.ranks[1].rank, plan.ranks[2].rank
    comms: dict[int, OneSidedComm] = {}

    def connect(rank: Rank) -> None:
        comms[rank.rank] = OneSidedComm(rank, {}, plan.instances[1], plan.kernels, folder_of(rank), CPU, patience=0.2)

    run(plan, connect)
    own, x = comms[survivor], torch.zeros(2, plan.model.arch.hidden_size)
    own._progress[1].fill_(41)  # steps before
    own.begin_step()
    own.check()
    own.reduce(x, None, None, None, TorchOps(attention_shape(plan.model, plan.ranks[1], 4)), "layer 7 FFN")
    own.end_step()
    with pytest.raises(
        PeerTimeout, match=f"^rank {survivor} waited 0.2 s for rank {gone} in vain: layer 7 FFN, decode"
    ):
        own.check()


def test_what_does_not_fit_is_refused(host: Host, tmp_path: Path, seed: int) -> None:
    plan, folder_of = with_kernels(make_plan("llama", tmp_path, seed, cp=2), tmp_path)
    found: dict[int, OneSidedComm] = {}
    shape = attention_shape(plan.model, plan.ranks[1], 4)
    ops, hidden, rows = TorchOps(shape), plan.model.arch.hidden_size, plan.instances[1].max_batch_size

    def connect(rank: Rank) -> None:
        found[rank.rank] = OneSidedComm(rank, {}, plan.instances[1], plan.kernels, folder_of(rank), CPU, 0.2)

    run(plan, connect)
    comm, x = found[1], torch.zeros(1, hidden)
    o, lse = torch.zeros(rows + 1, shape.heads, shape.partial_dim), torch.zeros(rows + 1, shape.heads)
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: comm.exchange(Partial(o, lse), ops, ""), f"{rows + 1} rows, expected 1 to {rows}"),
        (lambda: comm.exchange(Partial(o[:1, 1:], lse[:1]), ops, ""), r"o has shape \[1, "),
        (lambda: comm.exchange(Partial(o[:1], lse[:1, 1:]), ops, ""), r"lse has shape \[1, "),
        (lambda: comm.exchange(Partial(o[:1], lse[:1].double()), ops, ""), "lse is torch.float64"),
        (lambda: comm.exchange(Partial(o[:1].half(), lse[:1]), ops, ""), "o is torch.float16"),
        (lambda: comm.argmax(torch.zeros(rows + 1, 8), 0, ops, ""), f"{rows + 1} rows, expected 1 to {rows}"),
        (lambda: comm.argmax(x.half(), 0, ops, ""), "x is torch.float16"),
        (lambda: comm.argmax(x, 0, ops, "", torch.zeros(2).long()), r"out has shape \[2\], expected \[1\]"),
        (lambda: comm.argmax(x, 0, ops, "", torch.zeros(1)), "out is torch.float32"),
        (lambda: comm.reduce(x, x.half(), None, None, ops, ""), "residual is torch.float16"),
        (lambda: comm.reduce(x, x[:, 1:], None, None, ops, ""), "residual has shape"),
        (lambda: comm.reduce(x, None, x[0, 1:], None, ops, ""), "bias has shape"),
        (lambda: comm.reduce(torch.zeros(1, 2 * hidden)[:, ::2], None, None, None, ops, ""), "x is not contiguous"),
        (lambda: comm.reduce(torch.zeros(1, 2 * hidden), None, None, None, ops, ""), f"is of {hidden} columns"),
        (lambda: comm.reduce(x, None, None, Norm(x[0], 0.5), ops, ""), f"columns with {EPS}"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    without: tuple[Kernel, ...] = tuple(kernel for kernel in plan.kernels if kernel.template != "exchange")
    with pytest.raises(ValueError, match="the rank has no exchange kernel"):
        OneSidedComm(plan.ranks[1], {}, plan.instances[1], without, tmp_path, CPU, 0.2)


def test_the_plan_names_the_kernels(tmp_path: Path, seed: int) -> None:
    """A rank's kernels are those of its instance's choice."""
    plan = make_plan("llama", tmp_path, seed, tp=2, cp=2)
    rank, instance = plan.ranks[1], plan.instances[1]
    assert (instance.exchange, instance.reduce_rows) == ("one_sided", instance.max_batch_size)
    collective = replace(instance, exchange="collective", reduce_rows=0)
    some, none = (set(names_for((ARCH,), plan.model, rank, i, 4)) for i in (instance, collective))
    assert {name.split("_")[0] for name in some - none} == {"exchange", "reduce", "argmax"}
    assert none < some
