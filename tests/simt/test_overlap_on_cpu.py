"""Kernels that start before the kernel before them has ended: what they read until they wait for it must be older."""

from __future__ import annotations

import random
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helixc.codegen.problem import argmax, reduce
from helixc_runtime.attend_cuda import HopperGqa, HopperMla
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ops_cuda import CudaOps
from helixc_runtime.ops_torch import TorchOps
from tests.gpu.exchange_cases import random_part
from tests.gpu.ffn_cases import V3_LITE, check_rows, ffn, want_mixture
from tests.gpu.ffn_cases import random_case as random_mixture
from tests.gpu.kernel_cases import Case, check_partial, gqa, mla, random_case, to_double
from tests.simt.bugs import Bug, planted
from tests.simt.cpu_kernel import ASYNCHRONY, CpuKernel, Gpu, KernelFault, Overlap, cpu_ffn, cpu_ops
from tests.simt.test_exchange_on_cpu import Exchange, Gpus, random_partials
from tests.simt.test_machine import kernel
from tests.simt.test_merge_exchange_on_cpu import MergeExchange

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPU = torch.device("cpu")
BOUND = 5e-3  # relative Frobenius error of o in bfloat16
FP8 = "float8_e4m3fn"
WAIT = "wait_for_previous_kernels();"


def watched(seed: int, processors: int = 3) -> Gpu:
    return Gpu(processors, seed, ASYNCHRONY[seed % 3], watched=True)


# ---- The model itself


STORE, WAIT_HERE, LET = "to[thread] = 1.0f;", f"helix::{WAIT}", "helix::let_next_kernel_start();"
LOAD = "volatile float x = from[thread]; "
COPY = (
    "if (thread == 0) { helix::barrier_init(base, 1); helix::barrier_expect(base, 512); "
    "helix::copy_bulk(base + 1024, from, 512, base, helix::kEvictFirst); } "
    "__syncthreads(); helix::barrier_wait(base, 0);"
)


@pytest.mark.parametrize(
    ("between", "reader", "fault"),
    [
        (WAIT_HERE + LET, LOAD + WAIT_HERE, None),
        (LET + WAIT_HERE, LOAD + WAIT_HERE, "a read of .* the kernel 2 launches before"),
        (LET + WAIT_HERE, WAIT_HERE + LOAD, None),
        (WAIT_HERE, LOAD + WAIT_HERE, None),  # its end lets the next one start
        (LET + WAIT_HERE, COPY + WAIT_HERE, "a read of"),
        (LET + WAIT_HERE, WAIT_HERE + COPY, None),
        (LET + WAIT_HERE, "if (thread) " + WAIT_HERE + LOAD, "a read of .*thread 0"),
        # What no block of a kernel waits for, the next one cannot wait for.
        (LET, WAIT_HERE + LOAD, "waits for nothing"),
        (WAIT_HERE + LET, "from[thread] = 2.0f; " + WAIT_HERE, "a store to"),
        (WAIT_HERE + LET, "helix::prefetch_line(from); " + WAIT_HERE, None),
    ],
)
def test_what_may_be_read_early(between: str, reader: str, fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three kernels: one stores, another is in between, the last one reads."""
    texts = (WAIT_HERE + LET + STORE, between, reader)
    kernels = [kernel(text, "float* from, float* to", monkeypatch, early=True) for text in texts]
    stored, other = torch.zeros(128), torch.zeros(128)

    def launch_all() -> None:
        with Overlap():
            for one, pointers in zip(kernels, ((other, stored), (other, other), (stored, other)), strict=True):
                one.launch((1, 1, 1), *(tensor.data_ptr() for tensor in pointers))

    if fault is None:
        launch_all()
        return
    with pytest.raises(KernelFault, match=fault):
        launch_all()


def test_torchs_operations_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not launched early, so that what came before has ended."""
    reader = kernel(LOAD + WAIT_HERE, "float* from", monkeypatch, early=True)
    x, other = torch.zeros(128), torch.zeros(128)
    with Overlap():
        x.add_(1)
        other.view(2, 64).add_(1)
        reader.launch((1, 1, 1), x.data_ptr())
        made = x + other
        with pytest.raises(KernelFault, match=r"a read of .* the kernel 1 launches before"):
            reader.launch((1, 1, 1), made.data_ptr())


# ---- Attention: schedule, append, partial, merge


SHAPES = {
    "mla 4 tokens": mla(24, 32, query_tokens=4),  # two rows of the schedule for one
    "mla fp8": mla(16, 64, kv_dtype=FP8),
    "gqa": gqa(8, 1, 64, 16),
    "gqa fp8 4 tokens": gqa(4, 2, 64, 32, kv_dtype=FP8, query_tokens=4),
}


def attend_ops(
    shape: AttentionShape, folder: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu, root: Path | None = None
) -> CudaOps:
    """CudaOps with Hopper's kernels."""
    ops = cpu_ops(shape, 1, folder, monkeypatch, gpu, root, "sm_90a", idle=("combine",))
    assert isinstance(ops._attends[0], HopperMla | HopperGqa)
    return ops


def edge_case(shape: AttentionShape, seed: int) -> Case:
    """Rows whose new tokens, all their own, lie around the end of a tile; rows without any; and a long row."""
    draw = random.Random(seed)
    lengths = []
    for beyond in range(shape.query_tokens):
        lengths += [128 * draw.randint(1, 2) + beyond, draw.choice([0, 1, 64]), draw.randint(2, 200)]
    return random_case(shape, [*lengths, 128 * 3 + shape.query_tokens - 1], CPU, seed)


def check_step(ops: CudaOps, case: Case) -> None:
    with Overlap():
        ops.begin_step(case.batch)
        q = ops.append(case.new, case.cache, case.batch)
        got = ops.attend(q, case.cache, case.batch)
    want = TorchOps(case.shape).attend(q.double(), to_double(case.cache), case.batch)
    check_partial(got, want, BOUND)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_reads_the_new_tokens_late(
    shape: AttentionShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    gpu = watched(seed, random.Random(seed).choice([2, 5, 40]))
    check_step(attend_ops(shape, tmp_path, monkeypatch, gpu), edge_case(shape, seed))


MLA_BUGS = [
    Bug("mla_fetch", "C::row_tokens * C::shares) wait", "C::row_tokens * C::shares + 1) wait"),
    Bug("mla_fetch", "C::row_tokens * C::shares) wait", "C::row_tokens) wait"),
    Bug("mla_fetch", f"    {WAIT}\n    return", "    return"),
    Bug("append", WAIT, ""),
]
FP8_BUGS = [
    Bug("mla_fp8_fetch", "C::row_tokens * C::shares) wait", "C::row_tokens * C::shares + 1) wait"),
    Bug("mla_fp8_fetch", f"q_tile) {{\n        {WAIT}", "q_tile) {"),
    Bug("mla_fp8_softmax", WAIT, ""),
]
GQA_BUGS = [
    Bug("gqa_partial", "tile + 2 >= at.tiles", "tile + 1 >= at.tiles"),
    Bug("gqa_partial", f"if constexpr (C::overlap != Overlap::nothing) {WAIT}", ""),
]


@pytest.mark.parametrize(
    ("name", "bug"),
    [("mla 4 tokens", bug) for bug in MLA_BUGS]
    + [("mla fp8", bug) for bug in FP8_BUGS]
    + [("gqa fp8 4 tokens", bug) for bug in GQA_BUGS],
    ids=str,
)
def test_attention_that_reads_early_is_noticed(
    name: str, bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    ops = attend_ops(SHAPES[name], tmp_path, monkeypatch, watched(seed, 40), planted(tmp_path, [bug]))
    with pytest.raises(KernelFault, match=r"before wait_for_previous_kernels|waits for nothing"):
        check_step(ops, edge_case(SHAPES[name], seed))


def test_a_kernel_lies_between_the_schedule_and_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """One of torch's, where the model has none."""
    shape = SHAPES["gqa"]
    ops, case = attend_ops(shape, tmp_path, monkeypatch, watched(seed)), edge_case(shape, seed)
    with Overlap():
        ops.attend(case.q, case.cache, case.batch)
        monkeypatch.setattr(ops._attends[0], "marker", types.SimpleNamespace(add_=lambda one: None))
        ops.begin_step(case.batch)
        with pytest.raises(KernelFault, match=r"a read of .* the kernel 1 launches before"):
            ops.attend(case.q, case.cache, case.batch)


# ---- Projections and experts


def check_layer(root: Path | None, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A projection, a mixture of experts of its result, and a projection of that."""
    generator = torch.Generator().manual_seed(seed)
    case = random_mixture(ffn(V3_LITE, 64, 16, 8), 2, generator)
    kernels = cpu_ffn(case.shape, 8, folder, monkeypatch, watched(seed), root)
    one = torch.eye(64).bfloat16()
    with Overlap():
        x = kernels.linear(case.x, one)
        got = kernels.linear(kernels.mixture(x, case.weights), one)
    assert torch.equal(x, case.x)
    check_rows(got, want_mixture(case))


def test_a_layer_reads_activations_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    check_layer(None, tmp_path, monkeypatch, seed)


LET_NEXT = "let_next_kernel_start();\n  "


@pytest.mark.parametrize(
    ("header", "right", "wrong"),
    [
        ("router", f"{WAIT}\n  v.load(x + token * C::hidden);", f"v.load(x + token * C::hidden); {WAIT}"),
        ("ffn", f"{WAIT}\n  {LET_NEXT}skinny.run(sums);", f"skinny.run(sums); {WAIT}"),
        # The logits, which the next kernel reads early, may not be there yet.
        ("ffn", f"{WAIT}\n  {LET_NEXT}if constexpr", f"{LET_NEXT}{WAIT} if constexpr"),
    ],
    ids=["router", "down", "gate_up lets down start"],
)
def test_a_layer_that_reads_early_is_noticed(
    header: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    with pytest.raises(KernelFault, match="before wait_for_previous_kernels"):
        check_layer(planted(tmp_path, [Bug(header, right, wrong)]), tmp_path, monkeypatch, seed)


# ---- One-sided messages


Sender = Callable[[int], object]  # one launch on a GPU


def two_gpus(name: str, folder: Path, seed: int, root: Path | None) -> tuple[Gpus, Sender, set[int]]:
    """Two GPUs, what sends, and which pointers of a launch may be read early: weights and the schedule."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    x, words = torch.randn(2, 64, generator=generator), 1 << 10
    if name == "exchange":
        shape = mla(16, 32)
        exchange, partials = Exchange(shape, 2, folder, root), random_partials(shape, 2, 2, generator)
        return exchange, lambda rank: exchange(rank, 0, partials[rank]), set()
    if name == "merge_exchange":
        merging = MergeExchange(mla(16, 32), 2, folder, [3, 3], root)
        parts = [random_part(merging.shape, 1, [2, 0, 5], draw) for _ in range(2)]
        return merging, lambda rank: merging(rank, 0, parts[rank]), {5, 6}
    if name == "reduce":
        gpus, outs = Gpus(reduce(2, 64, 1e-5, "float32", "sm_100a"), 2, words, folder, root), torch.zeros(2, 2, 2, 64)
        return gpus, lambda rank: gpus.launch(rank, 0, 2, [*outs[rank], x, x, None, torch.ones(64)], [2]), {5}
    gpus, indices = Gpus(argmax(2, "float32", "sm_100a"), 2, words, folder, root), torch.zeros(2, 2, dtype=torch.int64)
    return gpus, lambda rank: gpus.launch(rank, 0, 2, [indices[rank], x], [64, 64 * rank, 2]), set()


def faults(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, root: Path | None = None
) -> list[KernelFault]:
    """Of a launch on each GPU, right after a kernel that has stored what the launch is given."""
    monkeypatch.setattr(CpuKernel, "gpu", watched(seed), raising=False)
    gpus, send, older = two_gpus(name, folder, seed, root)
    gpus.limit_s = 20.0 if root is None else 0.1
    launch, found = gpus.launch, list[KernelFault]()

    def launch_late(rank: int, index: int, blocks: int, pointers: list[Tensor | None], sizes: list[int]) -> None:
        with Overlap() as overlap:
            late = [pointer for i, pointer in enumerate(pointers) if i not in older]
            overlap.kernel(late, gpus.progress, gpus.inboxes[rank])
            try:
                launch(rank, index, blocks, pointers, sizes)
            except KernelFault as fault:
                found.append(fault)

    monkeypatch.setattr(gpus, "launch", launch_late)
    gpus.together(send)
    return found


@pytest.mark.parametrize("name", ["exchange", "merge_exchange", "reduce", "argmax"])
def test_messages_are_made_late(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    assert not faults(name, tmp_path, monkeypatch, seed)


@pytest.mark.parametrize("what", ["const ExchangeInbox", "if (unit >="], ids=["merging blocks", "other blocks"])
def test_a_message_made_early_is_noticed(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    root = planted(tmp_path, [Bug("merge_exchange", f"{WAIT}\n  {LET_NEXT}{what}", what)])
    assert faults("merge_exchange", tmp_path, monkeypatch, seed, root)
