"""The one-sided exchange, reduction and argmax among GPUs, each a thread of this process, against the plain sums."""

from __future__ import annotations

import ctypes
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helixc.codegen.build import render_all
from helixc.codegen.problem import KernelSpec, argmax, exchange, reduce
from helixc.codegen.template_root import template_root
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.manifest import Dtype
from helixc_runtime.models.layers import rms_norm
from helixc_runtime.ops import Partial
from helixc_runtime.ops_cuda import ARGUMENTS
from helixc_runtime.ops_torch import TorchOps
from tests.gpu.kernel_cases import check_partial, gqa, mla, relative_error
from tests.simt.bugs import Bug, planted
from tests.simt.cpu_kernel import CpuKernel, Gpu, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

NOTHING = -(2**31)  # kNothing of inbox.cuh as int32
BOUNDS: dict[Dtype, float] = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
MAX_ROWS = 5
PATIENCE_S = 20.0
Launch = Callable[[int, int, int], None]  # rank, exchange within the step, rows


class Gpus:
    """N GPUs that run one kernel: each has its own copy of the library, its inbox and its count of exchanges."""

    def __init__(
        self, spec: KernelSpec, members: int, inbox_words: int, folder: Path, root: Path | None = None
    ) -> None:
        (source,) = render_all([spec], root or template_root())
        library, arguments = build(source, root, watched=CpuKernel.gpu.watched), ARGUMENTS[spec.template]
        self.members, self.threads = members, source.config.threads
        self.kernels = []
        for rank in range(members):
            copy = folder / f"{library.stem}.{rank}.so"
            shutil.copy(library, copy)
            self.kernels.append(CpuKernel(copy, spec.name, arguments, self.threads, torch.device("cpu"), early=True))
        self.inboxes = [torch.full((inbox_words,), NOTHING, dtype=torch.int32) for _ in range(members)]
        self.addresses = torch.tensor([inbox.data_ptr() for inbox in self.inboxes])
        self.progress = torch.zeros(members, 2, dtype=torch.int32)  # messages and steps
        self.status = torch.zeros(members, 4, dtype=torch.int32)
        self.limit_s = PATIENCE_S

    def launch(self, rank: int, index: int, blocks: int, pointers: list[Tensor | None], sizes: list[int]) -> None:
        """One launch on GPU `rank`; the group's arguments stand between the kernel's pointers and its sizes."""
        before = [0 if t is None else t.data_ptr() for t in pointers]
        group = [t.data_ptr() for t in (self.addresses, self.progress[rank], self.status[rank])]
        self.kernels[rank].launch(
            (blocks, 1, 1), *before, *group, int(self.limit_s * 1e9), rank, index, 100 + index, *sizes
        )

    def slow_down(self, rank: int, times: int) -> None:
        """GPU `rank` sleeps so often, before one in eight reads of its inbox."""
        for name, value in (("slow_times", times), ("slow_one_in", 8), ("slow_microseconds", 3000)):
            ctypes.c_uint.in_dll(self.kernels[rank].library, name).value = value

    def together(self, body: Callable[[int], None], ranks: range | None = None) -> None:
        """`body(rank)` on all GPUs at once."""
        threads = [threading.Thread(target=body, args=(rank,)) for rank in ranks or range(self.members)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def at_rest(self) -> bool:
        """Nothing lies unread, and no wait gave up."""
        return all(bool((inbox == NOTHING).all()) for inbox in self.inboxes) and not self.status.any()


class Exchange(Gpus):
    """The exchange of one attention shape."""

    def __init__(self, shape: AttentionShape, cp: int, folder: Path, root: Path | None = None) -> None:
        self.shape, self.dtype = shape, getattr(torch, shape.dtype)
        units = MAX_ROWS * shape.heads // cp
        words = 2 * cp * (units * shape.partial_dim * self.dtype.itemsize // 4 + -(-units // 4) * 4)
        super().__init__(exchange(shape, cp, "sm_100a"), cp, words, folder, root)

    def __call__(self, rank: int, index: int, part: Partial) -> Tensor:
        heads = self.shape.heads // self.members
        rows = len(part.o)
        out = torch.full((rows, heads, self.shape.partial_dim), torch.nan, dtype=self.dtype)
        warps = self.threads // 32
        self.launch(rank, index, -(-rows * heads // warps), [out, part.o, part.lse], [rows, MAX_ROWS])
        return out


def random_partials(shape: AttentionShape, cp: int, rows: int, generator: torch.Generator) -> list[Partial]:
    """One a rank: some parts empty with NaN in their memory, a row empty everywhere, -0 among the numbers."""
    found = []
    for _ in range(cp):
        o = torch.randn(rows, shape.heads, shape.partial_dim, generator=generator)
        o[torch.rand(o.shape, generator=generator) < 0.2] = -0.0
        lse = torch.randn(rows, shape.heads, generator=generator) * 4
        lse[torch.rand(lse.shape, generator=generator) < 0.4] = -0.0
        empty = torch.rand(rows, generator=generator) < 0.3
        empty[-1] |= rows > 1
        o[empty], lse[empty] = torch.nan, -torch.inf
        found.append(Partial(o.to(getattr(torch, shape.dtype)), lse))
    return found


def merged(shape: AttentionShape, parts: list[Partial], rank: int) -> Partial:
    """What `rank` must get: the float64 merge of its heads."""
    heads = shape.heads // len(parts)
    mine = slice(rank * heads, (rank + 1) * heads)
    o, lse = (torch.stack([part[i][:, mine].double() for part in parts]) for i in (0, 1))
    return TorchOps(shape).combine(o, lse)


def check_exchanges(gpus: Exchange, steps: int, calls: int, seed: int, slow: int = 20, rows: int = MAX_ROWS) -> None:
    """`steps` steps of `calls` exchanges each, ranks delayed at random: every result, and no word left over."""
    source, shape, cp = random.Random(seed), gpus.shape, gpus.members
    generator = torch.Generator().manual_seed(seed)
    sizes = [source.randint(1, rows) for _ in range(steps)]
    parts = [[random_partials(shape, cp, size, generator) for _ in range(calls)] for size in sizes]
    parts[-1][-1][0].o.fill_(torch.nan)  # the last part of rank 0 is empty: none of it may lie in an inbox afterwards
    parts[-1][-1][0].lse.fill_(-torch.inf)
    gpus.slow_down(seed % cp, slow)
    delays = [[source.choice((0, 0, 0, 0.003)) for _ in range(steps * calls)] for _ in range(cp)]
    results: list[list[Tensor]] = [[] for _ in range(cp)]

    def body(rank: int) -> None:
        for step in range(steps):
            for call in range(calls):
                time.sleep(delays[rank][step * calls + call])
                results[rank].append(gpus(rank, call, parts[step][call][rank]))
            gpus.progress[rank, 0] += calls

    gpus.together(body)
    assert gpus.at_rest()
    for rank in range(cp):
        for number, got in enumerate(results[rank]):
            want = merged(shape, parts[number // calls][number % calls], rank)
            lse = want.lse  # the kernel gives none: what is checked is o
            check_partial(Partial(got, lse), want, BOUNDS[shape.dtype])


@pytest.fixture
def seed(seed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Also of the order of events on the GPUs."""
    monkeypatch.setattr(CpuKernel, "gpu", Gpu(4, seed), raising=False)
    return seed


@pytest.mark.parametrize(
    ("shape", "cp"),
    [(mla(4, 32), 2), (gqa(9, 3, 64, 32, "float32"), 3), (gqa(8, 2, 128, 32, "float16"), 4), (gqa(6, 1, 72, 64), 2)],
    ids=lambda value: str(getattr(value, "head_dim", value)),
)
def test_exchanges_in_a_row(shape: AttentionShape, cp: int, tmp_path: Path, seed: int) -> None:
    check_exchanges(Exchange(shape, cp, tmp_path), steps=6, calls=3, seed=seed)


def test_many_ranks(tmp_path: Path, seed: int) -> None:
    check_exchanges(Exchange(gqa(24, 2, 64, 32), 12, tmp_path), steps=2, calls=1, seed=seed)


def test_a_peer_that_is_gone_is_named(tmp_path: Path, seed: int) -> None:
    """Two of three exchange; the third never comes. Both end soon and say which exchange waited for whom."""
    shape = gqa(9, 3, 64, 32)
    gpus = Exchange(shape, 3, tmp_path)
    gpus.limit_s = 0.2
    gpus.progress += 40
    parts = random_partials(shape, 3, 3, torch.Generator().manual_seed(seed))
    parts = [Partial(part.o.nan_to_num(), part.lse.nan_to_num(neginf=0.0)) for part in parts]
    started = time.monotonic()

    def body(rank: int) -> None:
        gpus(rank, 2, parts[rank])

    gpus.together(body, range(2))
    assert time.monotonic() - started < 5
    assert gpus.status.tolist() == [[1, 2, 40, 102], [1, 2, 40, 102], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("*word = kNothing;", ""),
        ("*v = Vector16{{kNothing, kNothing, kNothing, kNothing}};", ""),
        ("half(group.half())", "half(0)"),
        ("return word == kNothing ? 0 : word;", "return word;"),
        (
            "C::members * C::heads + unit % C::heads;",
            "C::members * C::heads + (unit + 1) % C::heads;",
        ),
        (
            "weight = expf(lse - largest_now);",
            "weight = exp2f(lse - largest_now);",
        ),
        ("if (!is_minus_infinity(part_lse)) {", "{"),
        ("group.rank, unit) + lane, sendable(u32(", "group.rank, unit) + lane, (u32("),
        ("total = total * before + weight;", "total = total + weight;"),
        ("if (!arrived(word)) word = receive(own, group, sender);", ""),
        ("if (!arrived(head.parts[round])) head.parts[round] =", "if (false) head.parts[round] ="),
    ],
)
def test_a_wrong_exchange_is_noticed(right: str, wrong: str, tmp_path: Path, seed: int) -> None:
    root = planted(tmp_path, [Bug("*", right, wrong)])
    shape = gqa(4, 1, 64, 32, "float32")  # two heads a rank: a row is one thread block, whose reads a peer can overtake
    (tmp_path / "right").mkdir()
    check_exchanges(Exchange(shape, 2, tmp_path / "right"), steps=5, calls=2, seed=seed, slow=200, rows=1 + seed % 2)
    gpus = Exchange(shape, 2, tmp_path, root)
    gpus.limit_s = 0.3
    with pytest.raises(AssertionError):
        check_exchanges(gpus, steps=5, calls=2, seed=seed, slow=200, rows=1 + seed % 2)


# --- The reduction ----------------------------------------------------------------------------------------------


def check_reductions(
    members: int,
    hidden: int,
    dtype: Dtype,
    *,
    bias: bool,
    folder: Path,
    seed: int,
    root: Path | None = None,
    slow: int = 20,
) -> None:
    eps, kind, steps, calls = 1e-5, getattr(torch, dtype), 5, 2
    words = 2 * members * MAX_ROWS * hidden * kind.itemsize // 4
    gpus = Gpus(reduce(members, hidden, eps, dtype, "sm_100a"), members, words, folder, root)
    gpus.limit_s = PATIENCE_S if root is None else 0.5
    source, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        x = torch.randn(*size, generator=generator)
        x[torch.rand(x.shape, generator=generator) < 0.1] = -0.0
        return x.to(kind)

    weight, offset = normal(hidden), normal(hidden) if bias else None
    work = []
    for _ in range(steps * calls):
        rows = source.randint(1, MAX_ROWS)
        work.append(([normal(rows, hidden) for _ in range(members)], normal(rows, hidden)))
    gpus.slow_down(seed % members, slow)
    delays = [[source.choice((0, 0, 0, 0.003)) for _ in work] for _ in range(members)]
    results: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(members)]

    def body(rank: int) -> None:
        for number, (summands, residual) in enumerate(work):
            time.sleep(delays[rank][number])
            out, normed = torch.empty_like(residual), torch.empty_like(residual)
            pointers = [out, normed, summands[rank], residual, offset, weight]
            gpus.launch(rank, number % calls, len(residual), pointers, [MAX_ROWS])
            results[rank].append((out, normed))
            gpus.progress[rank, 0] += calls * (number % calls == calls - 1)

    gpus.together(body)
    assert gpus.at_rest()
    for number, (summands, residual) in enumerate(work):
        want = residual.double() + torch.stack(summands).double().sum(0) + (0 if offset is None else offset.double())
        for rank in range(members):
            out, normed = results[rank][number]
            assert relative_error(out, want) <= BOUNDS[dtype]
            assert relative_error(normed, rms_norm(want, weight.double(), eps)) <= BOUNDS[dtype]
            assert torch.equal(out, results[0][number][0]), "the ranks disagree"


@pytest.mark.parametrize(
    ("members", "hidden", "dtype", "bias"),
    [(2, 64, "bfloat16", False), (3, 1032, "bfloat16", True), (4, 512, "float16", False), (2, 1300, "float32", True)],
)
def test_reductions_in_a_row(members: int, hidden: int, dtype: Dtype, bias: bool, tmp_path: Path, seed: int) -> None:
    check_reductions(members, hidden, dtype, bias=bias, folder=tmp_path, seed=seed)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("        forget(from);\n      }\n      add_elements", "      }\n      add_elements"),
        ("const i64 half = group.half();", "const i64 half = 0;"),
        ("/ float(C::hidden) + C::eps", "/ float(C::hidden + 8) + C::eps"),
        ("if (bias) add_elements<Element>(sum[round], vector(bias, i));", ""),
        ("if (residual) add_elements<Element>(sum[round], before[round]);", ""),
    ],
)
def test_a_wrong_reduction_is_noticed(right: str, wrong: str, tmp_path: Path, seed: int) -> None:
    root = planted(tmp_path, [Bug("*", right, wrong)])
    with pytest.raises(AssertionError):
        check_reductions(2, 64, "float32", bias=True, folder=tmp_path, seed=seed, root=root, slow=100)


# --- The largest logits -----------------------------------------------------------------------------------------


def random_logits(rows: int, columns: int, dtype: torch.dtype, first_kind: int, generator: torch.Generator) -> Tensor:
    """Rows of four kinds in turn: few values, so that equal ones abound; -0 and then 0; infinities; some are NaN."""
    x = torch.randint(-40, 41, (rows, columns), generator=generator).to(dtype) / 8
    rare = torch.rand(rows, columns, generator=generator) < 0.01
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for row in range(rows):
        kind = (first_kind + row) % 4
        if kind == 1:
            x[row] = 0.0
            x[row, 0] = -0.0
        elif kind == 2:
            x[row] = torch.where(rare[row], torch.inf, -torch.inf).to(dtype)
        elif kind == 3:
            x[row].view(bits)[rare[row]] = -1  # NaN, its sign set
    return x


def check_argmax(
    widths: list[int], dtype: Dtype, folder: Path, seed: int, root: Path | None = None, steps: int = 6, slow: int = 20
) -> None:
    """Rows of logits whose columns are dealt to GPUs by `widths`: torch's argmax of all, on every GPU."""
    members, calls = len(widths), 2
    gpus = Gpus(argmax(members, dtype, "sm_100a"), members, 2 * members * MAX_ROWS * 2, folder, root)
    gpus.limit_s = PATIENCE_S if root is None else 0.5
    source, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    work = [
        random_logits(source.randint(1, MAX_ROWS), sum(widths), getattr(torch, dtype), number, generator)
        for number in range(steps * calls)
    ]
    gpus.slow_down(seed % members, slow)
    delays = [[source.choice((0, 0, 0, 0.003)) for _ in work] for _ in range(members)]
    results: list[list[Tensor]] = [[] for _ in range(members)]

    def body(rank: int) -> None:
        for number, logits in enumerate(work):
            time.sleep(delays[rank][number])
            own = logits.split(widths, dim=1)[rank].contiguous()
            out = torch.full((len(logits),), -1)
            gpus.launch(rank, number % calls, len(logits), [out, own], [widths[rank], sum(widths[:rank]), MAX_ROWS])
            results[rank].append(out)
            gpus.progress[rank, 0] += calls * (number % calls == calls - 1)

    gpus.together(body)
    assert gpus.at_rest()
    for number, logits in enumerate(work):
        for rank in range(members):
            assert torch.equal(results[rank][number], logits.float().argmax(-1)), f"{number=} {rank=}"


@pytest.mark.parametrize(
    ("widths", "dtype"),
    [
        ([9000, 9000], "bfloat16"),
        ([8, 2000, 1027], "bfloat16"),
        ([33, 32], "float32"),
        ([64, 63], "float16"),
        ([7] * 40, "float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}x{value[0]}",
)
def test_the_largest_logit_of_all_gpus(widths: list[int], dtype: Dtype, tmp_path: Path, seed: int) -> None:
    check_argmax(widths, dtype, tmp_path, seed)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("b.key == a.key && b.index < a.index", "b.key == a.key && b.index > a.index"),
        ("mine.key == key ? u32(mine.index) : 0xffffffffu", "u32(mine.index)"),
        ("x != x ? 0xffffffffu : ordered(x + 0.0f)", "x != x ? 0xffffffffu : ordered(x)"),
        ("x != x ? 0xffffffffu : ordered(x + 0.0f)", "ordered(x + 0.0f)"),
        ("int i = vectors * width + int(threadIdx.x)", "int i = columns"),
        (".words)[e])), i * width + e}", ".words)[e])), i + e}"),
        ("found[lane < warps ? lane : 0]", "found[0]"),
        ("best.index += first;", ""),
        ("forget(from + 1);", ""),
        ("i64(group.half()) * C::members", "i64(0) * C::members"),
    ],
)
def test_a_wrong_argmax_is_noticed(right: str, wrong: str, tmp_path: Path, seed: int) -> None:
    root = planted(tmp_path, [Bug("argmax", right, wrong)])
    with pytest.raises(AssertionError):
        check_argmax([2003, 2000], "bfloat16", tmp_path, seed, root, steps=20, slow=400)
