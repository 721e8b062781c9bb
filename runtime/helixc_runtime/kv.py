"""The paged KV cache of one generation rank: this rank's shard of every request, block-cyclic by global position.

A page holds one block. Page k of a request on cp rank r is global block k * cp + r, so the page table of a request is
simply its pages in order, and the slot formulas of manifest.py say where a position lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from helixc_runtime.arena import Arena
from helixc_runtime.manifest import Model, Rank, local_length, local_slot, owner, scale_bytes
from helixc_runtime.models.rotary import Rotary
from helixc_runtime.ops import DecodeBatch, LayerCache
from helixc_runtime.quantize import unpack

_ALIGNMENT = 256  # of a pool, as torch aligns an allocation


@dataclass(slots=True)
class Row:
    """A request being decoded. The last of all tokens is not cached yet: it is the next step's input.

    Steps are launched before the tokens of the one before are read: `steps` counts what was launched, `tokens` holds
    what was read.
    """

    index: int
    slot: int  # its place in the batch
    prompt_length: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)  # generated
    steps: int = 0
    ended: bool = False  # the last of `tokens` is the last of the request

    @property
    def position(self) -> int:
        """Global position of the next step's input: L, L + 1, L + 2, ..."""
        return self.prompt_length + self.steps

    @property
    def cached(self) -> int:
        """Tokens whose K and V are the request's: all but the last one generated."""
        return self.prompt_length + len(self.tokens) - 1


def pages_needed(total: int, block: int, cp: int) -> int:
    """Pages that the fullest rank (cp rank 0) needs for `total` tokens; every rank reserves as many."""
    return -(-local_length(total, block, cp, 0) // block)


def local_lengths(totals: Tensor, block: int, cp: int, rank: int) -> Tensor:
    """manifest.local_length of each of `totals`."""
    rest = totals % (block * cp) - rank * block
    return totals // (block * cp) * block + rest.clamp(0, block)


class Pool(NamedTuple):
    """One tensor of a LayerCache: where it lies in the arena, in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class PoolLayout:
    """Where generation rank `rank` keeps what, in one arena of `size` bytes: the same on both ends of a handoff.

    `layers`: of each of its layers k, v, k_scale and v_scale, as LayerCache has them.
    """

    def __init__(self, model: Model, rank: Rank, block: int) -> None:
        self.pages, self.size = max(1, rank.memory.kv_capacity_tokens // block), 0
        dim, scale, mla = model.arch.head_dim, scale_bytes(model.kv_dtype), model.arch.mla is not None
        tokens = (self.pages, block) if mla else (self.pages, rank.kv_heads[1] - rank.kv_heads[0], block)

        def pool(columns: int, dtype: torch.dtype, there: bool) -> Pool | None:
            if not there:
                return None
            made = Pool(self.size, (*tokens, columns), dtype)
            self.size += -(-math.prod(made.shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
            return made

        def layer() -> tuple[Pool | None, ...]:
            elements = [pool(dim, getattr(torch, model.kv_dtype), there) for there in (True, not mla)]
            return (*elements, *(pool(scale, torch.uint8, bool(scale) and there) for there in (True, not mla)))

        self.layers = [layer() for _ in range(*rank.layers)]

    def views(self, memory: Tensor) -> list[LayerCache]:
        """The pools in an arena's `memory` [size] uint8."""

        def view(pool: Pool | None) -> Tensor | None:
            if pool is None:
                return None
            size = math.prod(pool.shape) * pool.dtype.itemsize
            return memory[pool.offset : pool.offset + size].view(pool.dtype).view(pool.shape)

        return [LayerCache(*map(view, layer)) for layer in self.layers]  # type: ignore[arg-type]


class KvCache:
    """Pages of all layers of this rank, and which request has which.

    `table` [rows, width] int32 holds the pages of each row's request, by its slot in the batch. `shared`: ranks that
    prefill may map the `arena` and write there.
    """

    def __init__(
        self,
        model: Model,
        rank: Rank,
        block: int,
        rows: int,
        width: int,
        device: torch.device,
        shared: bool = False,
    ) -> None:
        self.block, self.cp, self.cp_rank, self.device = block, len(rank.groups.cp), rank.cp_rank, device
        layout = PoolLayout(model, rank, block)
        self.arena = Arena(layout.size, device, shared)
        self.layers = layout.views(self.arena.memory)
        self.table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._free = list(range(layout.pages - 1, -1, -1))
        self._tables: dict[int, list[int]] = {}

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def reserve(self, row: Row) -> None:
        """Take all pages the request can ever need, so that decoding cannot run out."""
        count = pages_needed(row.prompt_length + row.max_tokens, self.block, self.cp)
        assert count <= len(self._free), "admission is the scheduler's: it counts the same pages"
        pages = [self._free.pop() for _ in range(count)]
        self._tables[row.index] = pages
        self.table[row.slot, :count] = torch.tensor(pages, dtype=torch.int32)

    def release(self, row: Row) -> None:
        """Give the request's pages back."""
        self._free += reversed(self._tables.pop(row.index))

    def pages(self, row: Row) -> list[int]:
        """The pages of the request, in order."""
        return self._tables[row.index]

    def stored(self, row: Row) -> int:
        """Tokens of the request cached on this rank."""
        return local_length(row.cached, self.block, self.cp, self.cp_rank)

    def write_prompt(self, row: Row, layer: int, heads: slice, kv: Tensor) -> None:
        """Store the first n local tokens of one local layer.

        MLA: kv [n, latent + rope]; GQA: kv [2, len(heads), n, D] for the local KV heads `heads`. In the cache's dtype;
        for an FP8 cache as quantize.pack leaves it, the scale behind the columns.
        """
        write_pages(self.layers[layer], torch.tensor(self.pages(row), device=self.device), heads, kv)

    def batch(self, positions: Tensor, attends: Tensor, rotary: Rotary) -> DecodeBatch:
        """A step of the first rows of the batch, with new tokens at global `positions` [N] int64, from this rank.

        Rows without `attends` [N] bool own nothing and have nothing to attend to.
        """
        table = self.table[: len(positions)]
        mine = attends & (owner(positions, self.block, self.cp) == self.cp_rank)
        lengths = local_lengths(positions + 1, self.block, self.cp, self.cp_rank).masked_fill(~attends, 0)
        local = local_slot(positions, self.block, self.cp).masked_fill(~mine, 0)
        page = table.gather(1, (local // self.block).unsqueeze(1)).squeeze(1)
        cos, sin = rotary.angles(positions)
        return DecodeBatch(
            cos=cos,
            sin=sin,
            page_table=table,
            lengths=lengths.to(torch.int32),
            owned=mine.to(torch.uint8),
            slots=page.long() * self.block + local % self.block,
        )


def write_pages(cache: LayerCache, pages: Tensor, heads: slice, kv: Tensor) -> None:
    """KvCache.write_prompt into `pages`, in order, of one layer's pools."""
    elements, scales = (kv, None) if cache.k_scale is None else unpack(kv, cache.k.shape[-1])
    for new, k, v in ((elements, cache.k, cache.v), (scales, cache.k_scale, cache.v_scale)):
        if new is None or k is None:
            continue
        if v is None:
            _fill(k.unsqueeze(1), pages, new.unsqueeze(0))
        else:
            _fill(k[:, heads], pages, new[0])
            _fill(v[:, heads], pages, new[1])


def _fill(pool: Tensor, pages: Tensor, tokens: Tensor) -> None:
    """Write tokens [heads, n, width] to the first of `pages` of pool [all pages, heads, block, width]."""
    if pool.dtype == torch.float8_e4m3fn:  # not every device assigns it by index
        pool, tokens = pool.view(torch.uint8), tokens.view(torch.uint8)
    heads, count, width = tokens.shape
    whole, rest = divmod(count, pool.shape[2])
    pool[pages[:whole]] = tokens[:, : count - rest].reshape(heads, whole, pool.shape[2], width).transpose(0, 1)
    if rest:
        pool[pages[whole], :, :rest] = tokens[:, count - rest :]
