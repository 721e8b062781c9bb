"""A prompt's KV into the pages of a peer: by torch into a mapped file on the CPU, by one kernel a peer on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from helixc_runtime.arena import map_arena, map_gpu_arena
from helixc_runtime.cubin import check_arch
from helixc_runtime.kv import PoolLayout, write_pages
from helixc_runtime.manifest import Kernel, Plan, Rank, Transfer, owner
from helixc_runtime.ops import LayerCache
from helixc_runtime.quantize import pack

HandleOf = Callable[[int], str]  # generation rank -> the handle of its arena, which it has made known
_POLL_S = 20e-6


class PageWriter(Protocol):
    """Writes the KV of one context rank. One thread writes and waits, after another has called `follow`."""

    def follow(self) -> None:
        """What the calling thread has enqueued until now comes before what is written from now on."""
        ...

    def write(self, t: Transfer, target: Rank, cached: Sequence[Tensor], pages: Tensor, tokens: int) -> None:
        """Start to write what `t` says of `cached`, the KV of this rank's layers (Attention.prefill), to `target`.

        pages [at least as many as the tokens need] int32 on the CPU: where the target's first `tokens` local tokens of
        the prompt go. `cached` must stay as it is until `wait` returns. Raises PeerMemoryError.
        """
        ...

    def wait(self, patience: float) -> None:
        """Until all lies in the pages. Raises TimeoutError after `patience` seconds, and what the device reports."""
        ...


class TorchPageWriter:
    """On the CPU."""

    def __init__(self, plan: Plan, rank: Rank, handle_of: HandleOf) -> None:
        self._plan, self._rank, self._handle_of = plan, rank, handle_of
        self._mapped: dict[int, list[LayerCache]] = {}

    def follow(self) -> None: ...

    def write(self, t: Transfer, target: Rank, cached: Sequence[Tensor], pages: Tensor, tokens: int) -> None:
        heads = slice(t.kv_heads[0] - target.kv_heads[0], t.kv_heads[1] - target.kv_heads[0])
        used = pages[: -(-tokens // self._plan.tokens_per_block)].long()
        for layer, kv in zip(range(*t.layers), owned(self._plan, self._rank, t, cached, target), strict=True):
            write_pages(self._layers(target)[layer - target.layers[0]], used, heads, kv)

    def wait(self, patience: float) -> None: ...

    def _layers(self, target: Rank) -> list[LayerCache]:
        if target.rank not in self._mapped:
            layout = PoolLayout(self._plan.model, target, self._plan.tokens_per_block)
            memory = map_arena(self._handle_of(target.rank), layout.size)
            self._mapped[target.rank] = layout.views(memory)
        return self._mapped[target.rank]


class CudaPageWriter:
    """On a GPU, on a stream of its own beside the next prompt's prefill."""

    def __init__(self, kernel: PageKernel, device: torch.device, handle_of: HandleOf) -> None:
        self._kernel, self._device, self._handle_of = kernel, device, handle_of
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._mapped: dict[int, int] = {}
        self._used: list[Tensor] = []  # by what is under way

    def follow(self) -> None:
        self._stream.wait_event(torch.cuda.current_stream(self._device).record_event())

    def write(self, t: Transfer, target: Rank, cached: Sequence[Tensor], pages: Tensor, tokens: int) -> None:
        if target.rank not in self._mapped:
            self._mapped[target.rank] = map_gpu_arena(self._handle_of(target.rank), self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._used += self._kernel.launch(t, target, self._mapped[target.rank], cached, pages, tokens)

    def wait(self, patience: float) -> None:
        written, until = self._stream.record_event(), time.monotonic() + patience
        while not written.query():
            if time.monotonic() > until:
                raise TimeoutError(f"the GPU has not written it within {patience:g} s")
            time.sleep(_POLL_S)
        self._used.clear()


class PageKernel:
    """The handoff kernel of context rank `rank`: gathers, converts or quantises, scatters; one launch a target."""

    def __init__(self, plan: Plan, rank: Rank, kernels: Sequence[Kernel], folder: Path, device: torch.device) -> None:
        """`kernels`: the rank's, of the artifact in `folder`. Raises CubinError, or ValueError if there is none."""
        from helixc_runtime.ops_cuda import load_kernel  # needs cuda-bindings

        arch = check_arch([kernel.arch for kernel in kernels], device)
        found = [kernel for kernel in kernels if (kernel.template, kernel.arch) == ("handoff", arch)]
        if not found:
            raise ValueError(f"the rank has no handoff kernel for {arch}")
        self._plan, self._rank, self._device, self._params = plan, rank, device, found[0].params
        self._loaded = load_kernel(found[0], folder, device)

    def launch(
        self, t: Transfer, target: Rank, arena: int, cached: Sequence[Tensor], pages: Tensor, tokens: int
    ) -> list[Tensor]:
        """Enqueue PageWriter.write into the arena at address `arena`; what has to live until it is done."""
        kept = [_loadable(self._sent(t, kv)) for kv in cached[_local(t, self._rank)]]  # [K or V, heads, L, D]
        sources = [kv[i].data_ptr() for kv in kept for i in range(len(kv))]
        layout = PoolLayout(self._plan.model, target, self._plan.tokens_per_block)
        layers = layout.layers[_local(t, target)]
        pools, scales = (
            [arena + pool.offset for layer in layers for pool in layer[kind] if pool]
            for kind in (slice(0, 2), slice(2, 4))
        )
        tables = [self._on_device(numbers, torch.int64) for numbers in (sources, pools, scales)]
        listed = self._on_device(pages.tolist(), torch.int32)
        _, heads, _, _ = kept[0].shape
        vectors = int(self._params["threads"]) // int(self._params["lanes"])
        first, held = t.kv_heads[0] - target.kv_heads[0], target.kv_heads[1] - target.kv_heads[0]
        places = (tokens, heads, first, held, len(target.groups.cp), t.cp_rank)
        grid = (-(-tokens * heads // vectors), len(sources), 1)
        addresses = (tensor.data_ptr() for tensor in (*tables, listed))
        self._loaded.launch(grid, *addresses, *places, kept[0].stride(1), kept[0].stride(2))
        return [*kept, *tables, listed]

    def _sent(self, t: Transfer, kv: Tensor) -> Tensor:
        """Of a layer's KV the heads of `t`: [K or V, heads, L, D], MLA [1, 1, L, D]."""
        if self._plan.model.arch.mla:
            return kv.unsqueeze(0).unsqueeze(0)
        return kv[:, slice(t.kv_heads[0] - self._rank.kv_heads[0], t.kv_heads[1] - self._rank.kv_heads[0])]

    def _on_device(self, numbers: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(numbers, dtype=dtype).to(self._device)


def owned(plan: Plan, rank: Rank, t: Transfer, cached: Sequence[Tensor], target: Rank) -> list[Tensor]:
    """What `t` says of `cached`, a tensor a layer, as it is cached: of FP8, elements and scale of each vector.

    MLA [n, width], GQA [2, heads, n, width] for the n positions that the target owns.
    """
    mla, cp = plan.model.arch.mla, len(target.groups.cp)
    positions = torch.arange(cached[0].shape[-2], device=cached[0].device)
    own = positions[owner(positions, plan.tokens_per_block, cp) == t.cp_rank]
    heads = slice(t.kv_heads[0] - rank.kv_heads[0], t.kv_heads[1] - rank.kv_heads[0])
    parts = [kv[own] if mla else kv[:, heads, own] for kv in cached[_local(t, rank)]]
    if plan.model.kv_dtype == "float8_e4m3fn":
        return [pack(kv) for kv in parts]
    return [kv.to(getattr(torch, plan.model.kv_dtype)) for kv in parts]


def _local(t: Transfer, rank: Rank) -> slice:
    """The layers of `t` among those of `rank`."""
    return slice(t.layers[0] - rank.layers[0], t.layers[1] - rank.layers[0])


def _loadable(kv: Tensor) -> Tensor:
    """`kv`, or a copy of it, whose vectors the kernel can load."""
    whole = all(stride * kv.element_size() % 16 == 0 for stride in kv.stride()[:-1]) and kv.stride(-1) == 1
    return kv if whole and kv.data_ptr() % 16 == 0 else kv.clone(memory_format=torch.contiguous_format)
