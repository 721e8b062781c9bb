"""A kernel problem: which template, specialised on what, for which architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ffn_shape import EIGHTS, FfnShape, team_of
from helixc_runtime.manifest import Dtype, Model, Moe
from helixc_runtime.switches import read_switches

Param = int | float | str | bool
Params = tuple[tuple[str, Param], ...]

MOST_EXPERTS = 256  # of one rank: whom they serve has to fit beside the sums in static shared memory
LINEAR_TEAMS = (1, 2, 4, 8)  # warps that share a tile's columns: a choice for each number of columns
_MOST_QUERIES, _MOST_SHARES = 16, 8  # of a thread block of Hopper's GQA kernel; of the queries that read one KV head
_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float8_e4m3fn": "f8"}


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One specialised kernel to build. `name` is its entry point and is unique among a plan's problems."""

    name: str
    template: str  # kernels/<template>.cu.j2
    params: Params
    arch: str


def problems(shape: AttentionShape, cp: int, arch: str) -> tuple[KernelSpec, ...]:
    """The kernels that decoding `shape` needs on each of `cp` ranks.

    Also with cp = 1, so that every deployment runs the same steps; its combine merges one partial. HELIXC_PORTABLE=1
    chooses as if Hopper had no kernels of its own.
    """
    return _problems(shape, cp, arch, read_switches().portable)


@lru_cache(maxsize=256)
def _problems(shape: AttentionShape, cp: int, arch: str, portable: bool) -> tuple[KernelSpec, ...]:
    attend = (_partial(shape, arch), _merge(shape, arch)) if portable else attention(shape, arch)
    return _append(shape, arch), *attend, _combine(shape, cp, arch)


def attention(shape: AttentionShape, arch: str) -> tuple[KernelSpec, ...]:
    """The kernels of Ops.attend: Hopper's own where they serve the shape, else the portable ones."""
    if arch == "sm_90a" and _hopper_mla(shape):
        return _mla_schedule(shape, arch), _mla_partial(shape, arch), _mla_merge(shape, arch)
    if arch == "sm_90a" and _hopper_gqa(shape):
        return _gqa_schedule(shape, arch), _gqa_partial(shape, arch)
    return _partial(shape, arch), _merge(shape, arch)


def exchange(shape: AttentionShape, cp: int, arch: str) -> KernelSpec:
    """The exchange among `cp` ranks that write into each other's memory, and the merge of what arrives."""
    heads = shape.heads // cp
    params: Params = (
        ("cp", cp),
        ("out_heads", heads),
        ("partial_dim", shape.exchanged_dim),
        ("dtype", shape.dtype),
    )
    name = f"exchange_cp{cp}_h{heads}_p{shape.exchanged_dim}_{_SHORT[shape.dtype]}"
    return KernelSpec(name, "exchange", params, arch)


def merge_exchange(shape: AttentionShape, cp: int, arch: str) -> KernelSpec:
    """The same, and the merge of a rank's own splits as they are sent: a launch and a trip through memory less."""
    plain, tokens = exchange(shape, cp, arch), _row_tokens(shape)
    params: Params = (*plain.params, ("row_tokens", tokens))
    return KernelSpec(f"merge_{plain.name}{_several(tokens)}", "merge_exchange", params, arch)


def merges_as_it_sends(shape: AttentionShape, arch: str) -> bool:
    """Whether the exchange of `shape` is merge_exchange: for Hopper's MLA, where latents are exchanged.

    Its GQA merges within attention's own launch, and the portable kernels' splits lie otherwise.
    """
    return arch == "sm_90a" and _hopper_mla(shape) and shape.value_dim is None and not read_switches().portable


def handoff(model: Model, block: int, arch: str) -> KernelSpec:
    """A prompt's KV, of any context rank, into the pages of any generation rank."""
    dim, cached = model.arch.head_dim, model.kv_dtype
    params: Params = (("head_dim", dim), ("block", block), ("dtype", model.dtype), ("kv_dtype", cached))
    kept = "" if cached == model.dtype else f"_kv{_SHORT[cached]}"
    return KernelSpec(f"handoff_d{dim}_b{block}_{_SHORT[model.dtype]}{kept}", "handoff", params, arch)


def batch(shape: AttentionShape, factor: float, arch: str) -> KernelSpec:
    """What a step derives from its rows' positions; `factor` multiplies cos and sin."""
    params: Params = (("rope_dim", shape.rope_dim), ("block", shape.block), ("factor", factor))
    return KernelSpec(f"batch_r{shape.rope_dim}_b{shape.block}", "batch", params, arch)


def reduce(members: int, hidden: int, eps: float, dtype: Dtype, arch: str) -> KernelSpec:
    """The sum over `members` ranks that write into each other's memory, added to the residual stream and normed."""
    params: Params = (("members", members), ("hidden", hidden), ("eps", eps), ("dtype", dtype))
    return KernelSpec(f"reduce_n{members}_d{hidden}_{_SHORT[dtype]}", "reduce", params, arch)


def argmax(members: int, dtype: Dtype, arch: str) -> KernelSpec:
    """The tokens of the largest logits, whose columns `members` ranks share that write into each other's memory."""
    return KernelSpec(f"argmax_n{members}_{_SHORT[dtype]}", "argmax", (("members", members), ("dtype", dtype)), arch)


def embed(hidden: int, dtype: Dtype, arch: str) -> KernelSpec:
    """A step's tokens as the rows that a rank's share of the vocabulary has for them."""
    return KernelSpec(f"embed_d{hidden}_{_SHORT[dtype]}", "embed", (("hidden", hidden), ("dtype", dtype)), arch)


def absorb(shape: AttentionShape, nope: int, max_tokens: int, arch: str) -> tuple[KernelSpec, ...]:
    """Append of up to `max_tokens` tokens together with the product of W_UK, whose columns are `nope`; none for GQA.

    What it takes is what the kernels of `ffn` take.
    """
    if not (shape.is_mla and shape.dtype == "bfloat16" and nope % 8 == 0 and shape.partial_dim % 8 == 0):
        return ()
    whole = _append(shape, arch)
    name = whole.name.replace("append_", "absorb_")

    def of(eights: int) -> KernelSpec:
        product: Params = (("nope", nope), ("eights", eights), ("team", team_of(nope)))
        return KernelSpec(f"{name}_n{8 * eights}", "absorb", (*whole.params, *product), arch)

    return tuple(of(eights) for eights in EIGHTS if eights == 1 or 8 * (eights - 1) < max_tokens)


@lru_cache(maxsize=256)
def ffn(shape: FfnShape, max_rows: int, arch: str) -> tuple[KernelSpec, ...]:
    """The kernels of Ops.mlp, Ops.mixture and Ops.linear for up to `max_rows` tokens; none where torch serves better.

    They take bfloat16, and widths that are whole loads of 16 bytes. More tokens than EIGHTS has are torch's.
    """
    widths = (shape.hidden, shape.dense_columns, shape.expert_columns, shape.shared_columns)
    if shape.dtype != "bfloat16" or any(width % 8 for width in widths) or shape.local_experts > MOST_EXPERTS:
        return ()
    eights = [n for n in EIGHTS if n == 1 or 8 * (n - 1) < max_rows]
    found = [_linear(team, n, arch) for n in eights for team in LINEAR_TEAMS]
    if shape.dense_columns:
        found += [spec for n in eights for spec in _gated(shape.hidden, shape.dense_columns, None, n, arch)]
    if shape.moe and shape.local_experts:
        found.append(_router(shape.moe, shape.hidden, arch))
        found += [spec for n in eights for spec in _gated(shape.hidden, shape.shared_columns, shape, n, arch)]
    return tuple(found)


def _linear(team: int, eights: int, arch: str) -> KernelSpec:
    return KernelSpec(f"linear_w{team}_n{8 * eights}", "linear", (("team", team), ("eights", eights)), arch)


def _router(moe: Moe, hidden: int, arch: str) -> KernelSpec:
    params: Params = (("experts", moe.experts), ("hidden", hidden))
    return KernelSpec(f"router_e{moe.experts}_d{hidden}", "router", params, arch)


def _gated(hidden: int, always: int, mixture: FfnShape | None, eights: int, arch: str) -> tuple[KernelSpec, KernelSpec]:
    """The two kernels of a gated MLP, or of a mixture of them with or without shared experts."""
    moe = mixture.moe if mixture else None
    params: Params = (
        ("hidden", hidden),
        ("always_columns", always),
        ("expert_columns", mixture.expert_columns if mixture else 0),
        ("experts", moe.experts if moe else 0),
        ("local_experts", mixture.local_experts if mixture else 0),
        ("top_k", moe.top_k if moe else 0),
        ("sigmoid", moe is not None and moe.scoring == "sigmoid"),
        ("top2_sum", moe is not None and moe.group_score == "top2_sum"),
        ("normalize", moe is not None and moe.normalize),
        ("groups", moe.groups if moe else 1),
        ("top_groups", moe.top_groups if moe else 1),
        ("route_scale", float(moe.scale) if moe else 1.0),
        ("eights", eights),
    )
    dims = f"d{hidden}_i{always}" if always else f"d{hidden}"
    if mixture and moe:
        dims += f"_e{mixture.local_experts}of{moe.experts}k{moe.top_k}_i{mixture.expert_columns}"
    up, down = (KernelSpec(f"{name}_{dims}_n{8 * eights}", name, params, arch) for name in ("gate_up", "down"))
    return up, down


def norm(width: int, eps: float, dtype: Dtype, arch: str) -> KernelSpec:
    """The RMSNorm of a projection: a reduction of one rank, under a name that none of the hidden states has."""
    return replace(reduce(1, width, eps, dtype, arch), name=f"norm_d{width}_{_SHORT[dtype]}")


def _hopper_mla(shape: AttentionShape) -> bool:
    dims = (shape.head_dim, shape.partial_dim) == (576, 512)
    sizes = shape.heads in range(8, 129, 8) and shape.query_tokens in (1, 2, 3, 4) and shape.block in (32, 64)
    cached = shape.dtype == "bfloat16" and shape.kv_dtype in ("bfloat16", "float8_e4m3fn")
    return cached and shape.is_mla and dims and sizes


def _hopper_gqa(shape: AttentionShape) -> bool:
    fp8 = shape.kv_dtype == "float8_e4m3fn"
    tile = 128 if fp8 else 64  # tokens: pages of 16 and more whose boxes of the copy engine fill it, or parts of pages
    pages = shape.block % tile == 0 or shape.block in (16, 32, 64)
    dtypes = _all_bfloat16(shape) or (fp8 and shape.dtype == "bfloat16")
    return dtypes and not shape.is_mla and shape.head_dim in (64, 128) and pages and _gqa_shares(shape) <= _MOST_SHARES


def _all_bfloat16(shape: AttentionShape) -> bool:
    return shape.dtype == shape.kv_dtype == "bfloat16"


def _mla_schedule(shape: AttentionShape, arch: str) -> KernelSpec:
    tokens = _row_tokens(shape)
    return KernelSpec("mla_schedule" + _several(tokens), "mla_schedule", (("row_tokens", tokens),), arch)


def _mla_partial(shape: AttentionShape, arch: str) -> KernelSpec:
    row, cluster = _row_tokens(shape), _cluster_tokens(shape)
    tokens: Params = (("query_tokens", shape.query_tokens), ("row_tokens", row), ("cluster_tokens", cluster))
    params: Params = (*_heads(shape), ("partial_dim", shape.partial_dim), ("scale", shape.scale), *tokens)
    template = "mla_partial" if shape.kv_dtype == "bfloat16" else "mla_fp8_partial"
    name = f"{template}_h{shape.heads}{_several(shape.query_tokens)}_b{shape.block}"
    return KernelSpec(name, template, params, arch)


def _mla_merge(shape: AttentionShape, arch: str) -> KernelSpec:
    tokens = _row_tokens(shape)
    params: Params = (("heads", shape.heads), ("partial_dim", shape.partial_dim), ("row_tokens", tokens))
    return KernelSpec(f"mla_merge_h{shape.heads}{_several(tokens)}", "mla_merge", params, arch)


def _row_tokens(shape: AttentionShape) -> int:
    """Query tokens that are one row of the schedule, read by a team of clusters at the same time: all, or two of four.

    So the team reads memory once. Teams of two and three leave no multiprocessor out; of four, four of 132 would be.
    """
    cluster = _cluster_tokens(shape)
    clusters = shape.query_tokens // cluster
    return cluster * (clusters if clusters <= 3 else 2)


def _cluster_tokens(shape: AttentionShape) -> int:
    """Query tokens of one cluster: as many, a divisor of all, as have 128 heads.

    A warp computes 16 of them, of one token.
    """
    if shape.heads % 16:
        return 1
    return max(n for n in range(1, shape.query_tokens + 1) if shape.query_tokens % n == 0 and shape.heads * n <= 128)


def _gqa_share(shape: AttentionShape) -> tuple[int, int]:
    """Query tokens and heads of a group that one thread block serves: as many as its products take.

    The last share of tokens may be smaller; those of heads are not.
    """
    heads = max(n for n in range(1, _MOST_QUERIES + 1) if shape.group % n == 0)
    shares = -(-shape.query_tokens // (_MOST_QUERIES // heads))
    return -(-shape.query_tokens // shares), heads


def _gqa_shares(shape: AttentionShape) -> int:
    """Thread blocks that read the same tokens."""
    tokens, heads = _gqa_share(shape)
    return shape.group // heads * -(-shape.query_tokens // tokens)


def _gqa_schedule(shape: AttentionShape, arch: str) -> KernelSpec:
    params: Params = (*_heads(shape), *_gqa_queries(shape))
    return KernelSpec(f"gqa_schedule_{_gqa_dims(shape)}", "gqa_schedule", params, arch)


def _gqa_partial(shape: AttentionShape, arch: str) -> KernelSpec:
    params: Params = (
        *_heads(shape),
        *_gqa_queries(shape),
        ("partial_dim", shape.partial_dim),
        ("scale", shape.scale),
    )
    return KernelSpec(f"gqa_partial_{_gqa_dims(shape)}", "gqa_partial", params, arch)


def _gqa_queries(shape: AttentionShape) -> Params:
    tokens, heads = _gqa_share(shape)
    share: Params = (("share_tokens", tokens), ("share_heads", heads), ("shares", _gqa_shares(shape)))
    return ("query_tokens", shape.query_tokens), *share


def _gqa_dims(shape: AttentionShape) -> str:
    heads = f"h{shape.heads}_kv{shape.kv_heads}"
    return f"{heads}_d{shape.head_dim}_b{shape.block}{_cached(shape)}{_several(shape.query_tokens)}"


def _append(shape: AttentionShape, arch: str) -> KernelSpec:
    dims = _dims(shape, f"d{shape.head_dim}_r{shape.rope_dim}")
    rope: Params = (("rope_dim", shape.rope_dim), ("interleaved", shape.interleaved))
    norm: Params = (("qk_norm", shape.qk_norm), ("norm_eps", shape.norm_eps))
    return KernelSpec(f"append_{dims}", "append", (*_heads(shape), *rope, *norm), arch)


def _partial(shape: AttentionShape, arch: str) -> KernelSpec:
    dims = _dims(shape, f"d{shape.head_dim}")
    params: Params = (
        *_heads(shape),
        ("partial_dim", shape.partial_dim),
        ("query_tokens", shape.query_tokens),
        ("scale", shape.scale),
    )
    return KernelSpec(f"partial_{dims}{_several(shape.query_tokens)}", "partial", params, arch)


def _merge(shape: AttentionShape, arch: str) -> KernelSpec:
    params: Params = (("partial_dim", shape.partial_dim), ("dtype", shape.dtype))
    return KernelSpec(f"merge_p{shape.partial_dim}_{_SHORT[shape.dtype]}", "merge", params, arch)


def _combine(shape: AttentionShape, cp: int, arch: str) -> KernelSpec:
    params: Params = (("cp", cp), ("partial_dim", shape.exchanged_dim), ("dtype", shape.dtype))
    return KernelSpec(f"combine_cp{cp}_p{shape.exchanged_dim}_{_SHORT[shape.dtype]}", "combine", params, arch)


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
    return f"{heads}_{widths}_b{shape.block}_{_SHORT[shape.dtype]}{_cached(shape)}"


def _cached(shape: AttentionShape) -> str:
    """The part of a name that says the cache's dtype, if it has its own."""
    return "" if shape.kv_dtype == shape.dtype else f"_kv{_SHORT[shape.kv_dtype]}"


def _several(tokens: int) -> str:
    """The part of a name that says how many query tokens, if several."""
    return "" if tokens == 1 else f"_q{tokens}"
