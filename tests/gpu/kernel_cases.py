"""Random decode problems, hostile ones, and the comparison of an Ops with the float64 oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.manifest import Dtype
from helixc_runtime.ops import DecodeBatch, LayerCache, Ops, Partial
from helixc_runtime.ops_torch import TorchOps


def mla(heads: int, block: int, dtype: Dtype = "bfloat16") -> AttentionShape:
    """DeepSeek-V3's attention, `heads` of them on this rank."""
    return AttentionShape(heads, 1, 576, 512, 64, True, 192**-0.5, block, dtype, dtype)


def gqa(heads: int, kv_heads: int, dim: int, block: int, dtype: Dtype = "bfloat16") -> AttentionShape:
    """Llama's and Qwen3's attention."""
    return AttentionShape(heads, kv_heads, dim, dim, dim, False, dim**-0.5, block, dtype, dtype)


@dataclass(frozen=True)
class Case:
    """One decode step of one layer. Everything a kernel must not read is NaN."""

    shape: AttentionShape
    q: Tensor
    k: Tensor
    v: Tensor | None
    cache: LayerCache
    batch: DecodeBatch


def random_case(shape: AttentionShape, lengths: list[int], device: torch.device, seed: int) -> Case:
    """Rows of `lengths` tokens before the step, in shuffled pages; every second row owns the new token.

    Unowned rows and rows of length 0 are included in `lengths` as they are; an owned row's length counts its new token.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, shape.dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    rows = len(lengths)
    owned = torch.tensor([row % 2 == 0 and length > 0 for row, length in enumerate(lengths)])
    max_pages = max(1, math.ceil(max(lengths) / shape.block)) + 1
    pages = rows * max_pages + 3
    table = torch.randperm(pages, generator=generator)[: rows * max_pages].view(rows, max_pages)
    cache = _poisoned_cache(shape, pages, dtype)
    slots = table[:, -1] * shape.block  # a trap for rows that must not write: an unused page
    for row, length in enumerate(lengths):
        stored = length - int(owned[row])
        for token in range(length):
            page, offset = int(table[row, token // shape.block]), token % shape.block
            if token == stored:
                slots[row] = page * shape.block + offset
            else:
                _fill(cache, page, offset, normal)
    angles = torch.rand(rows, shape.rope_dim // 2, generator=generator) * 2 * math.pi
    batch = DecodeBatch(
        cos=angles.cos().to(device),
        sin=angles.sin().to(device),
        page_table=table.int().to(device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        owned=owned.to(device, torch.uint8),
        slots=slots.to(device),
    )
    k = normal(rows, shape.kv_heads, shape.head_dim)
    v = None if shape.is_mla else normal(rows, shape.kv_heads, shape.head_dim).to(device)
    moved = LayerCache(cache.k.to(device), None if cache.v is None else cache.v.to(device))
    return Case(shape, normal(rows, shape.heads, shape.head_dim).to(device), k.to(device), v, moved, batch)


def _poisoned_cache(shape: AttentionShape, pages: int, dtype: torch.dtype) -> LayerCache:
    size = (shape.block, shape.head_dim) if shape.is_mla else (shape.kv_heads, shape.block, shape.head_dim)
    k = torch.full((pages, *size), torch.nan, dtype=dtype)
    return LayerCache(k, None if shape.is_mla else k.clone())


def _fill(cache: LayerCache, page: int, offset: int, normal: object) -> None:
    assert callable(normal)
    cache.k[page, ..., offset, :] = normal(*cache.k[page, ..., offset, :].shape)
    if cache.v is not None:
        cache.v[page, ..., offset, :] = normal(*cache.v[page, ..., offset, :].shape)


def to_double(cache: LayerCache) -> LayerCache:
    """A float64 copy, for the oracle."""
    return LayerCache(cache.k.double(), None if cache.v is None else cache.v.double())


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error; NaN in `got` gives NaN, which no bound admits."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def check_partial(got: Partial, want: Partial, bound: float, lse_bound: float = 1e-3) -> None:
    """Raise AssertionError unless `got` is within `bound` (o, relative) and `lse_bound` (absolute) of the oracle."""
    empty = want.lse.isneginf()
    assert torch.equal(got.lse.isneginf(), empty), "different rows are empty"
    assert not got.o[empty].any(), "an empty row is not 0"
    difference = (got.lse.double() - want.lse.double())[~empty].abs()
    assert difference.numel() == 0 or float(difference.max()) <= lse_bound, f"lse differs by {difference.max()}"
    error = relative_error(got.o, want.o)
    assert error <= bound, f"o differs by {error}"


def check_append(ops: Ops, case: Case, bound: float) -> None:
    """Run append and compare q, the stored tokens and every other byte of the cache with the oracle."""
    before = [t.clone() for t in (case.cache.k, case.cache.v) if t is not None]
    wide = to_double(case.cache)
    v = None if case.v is None else case.v.double()
    want = TorchOps(case.shape).append(case.q.double(), case.k.double(), v, wide, case.batch)
    got = ops.append(case.q, case.k, case.v, case.cache, case.batch)
    assert relative_error(got, want) <= bound
    slots = case.batch.slots[case.batch.owned.bool()]
    for old, new, oracle in zip(before, (case.cache.k, case.cache.v), (wide.k, wide.v), strict=False):
        assert new is not None and oracle is not None
        written = torch.zeros(old.shape[0], case.shape.block, dtype=torch.bool, device=old.device)
        written.view(-1)[slots] = True
        tokens = written if case.shape.is_mla else written.unsqueeze(1).expand(-1, case.shape.kv_heads, -1)
        assert relative_error(new[tokens], oracle[tokens]) <= bound, "the new tokens are wrong"
        assert torch.equal(_bits(new[~tokens]), _bits(old[~tokens])), "other tokens changed"


def check_attend(ops: Ops, case: Case, bound: float) -> None:
    """Run attend (after append, so that every length is stored) and compare with the oracle."""
    want = TorchOps(case.shape).attend(case.q.double(), to_double(case.cache), case.batch)
    check_partial(ops.attend(case.q, case.cache, case.batch), want, bound)


def check_combine(ops: Ops, shape: AttentionShape, parts: int, device: torch.device, seed: int, bound: float) -> None:
    """Merge random partials, some empty with NaN in their memory, one row empty in every part."""
    generator = torch.Generator().manual_seed(seed)
    rows, heads = 5, 3
    o = torch.randn(parts, rows, heads, shape.partial_dim, generator=generator)
    lse = torch.randn(parts, rows, heads, generator=generator) * 4
    empty = torch.rand(parts, rows, heads, generator=generator) < 0.4
    empty[:, 1] = True
    empty[0, 2:4], empty[1:, 2] = False, True
    o[empty], lse[empty] = torch.nan, -torch.inf
    o = o.to(device, getattr(torch, shape.dtype))
    lse = lse.to(device)
    check_partial(ops.combine(o, lse), TorchOps(shape).combine(o.double(), lse.double()), bound)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
