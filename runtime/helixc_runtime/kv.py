"""The paged KV cache of one generation rank: this rank's shard of every request, block-cyclic by global position.

A page holds one block. Page k of a request on cp rank r is global block k * cp + r, so the page table of a request is
simply its pages in order, and the slot formulas of manifest.py say where a position lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helixc_runtime.manifest import Model, Rank, local_length, local_slot, owner, scale_groups
from helixc_runtime.models.rotary import Rotary
from helixc_runtime.ops import DecodeBatch, LayerCache
from helixc_runtime.quantize import unpack


@dataclass(slots=True)
class Row:
    """A request being decoded. The last token of `tokens` is not cached yet: it is the next step's input."""

    index: int
    prompt_length: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)  # generated

    @property
    def position(self) -> int:
        """Global position of the next input token: L, L + 1, L + 2, ..."""
        return self.prompt_length + len(self.tokens) - 1


def pages_needed(total: int, block: int, cp: int) -> int:
    """Pages that the fullest rank (cp rank 0) needs for `total` tokens; every rank reserves as many."""
    return -(-local_length(total, block, cp, 0) // block)


class KvCache:
    """Pages of all layers of this rank, and which request has which."""

    def __init__(self, model: Model, rank: Rank, block: int, device: torch.device) -> None:
        self.block, self.cp, self.cp_rank, self.device = block, len(rank.groups.cp), rank.cp_rank, device
        pages = max(1, rank.memory.kv_capacity_tokens // block)
        dim, groups = model.arch.head_dim, scale_groups(model.arch.head_dim, model.kv_dtype)
        tokens = (pages, block) if model.arch.mla else (pages, rank.kv_heads[1] - rank.kv_heads[0], block)

        def pools(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
            k, v = (torch.empty((*tokens, width), dtype=dtype, device=device) for _ in "kv")
            return k, None if model.arch.mla else v

        def layer() -> LayerCache:
            scales = pools(groups, torch.uint8) if groups else (None, None)
            return LayerCache(*pools(dim, getattr(torch, model.kv_dtype)), *scales)

        self.layers = [layer() for _ in range(*rank.layers)]
        self._free = list(range(pages - 1, -1, -1))
        self._tables: dict[int, list[int]] = {}

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def reserve(self, row: Row) -> None:
        """Take all pages the request can ever need, so that decoding cannot run out."""
        count = pages_needed(row.prompt_length + row.max_tokens, self.block, self.cp)
        assert count <= len(self._free), "admission is the scheduler's: it counts the same pages"
        self._tables[row.index] = [self._free.pop() for _ in range(count)]

    def release(self, row: Row) -> None:
        """Give the request's pages back."""
        self._free += reversed(self._tables.pop(row.index))

    def stored(self, row: Row) -> int:
        """Tokens of the request cached on this rank."""
        return local_length(row.position, self.block, self.cp, self.cp_rank)

    def write_prompt(self, row: Row, layer: int, heads: slice, kv: Tensor) -> None:
        """Store the first n local tokens of one local layer.

        MLA: kv [n, latent + rope]; GQA: kv [2, len(heads), n, D] for the local KV heads `heads`. In the cache's dtype;
        for an FP8 cache as quantize.pack leaves it, the scales behind the columns.
        """
        cache = self.layers[layer]
        pages = torch.tensor(self._tables[row.index], device=self.device)
        elements, scales = (kv, None) if cache.k_scale is None else unpack(kv, cache.k.shape[-1])
        for new, k, v in ((elements, cache.k, cache.v), (scales, cache.k_scale, cache.v_scale)):
            if new is None or k is None:
                continue
            if v is None:
                _fill(k.unsqueeze(1), pages, new.unsqueeze(0))
            else:
                _fill(k[:, heads], pages, new[0])
                _fill(v[:, heads], pages, new[1])

    def batch(self, rows: Sequence[Row], rotary: Rotary) -> DecodeBatch:
        """The next step of `rows`, seen from this rank."""
        positions = [row.position for row in rows]
        tables = [self._tables[row.index] for row in rows]
        owned = [owner(p, self.block, self.cp) == self.cp_rank for p in positions]
        slots = [self._physical(t, p) if mine else 0 for t, p, mine in zip(tables, positions, owned, strict=True)]
        lengths = [local_length(p + 1, self.block, self.cp, self.cp_rank) for p in positions]
        width = max(len(table) for table in tables)
        padded = [table + [0] * (width - len(table)) for table in tables]
        cos, sin = rotary.angles(torch.tensor(positions, device=self.device))
        return DecodeBatch(
            cos=cos,
            sin=sin,
            page_table=torch.tensor(padded, dtype=torch.int32, device=self.device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=self.device),
            owned=torch.tensor(owned, dtype=torch.uint8, device=self.device),
            slots=torch.tensor(slots, dtype=torch.int64, device=self.device),
        )

    def _physical(self, table: list[int], position: int) -> int:
        page, offset = divmod(local_slot(position, self.block, self.cp), self.block)
        return table[page] * self.block + offset


def _fill(pool: Tensor, pages: Tensor, tokens: Tensor) -> None:
    """Write tokens [heads, n, width] to the first of `pages` of pool [all pages, heads, block, width]."""
    if pool.dtype == torch.float8_e4m3fn:  # not every device assigns it by index
        pool, tokens = pool.view(torch.uint8), tokens.view(torch.uint8)
    heads, count, width = tokens.shape
    whole, rest = divmod(count, pool.shape[2])
    pool[pages[:whole]] = tokens[:, : count - rest].reshape(heads, whole, pool.shape[2], width).transpose(0, 1)
    if rest:
        pool[pages[whole], :, :rest] = tokens[:, count - rest :]
