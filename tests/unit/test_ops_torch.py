"""TorchOps, the oracle of everything else, against an independent dense softmax in float64."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.manifest import local_length, owner
from helixc_runtime.ops import DecodeBatch, GqaProjections, LayerCache, MlaProjections, Norm, Partial, Projections
from helixc_runtime.ops_torch import TorchOps
from tests.gpu.kernel_cases import (
    Case,
    check_attend,
    check_partial,
    gqa,
    mla,
    quantization_error,
    random_case,
    relative_error,
    to_double,
)

CPU = torch.device("cpu")
FP8_SHAPES = [
    mla(3, 32, kv_dtype="float8_e4m3fn"),
    mla(2, 4, "float32", kv_dtype="float8_e4m3fn", query_tokens=2),
    gqa(6, 2, 128, 64, kv_dtype="float8_e4m3fn", query_tokens=4),
    gqa(3, 1, 72, 4, "float16", kv_dtype="float8_e4m3fn"),
    gqa(4, 4, 200, 32, kv_dtype="float8_e4m3fn", query_tokens=3),
]


def _random_shape(draw: random.Random) -> AttentionShape:
    block = draw.choice([1, 3, 4, 32])
    if draw.random() < 0.5:
        latent, rope = draw.choice([8, 24]), draw.choice([4, 8])
        return AttentionShape(
            draw.randint(1, 5), 1, latent + rope, latent, rope, draw.random() < 0.5, 0.3, block, "float32", "float32"
        )
    kv_heads, group, dim = draw.randint(1, 3), draw.randint(1, 4), draw.choice([8, 16])
    rope = draw.choice([dim, 6])  # only the last dims, for some
    return AttentionShape(
        kv_heads * group,
        kv_heads,
        dim,
        dim,
        rope,
        draw.random() < 0.5,
        dim**-0.5,
        block,
        "float32",
        "float32",
        qk_norm=draw.random() < 0.5,
        norm_eps=draw.choice([1e-6, 0.3]),
    )


def _dense(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[float], float]:
    """One head by the definition: q [D], k [L, D], v [L, P] -> (o [P], lse), in Python floats."""
    scores = [shape.scale * math.fsum(a * b for a, b in zip(q.tolist(), row, strict=True)) for row in k.tolist()]
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    total = math.fsum(weights)
    o = [math.fsum(w * x for w, x in zip(weights, column, strict=True)) / total for column in v.T.tolist()]
    return o, largest + math.log(total)


def _random_token(
    shape: AttentionShape, generator: torch.Generator
) -> tuple[Projections, Tensor, Tensor, Tensor | None]:
    """One token's projections in float64, and q [H, D], k and v (None: MLA) [KH, D], normed by the definition."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        squares = [math.fsum(element**2 for element in row) / x.shape[-1] for row in x.tolist()]
        return torch.stack([row / math.sqrt(s + shape.norm_eps) * weight for row, s in zip(x, squares, strict=True)])

    if shape.is_mla:
        new = MlaProjections(
            normal(1, shape.heads, shape.partial_dim),
            normal(1, shape.heads, shape.rope_dim),
            normal(1, shape.head_dim),
            normal(shape.partial_dim),
        )
        latent, rope = new.kv[:, : shape.partial_dim], new.kv[:, shape.partial_dim :]
        return new, torch.cat((new.q_latent, new.q_rope), 2)[0], torch.cat((normed(latent, new.norm), rope), 1), None
    q, k, v = (normal(1, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    if not shape.qk_norm:
        return GqaProjections(q, k, v), q[0], k[0], v[0]
    norms = (normal(shape.head_dim), normal(shape.head_dim))
    return GqaProjections(q, k, v, *norms), normed(q[0], norms[0]), normed(k[0], norms[1]), v[0]


def _turn(shape: AttentionShape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate one vector [D] by complex multiplication."""
    plain, pairs = shape.head_dim - shape.rope_dim, shape.rope_dim // 2
    out = x.double().clone()
    for i in range(pairs):
        a, b = (plain + 2 * i, plain + 2 * i + 1) if shape.interleaved else (plain + i, plain + i + pairs)
        turned = complex(x[a], x[b]) * complex(cos[i], sin[i])
        out[a], out[b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("_round", range(12))
def test_decode_steps_over_cp_ranks_equal_dense_attention(seed: int, _round: int) -> None:
    """Append token by token on every cp rank, attend, combine: the whole protocol against the definition."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape, cp, tokens = _random_shape(draw), draw.randint(1, 4), draw.randint(1, 20)
    ops = TorchOps(shape)
    pages = tokens // shape.block + 2
    caches = [_nan_cache(shape, pages) for _ in range(cp)]
    tables = [torch.randperm(pages, generator=generator).int().unsqueeze(0) for _ in range(cp)]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for position in range(tokens):
        new, q, k, v = _random_token(shape, generator)
        angle = torch.rand(1, shape.rope_dim // 2, dtype=torch.float64, generator=generator) * 7
        parts = []
        for rank in range(cp):
            batch = _batch(shape, position, cp, rank, tables[rank], angle)
            rotated = ops.append(new, caches[rank], batch)
            parts.append(ops.attend(rotated, caches[rank], batch))
        key = torch.stack([_turn(shape, head, angle[0].cos(), angle[0].sin()) for head in k])
        keys.append(key)
        values.append(key[:, : shape.partial_dim] if v is None else v)
    merged = ops.combine(torch.stack([p.o for p in parts]), torch.stack([p.lse for p in parts]))
    for head in range(shape.heads):
        kv_head = head // shape.group
        query = _turn(shape, q[head], angle[0].cos(), angle[0].sin())
        stored_k, stored_v = (torch.stack([t[kv_head] for t in stored]) for stored in (keys, values))
        o, lse = _dense(shape, query, stored_k, stored_v)
        assert merged.o[0, head].tolist() == pytest.approx(o, abs=1e-10)
        assert merged.lse[0, head].item() == pytest.approx(lse, abs=1e-10)


def _nan_cache(shape: AttentionShape, pages: int) -> LayerCache:
    size = (shape.block, shape.head_dim) if shape.is_mla else (shape.kv_heads, shape.block, shape.head_dim)
    k = torch.full((pages, *size), torch.nan, dtype=torch.float64)
    return LayerCache(k, None if shape.is_mla else k.clone())


def _batch(shape: AttentionShape, position: int, cp: int, rank: int, table: Tensor, angle: Tensor) -> DecodeBatch:
    cached, owned = local_length(position, shape.block, cp, rank), owner(position, shape.block, cp) == rank
    slot = int(table[0, cached // shape.block]) * shape.block + cached % shape.block if owned else -1
    return DecodeBatch(
        cos=angle.cos(),
        sin=angle.sin(),
        page_table=table,
        lengths=torch.tensor([cached + owned], dtype=torch.int32),
        owned=torch.tensor([owned], dtype=torch.uint8),
        slots=torch.tensor([slot]),
    )


def test_empty_rows_and_unused_memory(seed: int) -> None:
    case = random_case(gqa(6, 2, 16, 4, "float32"), [0, 6, 0, 13], CPU, seed)
    ops = TorchOps(case.shape)
    ops.append(case.new, case.cache, case.batch)
    partial = ops.attend(case.q, case.cache, case.batch)
    assert torch.equal(partial.lse.isneginf(), (case.batch.lengths == 0).unsqueeze(1).expand(4, 6))
    assert not partial.o[case.batch.lengths == 0].any()
    assert partial.o.isfinite().all() and case.cache.k.isnan().any()


def test_append_writes_owned_rows_only(seed: int) -> None:
    case = random_case(mla(2, 4, "float32"), [5, 6, 7], CPU, seed)
    before = case.cache.k.clone()
    rotated = TorchOps(case.shape).append(case.new, case.cache, case.batch)
    changed = (case.cache.k.nan_to_num(123.0) != before.nan_to_num(123.0)).any(dim=-1).view(-1)
    assert sorted(changed.nonzero().squeeze(1).tolist()) == sorted(case.batch.slots[[0, 2]].tolist())
    assert isinstance(case.new, MlaProjections)
    plain, turned = rotated[1].split((512, 64), dim=-1)  # the inactive row's query is made all the same
    assert torch.equal(plain, case.new.q_latent[1]) and not torch.allclose(turned, case.new.q_rope[1])


def test_combine_of_nothing_is_zero(seed: int) -> None:
    shape = gqa(2, 1, 8, 4, "float32")
    o, lse = torch.full((3, 2, 2, 8), torch.nan), torch.full((3, 2, 2), -torch.inf)
    merged = TorchOps(shape).combine(o, lse)
    assert not merged.o.any() and merged.lse.isneginf().all()
    o[1, 0], lse[1, 0] = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed)), 0.5
    merged = TorchOps(shape).combine(o, lse)
    assert torch.equal(merged.o[0], o[1, 0]) and not merged.o[1].any()


def test_nan_in_a_living_part_is_not_hidden() -> None:
    shape = gqa(1, 1, 8, 4, "float32")
    merged = TorchOps(shape).combine(torch.full((2, 1, 1, 8), torch.nan), torch.zeros(2, 1, 1))
    assert merged.o.isnan().all()


def _base_two(o: Tensor, lse: Tensor) -> Partial:
    weight = torch.exp2(lse - lse.amax(0)).nan_to_num(0.0)
    return Partial((weight.unsqueeze(-1) * o.nan_to_num(0.0)).sum(0) / weight.sum(0).unsqueeze(-1), lse.logsumexp(0))


def _unmasked(o: Tensor, lse: Tensor) -> Partial:
    weight = torch.softmax(lse, dim=0)
    return Partial((weight.unsqueeze(-1) * o).sum(0), lse.logsumexp(0))


def _average(o: Tensor, lse: Tensor) -> Partial:
    return Partial(o.nan_to_num(0.0).mean(0), lse.logsumexp(0))


@pytest.mark.parametrize("wrong", [_base_two, _unmasked, _average])
def test_the_comparison_notices_a_wrong_combine(seed: int, wrong: object) -> None:
    assert callable(wrong)
    generator = torch.Generator().manual_seed(seed)
    shape = gqa(3, 1, 16, 4, "float32")
    o, lse = torch.randn(3, 4, 3, 16, generator=generator), torch.randn(3, 4, 3, generator=generator) * 3
    o[1, 2], lse[1, 2] = torch.nan, -torch.inf
    want = TorchOps(shape).combine(o.double(), lse.double())
    check_partial(TorchOps(shape).combine(o, lse), want, 1e-5)
    with pytest.raises(AssertionError):
        check_partial(wrong(o, lse), want, 1e-2)


def test_half_precision_inputs_are_computed_in_float32(seed: int) -> None:
    case = random_case(gqa(4, 2, 64, 32), [100, 300], CPU, seed)
    ops = TorchOps(case.shape)
    ops.append(case.new, case.cache, case.batch)
    partial = ops.attend(case.q, case.cache, case.batch)
    assert (partial.o.dtype, partial.lse.dtype) == (torch.bfloat16, torch.float32)
    check_partial(partial, ops.attend(case.q.double(), to_double(case.cache), case.batch), 4e-3, 1e-5)


def _e4m3(byte: int) -> float:
    """The value of an FP8 e4m3fn element by its definition: 4 bits of exponent with bias 7, 3 of mantissa."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def _stored(elements: Tensor, scales: Tensor, case: Case, row: int, tokens: int) -> Tensor:
    """The first tokens of a row, [KH, tokens, D] float64, one by one through the page table."""
    values = torch.tensor([_e4m3(byte) for byte in range(256)], dtype=torch.float64)
    out = torch.empty(case.shape.kv_heads, tokens, case.shape.head_dim, dtype=torch.float64)
    for head in range(case.shape.kv_heads):
        for token in range(tokens):
            page, offset = int(case.batch.page_table[row, token // case.shape.block]), token % case.shape.block
            at = (page, offset) if case.shape.is_mla else (page, head, offset)
            codes = elements[at].view(torch.uint8).long()
            out[head, token] = values[codes] * 2.0 ** (int(scales[at]) - 127)
    return out


@pytest.mark.parametrize("shape", FP8_SHAPES, ids=str)
def test_fp8_equals_plain_softmax_over_the_values_it_stands_for(shape: AttentionShape, seed: int) -> None:
    case = random_case(shape, [7, 0, 35, 1, 2, 68], CPU, seed, appended=True)
    got = TorchOps(shape).attend(case.q.double(), case.cache, case.batch)
    for token, length in enumerate(case.batch.lengths.tolist()):
        row = token // shape.query_tokens
        assert case.cache.k_scale is not None
        k = v = _stored(case.cache.k, case.cache.k_scale, case, row, length)
        if case.cache.v is not None and case.cache.v_scale is not None:
            v = _stored(case.cache.v, case.cache.v_scale, case, row, length)
        for head in range(shape.heads):
            scores = k[head // shape.group] @ case.q[token, head].double() * shape.scale
            o = scores.softmax(0) @ v[head // shape.group][:, : shape.partial_dim]
            assert torch.allclose(got.o[token, head], o, rtol=0, atol=1e-12)
            assert torch.allclose(got.lse[token, head], scores.logsumexp(0), rtol=0, atol=1e-12)
    check_attend(TorchOps(shape), case, 1e-5 if shape.dtype == "float32" else 4e-3)


@pytest.mark.parametrize("shape", [*FP8_SHAPES, mla(3, 4, query_tokens=3), gqa(4, 2, 64, 32, query_tokens=2)], ids=str)
def test_query_tokens_equal_as_many_calls_of_one(shape: AttentionShape, seed: int) -> None:
    case = random_case(shape, [9, 5, 0, 64, 1, 70], CPU, seed, appended=True)
    got = TorchOps(shape).attend(case.q, case.cache, case.batch)
    one, tokens = TorchOps(replace(shape, query_tokens=1)), shape.query_tokens
    for token in range(tokens):
        batch = replace(case.batch, lengths=case.batch.lengths[token::tokens])
        single = one.attend(case.q[token::tokens], case.cache, batch)
        assert torch.equal(got.o[token::tokens], single.o) and torch.equal(got.lse[token::tokens], single.lse)


@pytest.mark.parametrize(
    "shape",
    [mla(16, 32, kv_dtype="float8_e4m3fn"), gqa(8, 2, 128, 64, kv_dtype="float8_e4m3fn", query_tokens=4)],
    ids=["mla", "gqa"],
)
def test_fp8_loses_little(shape: AttentionShape, seed: int) -> None:
    """Values are off by 2.4% (root mean square). Scores add as much of theirs as they vary, here by about a half."""
    case = random_case(shape, [129, 300, 200, 180, 256, 230], CPU, seed, appended=True)
    assert 1e-2 < quantization_error(replace(case, q=case.q / 2)) <= 4e-2


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("block", [1, 4, 32])
def test_cases_are_hostile(tokens: int, block: int, seed: int) -> None:
    """Bounds follow from what is owned, slots follow the tokens that are there, all else is poison."""
    lengths = [block + 4, 7, 3 * block + 1, 0, 2, 40, 1, 0, 33]
    shape = gqa(2, 1, 8, block, kv_dtype="float8_e4m3fn", query_tokens=tokens)
    case, full = (random_case(shape, lengths, CPU, seed, appended=appended) for appended in (False, True))
    counts = set()
    for row, length in enumerate(lengths):
        own, bounds, slots = (
            t[row * tokens : (row + 1) * tokens].tolist()
            for t in (case.batch.owned, case.batch.lengths, case.batch.slots)
        )
        cached = length - sum(own)
        assert bounds == [cached + sum(own[: token + 1]) for token in range(tokens)]
        order = [int(page) * block + offset for page in case.batch.page_table[row] for offset in range(block)]
        assert [slot for slot, is_own in zip(slots, own, strict=True) if is_own] == order[cached:length]
        assert all(slot in order[length:] for slot, is_own in zip(slots, own, strict=True) if not is_own)
        for each, end in ((case, cached), (full, length)):
            filled = each.cache.k[:, 0].float().view(-1, 8)[order].isfinite().all(1)
            assert filled.tolist() == [token < end for token in range(len(order))]
        counts.add(sum(own))
    assert {0, tokens} <= counts
    assert case.cache.k_scale is not None
    unused = case.cache.k.float().isnan().all(-1, keepdim=True)
    assert (case.cache.k_scale[unused] == 255).any() and len(case.cache.k_scale[unused].unique()) > 5


def test_mismatches_are_named() -> None:
    case = random_case(gqa(4, 2, 8, 4, "float32"), [5], CPU, 0)
    ops = TorchOps(case.shape)
    with pytest.raises(ValueError, match=r"q has shape \[1, 3, 8\], expected \[any, 4, 8\]"):
        ops.attend(case.q[:, :3], case.cache, case.batch)
    assert isinstance(case.new, GqaProjections)
    weight = torch.ones(8)
    for new, message in (
        (replace(case.new, v=case.new.v[:, :1]), r"v has shape \[1, 1, 8\], expected \[1, 2, 8\]"),
        (replace(case.new, q_norm=weight, k_norm=weight), "q_norm must be None for this shape"),
        (MlaProjections(case.q, case.q, case.q, weight), "got MlaProjections for GQA"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.append(new, case.cache, case.batch)
    with pytest.raises(ValueError, match="k_norm must be a weight for this shape"):
        normed = TorchOps(replace(case.shape, qk_norm=True))
        normed.append(replace(case.new, q_norm=weight), case.cache, case.batch)
    with pytest.raises(ValueError, match="length 5 is outside a page table of 1 pages of 4 tokens"):
        short = DecodeBatch(
            case.batch.cos, case.batch.sin, case.batch.page_table[:, :1], case.batch.lengths, *_tail(case.batch)
        )
        ops.attend(case.q, case.cache, short)
    with pytest.raises(ValueError, match="7 query heads do not divide among 2 KV heads"):
        gqa(7, 2, 8, 4)


def test_mismatches_of_tokens_and_scales_are_named() -> None:
    shape = gqa(4, 2, 200, 4, kv_dtype="float8_e4m3fn", query_tokens=3)
    case = random_case(shape, [5, 6], CPU, 0, appended=True)
    ops, cache = TorchOps(shape), case.cache
    assert cache.k_scale is not None
    with pytest.raises(ValueError, match="q has 4 tokens, expected 3 for each of 2 rows"):
        ops.attend(case.q[:4], cache, case.batch)
    with pytest.raises(ValueError, match=r"lengths has shape \[2\], expected \[6\]"):
        ops.attend(case.q, cache, replace(case.batch, lengths=case.batch.lengths[:2]))
    with pytest.raises(ValueError, match=r"cache\.k must have scales if it is float8_e4m3fn, and only then"):
        ops.attend(case.q, replace(cache, k_scale=None), case.batch)
    with pytest.raises(ValueError, match=r"cache\.v must have scales"):
        ops.attend(case.q, replace(cache, v=cache.v.float()), case.batch)
    with pytest.raises(ValueError, match=r"cache.k_scale has shape \[\d+, 2, 4, 2\], expected \[\d+, 2, 4, 1\]"):
        ops.attend(case.q, replace(cache, k_scale=cache.k_scale.repeat(1, 1, 1, 2)), case.batch)


def _tail(batch: DecodeBatch) -> tuple[Tensor, Tensor]:
    return batch.owned, batch.slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_rounded_once_and_normed(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, residual, bias, weight = (torch.randn(*size, 64, generator=generator).to(dtype) for size in ((5,), (5,), (), ()))
    ops, norm = TorchOps(gqa(4, 2, 8, 4)), Norm(weight, 1e-5)
    exact = x.double() + residual.double() + bias.double()
    out, normed = ops.add_norm(x, residual, bias, norm)
    half_a_step = torch.finfo(dtype).eps / 2
    assert ((out.double() - exact).abs() <= 1.01 * half_a_step * exact.abs() + 1e-6).all()
    scale = torch.rsqrt(out.double().pow(2).mean(1, keepdim=True) + 1e-5)
    assert relative_error(normed, out.double() * scale * weight.double()) <= (1e-6 if dtype == torch.float32 else 5e-3)
    same, itself = ops.add_norm(x, None, None, None)
    assert torch.equal(same, x) and itself is same
    for wrong, message in (
        ((x[0], None, None, None), "x has shape"),
        ((x, residual[1:], None, None), "residual has shape"),
        ((x, None, bias[1:], None), "bias has shape"),
        ((x, None, None, Norm(weight[1:], 1e-5)), "norm has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.add_norm(*wrong)
