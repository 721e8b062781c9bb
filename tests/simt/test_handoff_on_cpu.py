"""The handoff kernel's own source, launched by PageKernel, without a GPU: every target's pages, bit by bit."""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helixc.codegen.build import render_all
from helixc.codegen.problem import handoff
from helixc_runtime import ops_cuda, page_writer
from helixc_runtime.arena import Arena
from helixc_runtime.manifest import Plan, Rank
from helixc_runtime.page_writer import CudaPageWriter, PageKernel
from tests.handoff_cases import CPU, LAYOUTS, check_cache, check_launches, hand_over, random_case
from tests.simt.bugs import Bug, planted
from tests.simt.cpu_kernel import CpuKernel, Gpu, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
ARCH = "sm_90a"


def with_kernel(plan: Plan, folder: Path, monkeypatch: pytest.MonkeyPatch, root: Path | None = None) -> Plan:
    """The plan, its handoff kernel built for the CPU from the templates at `root` into `folder`."""
    monkeypatch.setattr(page_writer, "check_arch", lambda arches, device: ARCH)
    monkeypatch.setattr(ops_cuda, "LoadedKernel", CpuKernel)
    monkeypatch.setattr(CpuKernel, "gpu", Gpu(3), raising=False)
    (source,) = render_all([handoff(plan.model, plan.tokens_per_block, ARCH)], *([root] if root else []))
    library = build(source, root)
    (folder / library.name).symlink_to(library)
    return replace(plan, kernels=(replace(source.config.planned(), cubin=library.name),))


def check_pages(
    layout: Any, kv_dtype: Any, dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, root: Path | None
) -> None:
    """Every sender's launches into every target's arena."""
    case = random_case(layout, kv_dtype, seed, dtype=dtype, lengths=(33, 70), blocks=(4, 16))
    plan = with_kernel(case.plan, folder, monkeypatch, root)
    check_launches(case, plan, folder)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["mla", "gqa pp", "gqa tp", "gqa copies"])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("bfloat16", "auto"), ("bfloat16", "fp8"), ("float32", "auto"), ("float32", "fp8"), ("bfloat16", "float16")],
)
def test_pages(
    layout: Any, dtype: str, kv_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    check_pages(layout, kv_dtype, dtype, tmp_path, monkeypatch, seed, None)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(i64(page) * a.cp + a.cp_rank)", "(i64(page) * a.cp + (a.cp_rank + 1) % a.cp)"),  # the next owner's block
        ("(i64(page) * a.cp + a.cp_rank)", "(i64(page) + a.cp_rank)"),
        ("a.pools[blockIdx.y]", "a.pools[(blockIdx.y + 1) % gridDim.y]"),  # the next layer's pages
        ("a.scales[blockIdx.y]", "a.scales[0]"),
        ("a.pages[page]) * a.pool_heads", "page) * a.pool_heads"),
        ("a.pages[page]) * a.pool_heads", "a.pages[page]) * a.heads"),
        ("a.first_head + head", "head"),
        ("C::block + offset : 0", "C::block : 0"),
        ("head * a.head_stride", "head * a.token_stride"),
        ("warp_max_bits<C::lanes>(largest)", "largest"),
        ("active && lane == 0", "active && lane == 0 && head == 0"),
        ("const bool active = head < a.heads", "const bool active = head < a.heads - 1"),
    ],
)
def test_a_wrong_kernel_is_noticed(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    root = planted(tmp_path, [Bug("handoff", right, wrong)])
    with pytest.raises(AssertionError):
        check_pages(LAYOUTS[2], "fp8", "bfloat16", tmp_path, monkeypatch, seed, root)


def test_kv_that_cannot_be_loaded_is_copied() -> None:
    """Vectors that do not start at a multiple of 16 bytes, and those whose columns lie apart."""
    whole = torch.randn(2, 3, 5, 16, dtype=torch.bfloat16)
    assert page_writer._loadable(whole) is whole
    for kv in (whole[..., 1:9], whole[..., ::2], whole.flatten()[1:-7].view(59, 8).view(1, 1, 59, 8)):
        copy = page_writer._loadable(kv)
        assert copy.is_contiguous() and copy.data_ptr() % 16 == 0 and torch.equal(copy, kv)


# --- Its stream, with a stand-in for torch's --------------------------------------------------------------------


class Event:
    def __init__(self, busy: int) -> None:
        self.busy = busy

    def query(self) -> bool:
        self.busy -= 1
        return self.busy < 0


class Stream:
    """Is done after `busy` questions."""

    busy = 3

    def __init__(self, device: object) -> None:
        self.followed: list[object] = []

    def wait_event(self, event: object) -> None:
        self.followed.append(event)

    def record_event(self) -> Event:
        return Event(self.busy)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> type[Stream]:
    class Own(Stream): ...

    monkeypatch.setattr(torch.cuda, "Stream", Own)
    monkeypatch.setattr(torch.cuda, "current_stream", Own)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    return Own


def make_cuda_writer(
    folder: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Plan, Rank, Callable[[int], str]], CudaPageWriter]:
    """Handles name a rank of this process by its number; `mapped` tells who was mapped."""
    turn = threading.Lock()  # the CPU's kernels run one at a time
    launch = CpuKernel.launch

    def alone(self: CpuKernel, *values: Any) -> None:
        with turn:
            launch(self, *values)

    def map_by_address(handle: str, device: torch.device) -> int:
        mapped.append(int(handle))
        return int(handle)

    monkeypatch.setattr(CpuKernel, "launch", alone)
    monkeypatch.setattr(page_writer, "map_gpu_arena", map_by_address)
    return lambda plan, rank, handle_of: CudaPageWriter(
        PageKernel(plan, rank, plan.kernels, folder, CPU), CPU, handle_of
    )


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_all_ranks_hand_over(
    kv_dtype: str, streams: type[Stream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The whole protocol, with the kernel. Each target is mapped once by each of its senders."""
    case = random_case(LAYOUTS[2], kv_dtype, seed, lengths=(33, 70))
    case = replace(case, plan=with_kernel(case.plan, tmp_path, monkeypatch))
    mapped: list[int] = []
    monkeypatch.setattr(Arena, "handle", lambda arena: str(arena.memory.data_ptr()))
    caches, moved, errors = hand_over(case, make_cuda_writer(tmp_path, mapped, monkeypatch))
    assert not errors and list(moved) == ["peer"]
    assert sum(check_cache(case, case.plan.ranks[rank], *caches[rank]) for rank in caches) == moved["peer"]
    assert len(mapped) <= len(case.plan.transfers) and set(mapped) <= {
        cache.arena.memory.data_ptr() for cache, _ in caches.values()
    }


def test_a_gpu_that_does_not_end_is_given_up(
    streams: type[Stream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    case = random_case(LAYOUTS[0], "auto", seed)
    plan = with_kernel(case.plan, tmp_path, monkeypatch)
    writer = make_cuda_writer(tmp_path, [], monkeypatch)(plan, plan.ranks[0], str)
    streams.busy = 1 << 60
    with pytest.raises(TimeoutError, match=r"the GPU has not written it within 0\.1 s"):
        writer.wait(0.1)
    writer.follow()
    assert len(writer._stream.followed) == 1  # type: ignore[attr-defined]


def test_a_rank_without_the_kernel_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = random_case(LAYOUTS[0], "auto", random.randrange(1000)).plan
    monkeypatch.setattr(page_writer, "check_arch", lambda arches, device: ARCH)
    with pytest.raises(ValueError, match="the rank has no handoff kernel for sm_90a"):
        PageKernel(plan, plan.ranks[0], plan.kernels, tmp_path, CPU)
