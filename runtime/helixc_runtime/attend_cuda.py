"""Ops.attend by cubins: the portable split-KV kernels, and Hopper's for MLA and for GQA.

Each is a schedule, made on the GPU from the lengths once a step, and what every layer then launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from helixc_runtime.attention_shape import MAX_SPLITS, AttentionShape
from helixc_runtime.cubin import LoadedKernel
from helixc_runtime.manifest import Kernel
from helixc_runtime.ops import DecodeBatch, LayerCache, Partial, SplitPartial
from helixc_runtime.tensor_map import TensorMap, TensorMaps

# The launch arguments of each template, in order.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "partial": ("pointer",) * 9 + ("int32",),
    "merge": ("pointer",) * 4 + ("int32", "int32"),
    "mla_schedule": ("pointer",) * 4 + ("int32", "int32"),
    "mla_partial": ("map",) * 3 + ("pointer",) * 6 + ("int32", "pointer"),
    "mla_fp8_partial": ("map",) * 3 + ("pointer",) * 6 + ("int32", "pointer", "pointer"),
    "mla_merge": ("pointer",) * 6,
    "gqa_schedule": ("pointer",) * 3 + ("int32", "int32"),
    "gqa_partial": ("map",) * 2 + ("pointer",) * 8 + ("int32", "int32", "pointer", "pointer"),
}
# Launched before their predecessor has ended (programmatic dependent launch). Until Hopper's partials wait for it, they
# read what is older: the schedule, the page table and all but the newest tokens. So a launch that is not early must lie
# in between: see docs/architecture.md. The others wait first: only the launch itself is early.
EARLY = frozenset({"append", "mla_partial", "mla_fp8_partial", "mla_merge", "gqa_partial", "merge", "combine"})

_WAVES = 2  # thread blocks of the portable partial kernel to aim for, per multiprocessor


Chosen = Mapping[str, tuple[Kernel, LoadedKernel]]  # by template


class Attend(Protocol):
    """One way to compute Ops.attend. Arguments have been checked; there is at least one row."""

    def begin_step(self, batch: DecodeBatch) -> None:
        """Schedule a step's attention. Its batch must stay as it is until the step's last layer."""
        ...

    def attend(self, q: Tensor, cache: LayerCache, batch: DecodeBatch, out: Partial) -> Partial | SplitPartial:
        """Fill `out` with the partial of one layer, and return it, or what is left to do for it."""
        ...


def make_attend(
    shape: AttentionShape,
    kernels: Mapping[str, Kernel],
    loaded: Mapping[str, LoadedKernel],
    processors: int,
    device: torch.device,
) -> Attend:
    """The way that the kernels at hand, by template, allow, on so many multiprocessors. ValueError if none is whole."""
    chosen = {template: (kernel, loaded[kernel.name]) for template, kernel in kernels.items()}
    for template, attend in (("mla_partial", HopperMla), ("mla_fp8_partial", HopperMlaFp8)):
        if {"mla_schedule", template, "mla_merge"} <= chosen.keys():
            return attend(shape, chosen[template], chosen, processors, device)
    if {"gqa_schedule", "gqa_partial"} <= chosen.keys():
        return HopperGqa(shape, chosen, processors, device)
    if {"partial", "merge"} <= chosen.keys():
        return Portable(shape, chosen, processors, device)
    raise ValueError("the rank has no whole set of attention kernels for this GPU's architecture")


class Portable:
    """Splits of equal token count, as many as fill the GPU, then a merge."""

    def __init__(self, shape: AttentionShape, chosen: Chosen, processors: int, device: torch.device) -> None:
        self.shape, self.processors, self.device = shape, processors, device
        self.partial_kernel, self.partial = chosen["partial"]
        self.merge_kernel, self.merge = chosen["merge"]

    def begin_step(self, batch: DecodeBatch) -> None:
        """Nothing: the splits follow from the shapes."""

    def attend(self, q: Tensor, cache: LayerCache, batch: DecodeBatch, out: Partial) -> Partial:
        queries, max_pages = len(q), batch.page_table.shape[1]
        tiles = self.shape.kv_heads * -(-self.shape.group // int(self.partial_kernel.params["head_tile"]))
        token_tile = int(self.partial_kernel.params["token_tile"])
        splits = self._splits(queries * tiles, max_pages * self.shape.block, token_tile)
        size = (splits, queries, self.shape.heads)
        o = torch.empty(*size, self.shape.partial_dim, dtype=torch.float32, device=self.device)
        lse = torch.empty(*size, dtype=torch.float32, device=self.device)
        pointers = (o, lse, q, cache.k, cache.v, cache.k_scale, cache.v_scale, batch.page_table, batch.lengths)
        self.partial.launch((tiles, queries, splits), *map(address, pointers), max_pages)
        count = queries * self.shape.heads
        grid = combine_grid(self.merge_kernel, count)
        self.merge.launch(grid, *map(address, (out.o, out.lse, o, lse)), splits, count)
        return out

    def _splits(self, thread_blocks: int, max_tokens: int, token_tile: int) -> int:
        """Enough splits to fill the GPU, but none without a tile of tokens. Known without reading the lengths."""
        wanted = -(-self.processors * _WAVES // thread_blocks)
        return max(1, min(wanted, -(-max_tokens // token_tile), MAX_SPLITS))


class HopperMla:
    """templates/kernels/mla_*: workers of one or more clusters of one or two thread blocks, and one merge.

    A row here is `row_tokens` query tokens of one of the batch's rows, and their heads its queries. Its worker is a
    team of clusters, each for some of the tokens.
    """

    MERGE_BLOCKS = 264  # at most: two a multiprocessor of an H100

    def __init__(
        self,
        shape: AttentionShape,
        partial: tuple[Kernel, LoadedKernel],
        chosen: Chosen,
        processors: int,
        device: torch.device,
    ) -> None:
        self.kernel, self.partial = partial
        self.schedule, self.merge = chosen["mla_schedule"][1], chosen["mla_merge"][1]
        names = ("row_tokens", "cluster_tokens", "cluster")
        self.row_tokens, cluster_tokens, self.cluster = (int(self.kernel.params[name]) for name in names)
        self.shape, self.device = shape, device
        self.cluster_queries, self.team = shape.heads * cluster_tokens, self.row_tokens // cluster_tokens
        self.workers = max(1, processors // (self.cluster * self.team))
        self.blocks = self.workers * self.cluster * self.team
        self.split = torch.zeros(self.workers, 4, dtype=torch.int32, device=device)
        self.split_count = torch.zeros(1, dtype=torch.int32, device=device)
        size = (2 * self.workers, shape.heads * self.row_tokens)
        self.part_o = torch.empty(*size, shape.partial_dim, dtype=torch.bfloat16, device=device)
        self.part_lse = torch.empty(*size, dtype=torch.float32, device=device)
        self.segments: dict[int, Tensor] = {}  # by number of rows
        self.maps = TensorMaps()
        self.marker = torch.zeros(1, device=device)

    def begin_step(self, batch: DecodeBatch) -> None:
        rows = len(batch.lengths) // self.row_tokens
        pointers = (self._segments(rows), self.split, self.split_count, batch.lengths)
        self.schedule.launch((1, 1, 1), *map(address, pointers), rows, self.workers)
        self.marker.add_(1)  # see EARLY

    def attend(self, q: Tensor, cache: LayerCache, batch: DecodeBatch, out: Partial) -> SplitPartial:
        rows = len(batch.lengths) // self.row_tokens
        pointers = (out.o, out.lse, self.part_o, self.part_lse, batch.page_table, self._segments(rows))
        maps, more = self._maps(q, rows, cache), self._more(cache, batch)
        width = batch.page_table.shape[1]
        self.partial.launch((self.blocks, 1, 1), *maps, *map(address, pointers), width, *map(address, more))
        splits = (self.part_o, self.part_lse, self.split, self.split_count)
        strips = rows * self.shape.heads * self.row_tokens * (self.shape.partial_dim // 128)  # at most: mla_merge.cuh

        def merge() -> None:
            self.merge.launch((min(strips, self.MERGE_BLOCKS), 1, 1), *map(address, (*out, *splits)))

        return SplitPartial(out, *splits, merge)

    # 8 queries, or tokens, by 64 columns are the unit: what one swizzled matrix of the tensor cores holds.

    def _maps(self, q: Tensor, rows: int, cache: LayerCache) -> tuple[TensorMap, TensorMap, TensorMap]:
        """Of the queries, the latent columns and the rotary columns."""
        dims, strides = (64, 8, 9, cache.k.shape[0] * self.shape.block // 8), (1152, 128, 9216)
        tokens = 64 if self.shape.block == 64 and self.cluster == 1 else 32  # of a copy: copy_tokens, mla_layout.cuh
        kv_map, rotary_map = (self.maps.get(cache.k, dims, strides, (64, 8, chunks, tokens // 8)) for chunks in (2, 1))
        return self._q_map(q, rows, min(self.cluster_queries // 8, 8), 1), kv_map, rotary_map

    def _q_map(self, q: Tensor, rows: int, groups: int, chunks: int) -> TensorMap:
        """A copy is `groups` eights of queries, those beyond the row's zeros, by `chunks` of 64 columns."""
        dims = (64, 8, 9, self.cluster_queries // 8, rows * self.team)
        strides = (1152, 128, 9216, self.cluster_queries * 1152)
        return self.maps.get(q, dims, strides, (64, 8, chunks, groups, 1))

    def _more(self, cache: LayerCache, batch: DecodeBatch) -> tuple[Tensor | None, ...]:
        """The launch's last arguments."""
        return (batch.lengths,)

    def _segments(self, rows: int) -> Tensor:
        """A buffer a batch size: captured graphs keep theirs."""
        if rows not in self.segments:
            size = (rows + 2 * self.workers, 8)
            self.segments[rows] = torch.zeros(size, dtype=torch.int32, device=self.device)
        return self.segments[rows]


class HopperMlaFp8(HopperMla):
    """The same over an FP8 cache."""

    def _maps(self, q: Tensor, rows: int, cache: LayerCache) -> tuple[TensorMap, TensorMap, TensorMap]:
        groups = cache.k.shape[0] * self.shape.block // 8
        # The maps' elements have 2 bytes.
        latent = self.maps.get(cache.k, (64, 8, 4, groups), (576, 128, 4608), (64, 8, 4, 4))
        rotary = self.maps.get(cache.k[..., 512:], (32, 8, 1, groups), (576, 64, 4608), (32, 8, 1, 4))
        return self._q_map(q, rows, int(self.kernel.params["width"]) // 8, 9), latent, rotary

    def _more(self, cache: LayerCache, batch: DecodeBatch) -> tuple[Tensor | None, ...]:
        return batch.lengths, cache.k_scale


class HopperGqa:
    """templates/kernels/gqa_*: one thread block a multiprocessor, merging within the launch.

    Neighbouring blocks, a worker, read the same tokens for one share of their queries each.
    """

    SCHEDULE_WORDS = 64

    def __init__(self, shape: AttentionShape, chosen: Chosen, processors: int, device: torch.device) -> None:
        kernel, self.partial = chosen["gqa_partial"]
        self.schedule = chosen["gqa_schedule"][1]
        self.shape, self.tile = shape, int(kernel.params["token_tile"])
        share_heads, share_tokens, shares = (int(kernel.params[f"share{part}"]) for part in ("_heads", "_tokens", "s"))
        self.workers = max(1, processors // shares)
        self.blocks = self.workers * shares
        self.plan = torch.zeros(self.workers, self.SCHEDULE_WORDS, dtype=torch.int32, device=device)
        # Parts to merge; the kernel leaves them as it found them, full of -0.0.
        size = (2 * self.blocks, share_heads * share_tokens)
        self.part_o = torch.full((*size, shape.head_dim), -0.0, device=device)
        self.part_lse = torch.full((*size, shape.head_dim // 4), -0.0, device=device)
        self.maps = TensorMaps()
        self.marker = torch.zeros(1, device=device)

    def begin_step(self, batch: DecodeBatch) -> None:
        rows, max_pages = batch.page_table.shape
        pointers = (self.plan, batch.lengths, batch.page_table)
        self.schedule.launch((self.workers, 1, 1), *map(address, pointers), rows, max_pages)
        self.marker.add_(1)  # see EARLY

    def attend(self, q: Tensor, cache: LayerCache, batch: DecodeBatch, out: Partial) -> Partial:
        rows, max_pages = batch.page_table.shape
        assert cache.v is not None
        maps = (self._map(cache.k), self._map(cache.v))
        pointers = (out.o, out.lse, self.part_o, self.part_lse, q, batch.page_table, batch.lengths, self.plan)
        scales = map(address, (cache.k_scale, cache.v_scale))
        self.partial.launch((self.blocks, 1, 1), *maps, *map(address, pointers), rows, max_pages, *scales)
        return out

    def _map(self, pages: Tensor) -> TensorMap:
        """A token's elements as lines of 128 bytes, one or two, or as half of one; the map's elements have 2 bytes."""
        count, heads, block, dim = pages.shape
        size = dim * pages.element_size()
        tokens, width = (1, size) if size >= 128 else (128 // size, 128)  # of a line; bytes of one row of lines
        dims, strides = (64, block // tokens, width // 128, count * heads), (width, 128, block * size)
        return self.maps.get(pages, dims, strides, (64, min(block, self.tile) // tokens, width // 128, 1))


def combine_grid(kernel: Kernel, rows: int) -> tuple[int, int, int]:
    """The thread blocks of templates/include/helix/combine.cuh for so many `rows` of each part."""
    params = {name: int(kernel.params[name]) for name in ("partial_dim", "columns", "threads")}
    return -(-rows * (params["partial_dim"] // params["columns"]) // params["threads"]), 1, 1


def address(tensor: Tensor | None) -> int:
    """The device address of a tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
