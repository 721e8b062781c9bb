"""A kernel problem: which template, specialised on what, for which architecture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.manifest import Dtype

Param = int | float | str | bool
Params = tuple[tuple[str, Param], ...]

_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One specialised kernel to build. `name` is its entry point and is unique among a plan's problems."""

    name: str
    template: str  # kernels/<template>.cu.j2
    params: Params
    arch: str


@lru_cache(maxsize=256)
def problems(shape: AttentionShape, cp: int, arch: str) -> tuple[KernelSpec, ...]:
    """The kernels that decoding `shape` needs on each of `cp` ranks.

    Also with cp = 1, so that every deployment runs the same steps; its combine merges one partial.
    """
    return _append(shape, arch), *attention(shape, arch), _combine(shape, cp, arch)


def attention(shape: AttentionShape, arch: str) -> tuple[KernelSpec, ...]:
    """The kernels of Ops.attend: Hopper's own where they serve the shape, else the portable ones."""
    if arch == "sm_90a" and _hopper_mla(shape):
        return _mla_schedule(arch), _mla_partial(shape, arch), _mla_merge(shape, arch)
    if arch == "sm_90a" and _hopper_gqa(shape):
        return _gqa_schedule(shape, arch), _gqa_partial(shape, arch)
    return _partial(shape, arch), _merge(shape, arch)


def exchange(shape: AttentionShape, cp: int, arch: str) -> KernelSpec:
    """The exchange among `cp` ranks that write into each other's memory, and the merge of what arrives."""
    heads = shape.heads // cp
    params: Params = (
        ("cp", cp),
        ("out_heads", heads),
        ("partial_dim", shape.partial_dim),
        ("dtype", shape.dtype),
    )
    name = f"exchange_cp{cp}_h{heads}_p{shape.partial_dim}_{_SHORT[shape.dtype]}"
    return KernelSpec(name, "exchange", params, arch)


def reduce(members: int, hidden: int, eps: float, bias: bool, dtype: Dtype, arch: str) -> KernelSpec:
    """The sum over `members` ranks that write into each other's memory, added to the residual stream and normed."""
    params: Params = (("members", members), ("hidden", hidden), ("eps", eps), ("bias", bias), ("dtype", dtype))
    name = f"reduce_n{members}_d{hidden}{'_bias' if bias else ''}_{_SHORT[dtype]}"
    return KernelSpec(name, "reduce", params, arch)


def _hopper_mla(shape: AttentionShape) -> bool:
    dims = (shape.head_dim, shape.partial_dim) == (576, 512)
    return (
        _all_bfloat16(shape) and shape.is_mla and dims and shape.heads in (16, 32, 64, 128) and shape.block in (32, 64)
    )


def _hopper_gqa(shape: AttentionShape) -> bool:
    pages = shape.block % 64 == 0 or shape.block in (16, 32)  # boxes of the copy engine that fill a tile of 64 tokens
    return _all_bfloat16(shape) and not shape.is_mla and shape.head_dim in (64, 128) and shape.group <= 16 and pages


def _all_bfloat16(shape: AttentionShape) -> bool:
    return shape.dtype == shape.kv_dtype == "bfloat16"


def _mla_schedule(arch: str) -> KernelSpec:
    return KernelSpec("mla_schedule", "mla_schedule", (), arch)


def _mla_partial(shape: AttentionShape, arch: str) -> KernelSpec:
    params: Params = (*_heads(shape), ("partial_dim", shape.partial_dim), ("scale", shape.scale))
    return KernelSpec(f"mla_partial_h{shape.heads}_b{shape.block}", "mla_partial", params, arch)


def _mla_merge(shape: AttentionShape, arch: str) -> KernelSpec:
    params: Params = (("heads", shape.heads), ("partial_dim", shape.partial_dim))
    return KernelSpec(f"mla_merge_h{shape.heads}", "mla_merge", params, arch)


def _gqa_schedule(shape: AttentionShape, arch: str) -> KernelSpec:
    return KernelSpec(f"gqa_schedule_{_gqa_dims(shape)}", "gqa_schedule", _heads(shape), arch)


def _gqa_partial(shape: AttentionShape, arch: str) -> KernelSpec:
    params: Params = (*_heads(shape), ("partial_dim", shape.partial_dim), ("scale", shape.scale))
    return KernelSpec(f"gqa_partial_{_gqa_dims(shape)}", "gqa_partial", params, arch)


def _gqa_dims(shape: AttentionShape) -> str:
    return f"h{shape.heads}_kv{shape.kv_heads}_d{shape.head_dim}_b{shape.block}"


def _append(shape: AttentionShape, arch: str) -> KernelSpec:
    dims = _dims(shape, f"d{shape.head_dim}_r{shape.rope_dim}")
    params: Params = (*_heads(shape), ("rope_dim", shape.rope_dim), ("interleaved", shape.interleaved))
    return KernelSpec(f"append_{dims}", "append", params, arch)


def _partial(shape: AttentionShape, arch: str) -> KernelSpec:
    dims = _dims(shape, f"d{shape.head_dim}")
    params: Params = (*_heads(shape), ("partial_dim", shape.partial_dim), ("scale", shape.scale))
    return KernelSpec(f"partial_{dims}", "partial", params, arch)


def _merge(shape: AttentionShape, arch: str) -> KernelSpec:
    params: Params = (("partial_dim", shape.partial_dim), ("dtype", shape.dtype))
    return KernelSpec(f"merge_p{shape.partial_dim}_{_SHORT[shape.dtype]}", "merge", params, arch)


def _combine(shape: AttentionShape, cp: int, arch: str) -> KernelSpec:
    params: Params = (("cp", cp), ("partial_dim", shape.partial_dim), ("dtype", shape.dtype))
    return KernelSpec(f"combine_cp{cp}_p{shape.partial_dim}_{_SHORT[shape.dtype]}", "combine", params, arch)


def _heads(shape: AttentionShape) -> Params:
    return (
        ("mla", shape.is_mla),
        ("heads", shape.heads),
        ("kv_heads", shape.kv_heads),
        ("head_dim", shape.head_dim),
        ("block", shape.block),
        ("dtype", shape.dtype),
        ("kv_dtype", shape.kv_dtype),
    )


def _dims(shape: AttentionShape, widths: str) -> str:
    """The part of a name that says heads, widths, block and dtypes, such as mla_h64_d576_b32_bf16."""
    heads = f"mla_h{shape.heads}" if shape.is_mla else f"gqa_h{shape.heads}_kv{shape.kv_heads}"
    cached = "" if shape.kv_dtype == shape.dtype else f"_kv{_SHORT[shape.kv_dtype]}"
    return f"{heads}_{widths}_b{shape.block}_{_SHORT[shape.dtype]}{cached}"
