"""The kernels' own source, and CudaOps' grids and arguments, against the float64 oracle, without a GPU."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helixc.codegen.problem import absorb, argmax, embed, reduce
from helixc.codegen.template_root import template_root
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.manifest import Dtype
from helixc_runtime.ops import GqaProjections, MlaProjections, Norm
from helixc_runtime.ops_cuda import CudaOps
from helixc_runtime.ops_torch import TorchOps
from tests.gpu.append_cases import unabsorbed
from tests.gpu.kernel_cases import (
    APPEND_SHAPES,
    check_append,
    check_attend,
    check_combine,
    gqa,
    mla,
    random_case,
    relative_error,
)
from tests.simt.bugs import Bug, planted
from tests.simt.cpu_kernel import KernelFault, cpu_ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

CPU = torch.device("cpu")
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
SHAPES = [
    mla(16, 4),
    mla(3, 32, "float32"),
    gqa(9, 3, 64, 4),
    gqa(8, 1, 128, 32, "float16"),
    gqa(13, 1, 72, 64, "float32"),
]


# A GPU of so many multiprocessors: one split, a few, more than there are tiles of tokens.
@pytest.mark.parametrize(
    ("shape", "processors"),
    list(zip(SHAPES, (1, 8, 400, 8, 60), strict=True)),
    ids=lambda value: str(getattr(value, "heads", value)),
)
def test_kernels_agree_with_the_oracle(
    shape: AttentionShape, processors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    ops = cpu_ops(shape, 3, tmp_path, monkeypatch, processors)
    lengths = [0, 1, 75, 0, random.Random(seed).randint(2, 130)]
    case = random_case(shape, lengths, CPU, seed)
    check_append(ops, case, BOUNDS[shape.dtype])
    check_attend(ops, case, BOUNDS[shape.dtype])
    check_combine(ops, shape, 3, CPU, seed, BOUNDS[shape.dtype])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("dot * C::scale", "dot * C::scale * 1.01f"),
        ("empty ? 0.0f : to_float", "to_float"),
        ("base = is_minus_infinity(most) ? 0.0f : most;", "base = most;"),
        ("expf(lses[i] - base)", "exp2f(lses[i] - base)"),
        ("if (position < end) {", "if (position / C::block <= (end - 1) / C::block) {"),
    ],
)
def test_a_wrong_kernel_is_noticed(right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = planted(tmp_path, [Bug("*", right, wrong)])
    seed = random.randrange(1 << 30)
    print("seed", seed)
    _check_all(tmp_path, monkeypatch, template_root(), seed)  # the same problem, unchanged
    with pytest.raises(AssertionError):
        _check_all(tmp_path / "wrong", monkeypatch, root, seed)


def _check_all(folder: Path, monkeypatch: pytest.MonkeyPatch, root: Path, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    shape = gqa(4, 2, 64, 4, "float32")
    ops = cpu_ops(shape, 2, folder, monkeypatch, 8, root)
    case = random_case(shape, [5, 9, 0, 70], CPU, seed)
    check_append(ops, case, 1e-5)
    check_attend(ops, case, 1e-5)
    check_combine(ops, shape, 2, CPU, seed, 1e-5)


def combine_ops(
    shape: AttentionShape, cp: int, folder: Path, monkeypatch: pytest.MonkeyPatch, root: Path | None = None
) -> CudaOps:
    """CudaOps with the combine kernel; its other kernels do nothing."""
    return cpu_ops(shape, cp, folder, monkeypatch, 4, root, idle=("append", "partial", "merge"))


@pytest.mark.parametrize(
    ("shape", "cp"),
    [
        (gqa(8, 1, 128, 4), 1),
        (gqa(8, 1, 72, 4, "float16"), 8),
        (gqa(8, 1, 64, 4, "float32"), 16),
        (mla(16, 4), 64),
        (replace(mla(3, 4), partial_dim=510), 17),  # loads of 4 bytes
        (replace(mla(3, 4), partial_dim=511), 5),  # and of 2
    ],
    ids=lambda value: str(getattr(value, "partial_dim", value)),
)
def test_combine(shape: AttentionShape, cp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """In one batch of parts and in several, with loads of every width."""
    check_combine(combine_ops(shape, cp, tmp_path, monkeypatch), shape, cp, CPU, seed, BOUNDS[shape.dtype])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("largest = most, sum *= rescale;", "largest = most;"),
        ("o[j] *= rescale;", ""),
        ("float most = largest;", "float most = minus_infinity();"),
    ],
)
def test_a_wrong_combine_of_many_parts_is_noticed(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    shape, root = gqa(8, 1, 64, 4, "float32"), planted(tmp_path, [Bug("combine", right, wrong)])
    with pytest.raises(AssertionError):
        check_combine(combine_ops(shape, 40, tmp_path, monkeypatch, root), shape, 40, CPU, seed, 1e-5)


def test_combine_of_partials_that_no_load_fits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = gqa(8, 1, 128, 4)
    o = torch.zeros(2 * 3 * 8 * 128 + 1, dtype=torch.bfloat16)[1:].view(2, 3, 8, 128)
    with pytest.raises(ValueError, match="o does not start at a multiple of 16 bytes"):
        combine_ops(shape, 2, tmp_path, monkeypatch).combine(o, torch.zeros(2, 3, 8))


@pytest.mark.parametrize("shape", APPEND_SHAPES.values(), ids=APPEND_SHAPES.keys())
def test_append_agrees_with_the_oracle(shape: AttentionShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as many tokens as fill no warp, and for none."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    ops = cpu_ops(shape, 1, tmp_path, monkeypatch, 1, only_append=True)
    lengths = [random.Random(seed).randint(0, 9) for _ in range(7)]
    for rows in ([3], lengths, [0, 0]):
        check_append(ops, random_case(shape, rows, CPU, seed), BOUNDS[shape.dtype])


def check_embed(
    dtype: Dtype, hidden: int, folder: Path, monkeypatch: pytest.MonkeyPatch, root: Path | None = None
) -> None:
    """Tokens of this rank's share of the vocabulary, of its borders, and of others' before and after."""
    more = [embed(hidden, dtype, "sm_100a")]
    ops = cpu_ops(gqa(8, 1, 64, 4, dtype), 1, folder, monkeypatch, 2, root, only_append=True, more=more)
    table, tokens = torch.randn(30, hidden).to(getattr(torch, dtype)), torch.tensor([50, 79, 49, 80, 0, 200, 61])
    want = TorchOps(ops.shape).embed(tokens, table, 50)
    assert torch.equal(want[:2], table[[0, -1]]) and not want[2:6].any() and torch.equal(want[6], table[11])
    assert torch.equal(ops.embed(tokens, table, 50), want)


@pytest.mark.parametrize(("dtype", "hidden"), [("bfloat16", 2048), ("float32", 20), ("float16", 104)])
def test_embed(dtype: Dtype, hidden: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_embed(dtype, hidden, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("row >= 0 && row < rows", "row > 0 && row < rows"),
        ("row >= 0 && row < rows", "row >= 0 && row < rows - 1"),
        ("own ? from[i] : Vector16{{0, 0, 0, 0}}", "own ? from[i] : Vector16{{1, 0, 0, 0}}"),
        ("+ row * vectors;", "+ (row ? row - 1 : 0) * vectors;"),
    ],
)
def test_a_wrong_embed_is_noticed(right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = planted(tmp_path, [Bug("embed", right, wrong)])
    with pytest.raises(AssertionError):
        check_embed("bfloat16", 2048, tmp_path, monkeypatch, root)


def test_what_cannot_be_embedded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [embed(64, "bfloat16", "sm_100a")]
    ops = cpu_ops(gqa(8, 1, 64, 4), 1, tmp_path, monkeypatch, 2, only_append=True, more=more)
    table, tokens = torch.zeros(3, 64, dtype=torch.bfloat16), torch.tensor([1, 2])
    for given, message in (
        ((tokens.int(), table), "tokens is int32, expected int64"),
        ((tokens, table[:, :8]), "table has shape"),
        ((tokens, table.float()), "table is float32, expected bfloat16"),
        ((tokens.view(2, 1), table), "tokens has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.embed(*given, 0)


def absorb_ops(
    shape: AttentionShape, nope: int, folder: Path, monkeypatch: pytest.MonkeyPatch, root: Path | None = None
) -> CudaOps:
    """Append of up to 16 tokens, and more by torch's product."""
    more = absorb(shape, nope, 16, "sm_100a")
    return cpu_ops(shape, 1, folder, monkeypatch, 2, root, only_append=True, more=more)


def check_absorb(ops: CudaOps, shape: AttentionShape, nope: int, tokens: int, seed: int) -> None:
    source, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    case = random_case(shape, [source.randint(0, 9) for _ in range(tokens)], CPU, seed)
    check_append(ops, replace(case, new=unabsorbed(case.new, nope, generator)), BOUNDS[shape.dtype])


@pytest.mark.parametrize(
    ("shape", "nope"),
    [(mla(8, 4), 128), (mla(3, 64, kv_dtype="float8_e4m3fn"), 200), (replace(mla(2, 8), interleaved=False), 24)],
    ids=lambda value: str(getattr(value, "heads", value)),
)
def test_absorb_agrees_with_the_oracle(
    shape: AttentionShape, nope: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Few tokens, which one launch serves, and more."""
    ops = absorb_ops(shape, nope, tmp_path, monkeypatch)
    for tokens in (1, 8, 13, 17):
        check_absorb(ops, shape, nope, tokens, seed)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(rest, (warp - keys) * vectors", "(rest, warp * vectors"),
        ("append_query<C, Layout<C>::kPlainChunks>", "append_query<C, Layout<C>::kPlainChunks + 1>"),
        ("int(gridDim.x) - append_blocks", "int(gridDim.x)"),
        ("const int block = int(blockIdx.x) - append_blocks", "const int block = int(blockIdx.x) - append_blocks - 1"),
        ("stride = blocks * kTeams", "stride = int(gridDim.x) * kTeams"),
    ],
)
def test_a_wrong_absorb_is_noticed(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    shape, root = mla(8, 4), planted(tmp_path, [Bug("*", right, wrong)])
    with pytest.raises((AssertionError, KernelFault)):
        check_absorb(absorb_ops(shape, 128, tmp_path, monkeypatch, root), shape, 128, 9, seed)


def test_absorb_of_what_no_load_fits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, generator = mla(2, 4), torch.Generator().manual_seed(0)
    ops, case = absorb_ops(shape, 128, tmp_path, monkeypatch), random_case(shape, [5, 6], CPU, 0)
    new = unabsorbed(case.new, 128, generator)
    for wrong, message in (
        (replace(new, k_up=new.k_up.mT.contiguous().mT), "k_up is not contiguous"),
        (replace(new, k_up=new.k_up.float()), "k_up is float32"),
        (replace(new, k_up=new.k_up[:1]), "k_up has shape"),
        (replace(new, q=new.q[..., 1:]), "q has shape"),
        (replace(new, q=new.q.transpose(1, 2).contiguous().transpose(1, 2)), "q_latent has strides"),
        (replace(new, kv=new.kv.double()), "kv is float64"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.append(wrong, case.cache, case.batch)


def test_padding_writes_nothing_and_its_slots_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    shape = replace(gqa(4, 2, 64, 4, kv_dtype="float8_e4m3fn"), qk_norm=True)
    ops = cpu_ops(shape, 1, tmp_path, monkeypatch, 1, only_append=True)
    case = random_case(shape, [5, 0, 0, 9], CPU, seed)
    slots = case.batch.slots.masked_fill(case.batch.owned == 0, -(1 << 60))
    check_append(ops, replace(case, batch=replace(case.batch, slots=slots)), BOUNDS[shape.dtype])


def test_what_quantizing_makes_of_extremes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros, infinity, NaN, the limits of a scale, subnormals and ties: the bytes that quantize.py makes."""
    shape = gqa(1, 1, 128, 4, "float32", kv_dtype="float8_e4m3fn")
    ops = cpu_ops(shape, 1, tmp_path, monkeypatch, 1, only_append=True)
    largest = [448.0, 448.0001, 2.0**127, 1e-44, -torch.inf, torch.nan, 464.0, 1.0, 0.0]
    case, like = (random_case(shape, [1] * len(largest), CPU, 0) for _ in range(2))
    v = torch.arange(128).sub(64).mul(2.0**-4).repeat(len(largest), 1, 1)  # under the scale of 448, half are ties
    v[1] *= 2.0**-9
    v[..., 5] = torch.tensor(largest).unsqueeze(1)
    v[-1] = 0.0
    assert isinstance(case.new, GqaProjections)
    for each, cache in ((ops, case.cache), (TorchOps(shape), like.cache)):
        batch = replace(case.batch, owned=torch.ones_like(case.batch.owned))
        each.append(replace(case.new, v=v), cache, batch)
    assert case.cache.v is not None and like.cache.v is not None
    assert case.cache.v_scale is not None and like.cache.v_scale is not None
    assert torch.equal(case.cache.v_scale, like.cache.v_scale)
    got, want = (cache.v.view(torch.uint8) for cache in (case.cache, like.cache))
    nan = want & 0x7F == 0x7F  # of either sign
    assert torch.equal(got[~nan], want[~nan]) and (got[nan] & 0x7F == 0x7F).all()


def test_append_of_strides_that_no_load_fits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = mla(2, 4)
    ops, case = cpu_ops(shape, 1, tmp_path, monkeypatch, 1, only_append=True), random_case(shape, [5, 6], CPU, 0)
    assert isinstance(case.new, MlaProjections)
    wide = torch.zeros(2, 576 + 8, dtype=torch.bfloat16)
    odd = torch.zeros(2, 576 + 3, dtype=torch.bfloat16)
    ops.append(replace(case.new, kv=wide[:, :576]), case.cache, case.batch)
    for new, message in (
        (replace(case.new, kv=odd[:, :576]), r"kv has strides \(579, 1\), expected multiples of 8 and then 1"),
        (replace(case.new, kv=wide[:, 4:580]), "kv does not start at a multiple of 16 bytes"),
        (replace(case.new, q_rope=case.new.q_rope.transpose(1, 2).contiguous().transpose(1, 2)), "q_rope has strides"),
        (replace(case.new, norm=case.new.norm.float()), "norm is float32, expected bfloat16"),
        (replace(case.new, norm=case.new.norm.repeat(2)[::2]), r"norm has strides \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.append(new, case.cache, case.batch)
    with pytest.raises(ValueError, match="cos does not start at a multiple of 16 bytes"):
        cos = torch.zeros(2 * 32 + 1)[1:].view(2, 32)
        ops.append(case.new, case.cache, replace(case.batch, cos=cos))


MLA, QWEN3 = "mla fp8", "qwen3 fp8"


@pytest.mark.parametrize(
    ("shape", "right", "wrong"),
    [
        (MLA, "/ L::kNormed + C::norm_eps", "/ L::kNormed"),
        (QWEN3, "/ L::kNormed + C::norm_eps", "/ L::kNormed + 0.1f * C::norm_eps"),
        (MLA, "kNormed = C::mla ? kPlain : C::head_dim", "kNormed = C::head_dim"),
        (QWEN3, "from_float<Element>(to_float(weight.chunks[chunk].items[i]) * to_float(normed))", "normed"),
        (QWEN3, "load<C, L::kNormedChunks>(a.k_norm, a.k_norm", "load<C, L::kNormedChunks>(a.q_norm, a.q_norm"),
        (MLA, "? 2 * pair + 1 : pair]", "? 2 * pair ^ 3 : pair]"),
        (QWEN3, "first + L::kRunChunks", "first"),
        (QWEN3, "b * cos + a * sin", "b * cos - a * sin"),
        ("llama", "if (active) store<C, kFirst>(a.q_out", "if (active && a.owned[row]) store<C, kFirst>(a.q_out"),
        ("llama", "Destination{a.owned[row] != 0, a.slots[row]}", "Destination{true, a.slots[row]}"),
        (MLA, "Destination{a.owned[row] != 0, a.slots[row]}", "Destination{true, a.slots[row]}"),
        (MLA, "scales + token, vector", "scales + token / 2, vector"),
        (MLA, "chunk < Layout<C>::kChunks; ++chunk) largest", "chunk < 1; ++chunk) largest"),
        (MLA, "u8 byte = scale_of(warp_max_bits<C::lanes>(largest))", "u8 byte = scale_of(largest)"),
        (MLA, "0x7fffffu - 0x600000u", "0x7fffffu"),
        (MLA, "254 - int(scale)", "255 - int(scale)"),
        ("llama", "slot % C::block", "(slot + 1) % C::block"),
        ("llama", "a.cache_v, a.v_scale, to.slot, kv_head", "a.cache_v, a.v_scale, to.slot, 0"),
    ],
)
def test_a_wrong_append_is_noticed(
    shape: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = planted(tmp_path, [Bug("*", right, wrong)])
    seed = random.randrange(1 << 30)
    print("seed", seed)
    ops = cpu_ops(APPEND_SHAPES[shape], 1, tmp_path, monkeypatch, 1, root, only_append=True)
    with pytest.raises(AssertionError):
        many = [5, 9, 0, 70, 8] * 20  # a wrong scale shows in one vector of five
        check_append(ops, random_case(APPEND_SHAPES[shape], many, CPU, seed), BOUNDS[APPEND_SHAPES[shape].dtype])


@pytest.mark.parametrize(("dtype", "hidden"), [("float32", 96), ("bfloat16", 1032)])
def test_add_norm(dtype: Dtype, hidden: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The reduction of one rank's summand, with and without each of its optional inputs."""
    shape, eps = gqa(4, 2, 64, 4, dtype), 1e-5
    others = [reduce(members, hidden, eps, dtype, "sm_100a") for members in (1, 2)]  # one is not for CudaOps
    ops = cpu_ops(shape, 1, tmp_path, monkeypatch, 4, only_append=True, more=others)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(getattr(torch, dtype))

    x, residual, bias, norm = normal(5, hidden), normal(5, hidden), normal(hidden), Norm(normal(hidden), eps)
    for given in ((residual, bias, norm), (None, None, norm), (residual, None, None)):
        wide = [t.double() if t is not None else None for t in given[:2]]
        exact = TorchOps(shape).add_norm(x.double(), *wide, Norm(norm.weight.double(), eps) if given[2] else None)
        for got, want in zip(ops.add_norm(x, *given), exact, strict=True):
            assert relative_error(got, want) <= BOUNDS[dtype]
    for wrong, message in (
        ((x[:, 1:], None, None, None), "x is not contiguous"),
        ((x, None, None, Norm(norm.weight, 2e-5)), f"no kernel adds and norms {hidden} columns with 2e-05"),
        ((normal(5, 2 * hidden), None, None, None), f"no kernel adds and norms {2 * hidden} columns with None"),
        ((x, residual.double(), None, None), "residual is float64"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.add_norm(*wrong)


@pytest.mark.parametrize("columns", [1001, 4000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_argmax(dtype: Dtype, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """One rank's: of equal logits the first, NaN before all; where the caller wants it."""
    shape = gqa(4, 2, 64, 4, dtype)
    others = [argmax(members, dtype, "sm_100a") for members in (2, 1)]  # one is not for CudaOps
    ops = cpu_ops(shape, 1, tmp_path, monkeypatch, 4, only_append=True, more=others)
    x = torch.randint(-99, 100, (6, columns), generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    x[1, columns // 2], x[2] = torch.nan, -torch.inf
    field = torch.full((3, len(x)), -1)
    assert ops.argmax(x, field[1]) is not None and torch.equal(field[1], x.float().argmax(-1))
    assert torch.equal(ops.argmax(x), field[1]) and bool((field[::2] == -1).all())
    for wrong, message in (
        ((x[:, 1:], None), "x is not contiguous"),
        ((x.double(), None), f"x is float64, expected {dtype}"),
        ((x, field[:, 1]), r"out has shape \[3\], expected \[6\]"),
        ((x, field.int()[0]), "out is torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.argmax(*wrong)
