"""Random decode problems, hostile ones, and the comparison of an Ops with the float64 oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.manifest import Dtype, KvDtype
from helixc_runtime.ops import DecodeBatch, LayerCache, Ops, Partial, Projections
from helixc_runtime.ops_torch import TorchOps
from helixc_runtime.quantize import dequantize, quantize
from tests.gpu.append_cases import check_quantized, doubled, random_projections, vector_error


def mla(
    heads: int, block: int, dtype: Dtype = "bfloat16", *, kv_dtype: KvDtype | None = None, query_tokens: int = 1
) -> AttentionShape:
    """DeepSeek-V3's attention, `heads` of them on this rank. The cache is of `dtype` unless told."""
    return AttentionShape(heads, 1, 576, 512, 64, True, 192**-0.5, block, dtype, kv_dtype or dtype, query_tokens)


def gqa(
    heads: int,
    kv_heads: int,
    dim: int,
    block: int,
    dtype: Dtype = "bfloat16",
    *,
    kv_dtype: KvDtype | None = None,
    query_tokens: int = 1,
) -> AttentionShape:
    """Llama's and Qwen3's attention. The cache is of `dtype` unless told."""
    return AttentionShape(
        heads, kv_heads, dim, dim, dim, False, dim**-0.5, block, dtype, kv_dtype or dtype, query_tokens
    )


# Every kind of append: families, dtypes, widths that fill no load or no warp.
APPEND_SHAPES = {
    "mla": mla(5, 4),
    "mla float32": mla(3, 32, "float32"),
    "mla fp8": mla(3, 64, kv_dtype="float8_e4m3fn"),
    "mla fp8 of float32": mla(2, 32, "float32", kv_dtype="float8_e4m3fn"),
    "mla cached as float32": mla(2, 32, kv_dtype="float32"),
    "mla of few columns": AttentionShape(3, 1, 40, 24, 16, True, 1.0, 4, "bfloat16", "float8_e4m3fn", norm_eps=1e-5),
    "mla of odd columns": AttentionShape(3, 1, 72, 66, 6, True, 1.0, 4, "float32", "bfloat16"),
    "llama": gqa(8, 2, 128, 32),
    "llama fp8": gqa(8, 2, 128, 32, kv_dtype="float8_e4m3fn"),
    "qwen3": replace(gqa(8, 1, 128, 32), qk_norm=True),
    "qwen3 fp8": replace(gqa(4, 4, 128, 4, kv_dtype="float8_e4m3fn"), qk_norm=True, norm_eps=1e-5),
    "qwen3 float32": replace(gqa(6, 3, 64, 4, "float32"), qk_norm=True),
    "head of 8": gqa(5, 5, 8, 16, "float16"),
    "head of 72": replace(gqa(13, 1, 72, 64, "float16", kv_dtype="float8_e4m3fn"), qk_norm=True),
    "head of 200": gqa(2, 1, 200, 32, kv_dtype="float8_e4m3fn"),
    "head of 256": gqa(3, 1, 256, 16, kv_dtype="float16"),
    "some columns rotated": replace(gqa(4, 2, 128, 32, kv_dtype="float8_e4m3fn"), rope_dim=64, qk_norm=True),
    "two columns rotated": replace(gqa(3, 1, 72, 4), rope_dim=2),
    "interleaved heads": replace(gqa(3, 1, 64, 4), interleaved=True),
}


_ELEMENTS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Case:
    """One decode step of one layer. Everything a kernel must not read is NaN, and the scale of such a token garbage."""

    shape: AttentionShape
    q: Tensor  # of attend
    new: Projections  # of append
    cache: LayerCache
    batch: DecodeBatch
    original: LayerCache  # what an FP8 cache was quantised from, of shape.dtype; else equal to the cache


def random_case(
    shape: AttentionShape, lengths: list[int], device: torch.device, seed: int, *, appended: bool = False
) -> Case:
    """Rows in shuffled pages; `lengths` are the local tokens that each row's last query token attends.

    A third of the rows owns all its new tokens, a third none and a third some; what a row owns counts in its length.
    The owned new tokens are left to Ops.append, or stored already if `appended`.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, shape.dtype)

    rows, last = len(lengths), torch.tensor(lengths)
    owned = _random_owned(lengths, shape.query_tokens, generator)  # [B, T]
    cached = last - owned.sum(dim=1)
    bounds = cached.unsqueeze(1) + owned.cumsum(dim=1)  # [B, T]
    max_pages = max(1, math.ceil(max(lengths) / shape.block)) + 1
    pages = rows * max_pages + 3
    table = torch.randperm(pages, generator=generator)[: rows * max_pages].view(rows, max_pages)
    own_slots = table.gather(1, (bounds - 1).clamp_min(0) // shape.block) * shape.block + (bounds - 1) % shape.block
    trap = table[:, -1:] * shape.block  # an unused page, for tokens that must not be written
    used = torch.arange(max_pages * shape.block) < (last if appended else cached).unsqueeze(1)
    stored = torch.zeros(pages, shape.block, dtype=torch.bool)
    stored[table.flatten()] = used.view(-1, shape.block)
    cache, original = random_cache(shape, stored, generator)
    tokens = rows * shape.query_tokens
    angles = torch.rand(tokens, shape.rope_dim // 2, generator=generator) * 2 * math.pi
    batch = DecodeBatch(
        cos=angles.cos().to(device),
        sin=angles.sin().to(device),
        page_table=table.int().to(device),
        lengths=bounds.flatten().to(device, torch.int32),
        owned=owned.flatten().to(device, torch.uint8),
        slots=torch.where(owned, own_slots, trap).flatten().to(device),
    )
    q = torch.randn(tokens, shape.heads, shape.head_dim, generator=generator).to(device, dtype)
    new = random_projections(shape, tokens, device, generator)
    return Case(shape, q, new, moved(cache, device), batch, moved(original, device))


def _random_owned(lengths: list[int], query_tokens: int, generator: torch.Generator) -> Tensor:
    """Which new tokens each row owns, [B, T] bool: all, none, some, all, ..., and never more than its length."""
    owned = torch.zeros(len(lengths), query_tokens, dtype=torch.bool)
    for row, length in enumerate(lengths):
        some = int(torch.randint(1, query_tokens + 1, (), generator=generator))
        count = min(length, (query_tokens, 0, some)[row % 3])
        owned[row, torch.randperm(query_tokens, generator=generator)[:count]] = True
    return owned


def random_cache(shape: AttentionShape, stored: Tensor, generator: torch.Generator) -> tuple[LayerCache, LayerCache]:
    """Pages in which the tokens that `stored` [pages, block] tells are random, and all others poisoned.

    Returns the cache, of shape.kv_dtype, and what it was made from, of shape.dtype; both on the generator's device.
    """
    tokens = stored if shape.is_mla else stored.unsqueeze(1).expand(-1, shape.kv_heads, -1)
    k, k_scale, k_original = _random_pages(shape, tokens, generator)
    if shape.is_mla:
        return LayerCache(k, None, k_scale), LayerCache(k_original, None)
    v, v_scale, v_original = _random_pages(shape, tokens, generator)
    return LayerCache(k, v, k_scale, v_scale), LayerCache(k_original, v_original)


def _random_pages(
    shape: AttentionShape, stored: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Elements [*stored, D], scales (of FP8) and the unquantised elements, for `stored` of any shape.

    Some pages at a time: float32 copies of all would fill a GPU that other tests use as well.
    """
    pages = max(1, _ELEMENTS_AT_ONCE // (math.prod(stored.shape[1:]) * shape.head_dim))
    made = [_some_random_pages(shape, some, generator) for some in stored.split(pages)]
    elements, scales, original = zip(*made, strict=True)
    return torch.cat(elements), torch.cat(scales) if shape.scale_groups else None, torch.cat(original)


def _some_random_pages(
    shape: AttentionShape, stored: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor | None, Tensor]:
    dtype: torch.dtype = getattr(torch, shape.dtype)
    device, unused = generator.device, ~stored.unsqueeze(-1)
    original = torch.randn(*stored.shape, shape.head_dim, generator=generator, device=device)
    if not shape.scale_bytes:
        original = original.to(dtype).masked_fill_(unused, torch.nan)
        return original.to(getattr(torch, shape.kv_dtype)), None, original
    # Vectors of unlike magnitude, so that another's scale is noticed.
    size = (*stored.shape, 1)
    original *= torch.exp2(-torch.randint(0, 4, size, generator=generator, device=device).float())
    original = original.to(dtype).masked_fill_(unused, torch.nan)
    elements, scales = quantize(original)
    garbage = torch.randint(0, 511, size, generator=generator, device=device).clamp_max(255).to(torch.uint8)
    return elements, torch.where(unused, garbage, scales), original


def moved(cache: LayerCache, device: torch.device) -> LayerCache:
    tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    k, v, k_scale, v_scale = (None if tensor is None else tensor.to(device, copy=True) for tensor in tensors)
    assert k is not None
    return LayerCache(k, v, k_scale, v_scale)


def to_double(cache: LayerCache) -> LayerCache:
    """A float64 copy, for the oracle; an FP8 cache is dequantised, exactly, and has no scales any more."""
    v = None if cache.v is None else _double(cache.v, cache.v_scale)
    return LayerCache(_double(cache.k, cache.k_scale), v)


def attend_in_double(shape: AttentionShape, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
    """The oracle's attend, KV head by KV head: a float64 copy of a whole cache can fill a GPU."""
    one = replace(shape, heads=shape.group, kv_heads=1)
    parts = [
        TorchOps(one).attend(heads.double(), to_double(_of_kv_head(shape, cache, i)), batch)
        for i, heads in enumerate(q.split(shape.group, dim=1))
    ]
    return Partial(torch.cat([part.o for part in parts], dim=1), torch.cat([part.lse for part in parts], dim=1))


def _of_kv_head(shape: AttentionShape, cache: LayerCache, head: int) -> LayerCache:
    if shape.is_mla:
        return cache
    tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    k, *others = (None if tensor is None else tensor[:, head : head + 1] for tensor in tensors)
    assert k is not None
    return LayerCache(k, *others)


def _double(elements: Tensor, scales: Tensor | None) -> Tensor:
    return (elements if scales is None else dequantize(elements, scales)).double()


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
    shape, batch, oracle = case.shape, case.batch, TorchOps(case.shape)
    device = batch.slots.device
    before, like, exact = moved(case.cache, device), moved(case.cache, device), to_double(case.cache)
    want = oracle.append(doubled(case.new), exact, batch)
    oracle.append(case.new, like, batch)
    got = ops.append(case.new, case.cache, batch)
    assert vector_error(got, want) <= bound, "the queries are wrong"
    written = torch.zeros(case.cache.k.shape[0], shape.block, dtype=torch.bool, device=device)
    written.view(-1)[batch.slots[batch.owned.bool()]] = True
    tokens = written if shape.is_mla else written.unsqueeze(1).expand(-1, shape.kv_heads, -1)
    for name in ("k", "v"):
        elements, oracle_elements = getattr(case.cache, name), getattr(exact, name)
        if elements is None:
            continue
        scales, like_scales = (getattr(cache, f"{name}_scale") for cache in (case.cache, like))
        if scales is None:
            rounded = bound + torch.finfo(elements.dtype).eps / 2
            assert vector_error(elements[tokens], oracle_elements[tokens]) <= rounded, f"the new {name} are wrong"
        else:
            pairs = ((elements, scales), (getattr(like, name), like_scales))
            quantized = (tensor[tokens] for pair in pairs for tensor in pair)
            check_quantized(*quantized, oracle_elements[tokens], bound)
            assert torch.equal(scales[~tokens], getattr(before, f"{name}_scale")[~tokens]), "other scales changed"
        assert torch.equal(_bits(elements[~tokens]), _bits(getattr(before, name)[~tokens])), "other tokens changed"


def check_attend(ops: Ops, case: Case, bound: float) -> None:
    """Run attend (after append, or `appended`: every length is stored) and compare with the oracle."""
    want = TorchOps(case.shape).attend(case.q.double(), to_double(case.cache), case.batch)
    check_partial(ops.attend(case.q, case.cache, case.batch), want, bound)


def quantization_error(case: Case) -> float:
    """Relative Frobenius error of attention over an FP8 cache against its original (`appended`), both in float64."""
    oracle, q = TorchOps(case.shape), case.q.double()
    got, want = (oracle.attend(q, to_double(cache), case.batch) for cache in (case.cache, case.original))
    assert torch.equal(got.lse.isneginf(), want.lse.isneginf())
    return relative_error(got.o, want.o)


def check_elements(ops: Ops, shape: AttentionShape, device: torch.device) -> None:
    """Attention over one token gives back its value: every FP8 element, NaN included, under every scale there is.

    `shape` is of FP8 GQA with one head of 256 columns, and float32 elsewhere.
    """
    scales = torch.arange(27, 248, dtype=torch.uint8)
    rows = len(scales)
    v = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    size = (rows, 1, shape.block, 256)
    cache = LayerCache(
        k=torch.zeros(size).to(torch.float8_e4m3fn),
        v=v.view(torch.uint8).expand(size).contiguous().view(torch.float8_e4m3fn),
        k_scale=torch.full((*size[:3], 1), 127, dtype=torch.uint8),
        v_scale=scales.view(rows, 1, 1, 1).expand(*size[:3], 1).contiguous(),
    )
    ones, nothing = torch.ones(rows, dtype=torch.int32), torch.zeros(rows, 128)
    table = torch.arange(rows, dtype=torch.int32).unsqueeze(1)
    batch = DecodeBatch(nothing, nothing, table.to(device), ones.to(device), ones, ones)
    got = ops.attend(torch.zeros(rows, 1, 256).to(device), moved(cache, device), batch)
    want = dequantize(v.expand(rows, 256), scales.unsqueeze(1))
    assert int(want.isnan().sum()) == 2 * rows
    torch.testing.assert_close(got.o[:, 0].cpu(), want, rtol=0, atol=0, equal_nan=True)


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
