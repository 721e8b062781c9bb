"""The boundary between compiler and runtime: plan.json as frozen dataclasses, and the ownership formulas.

Both sides import this module, so it uses the standard library only. Ranges are half-open `(lo, hi)`.
Words and formulas follow the Helix semantics page (docs/helix.md).
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1

Range = tuple[int, int]
Dtype = Literal["float32", "bfloat16", "float16"]
KvDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]  # float8: with scales, see quantize.py
Role = Literal["context", "generation"]
Transport = Literal["one_sided", "collective"]
Space = Literal["latent", "value"]  # of partials: before or after W_UV. GQA's are values
Handoff = Literal["peer", "host"]

PAGE_BYTES = 4  # of a page's number, as a receiver tells it to a peer
REPLY_BYTES = 256  # of a peer's answer, see handoff.py
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


def scale_bytes(kv_dtype: str) -> int:
    """The scale of one cached vector, of a token and KV head: one byte if the cache is FP8, else none."""
    return int(kv_dtype == "float8_e4m3fn")


def split(size: int, parts: int, index: int) -> Range:
    """Part `index` of `size` elements in `parts` contiguous parts; the first `size % parts` get one more."""
    share, rest = divmod(size, parts)
    lo = index * share + min(index, rest)
    return lo, lo + share + (index < rest)


# --- Who owns a token -------------------------------------------------------------------------------------------


Index = TypeVar("Index", int, "Tensor")  # one position, or an integer tensor of them


def owner(position: Index, block: int, cp: int) -> Index:
    """The cp rank that stores the K/V of global `position`: block-cyclic over `cp` ranks, `block` tokens a block."""
    return position // block % cp


def local_length(total: int, block: int, cp: int, rank: int) -> int:
    """How many of the first `total` global positions cp rank `rank` owns."""
    cycles, rest = divmod(total, block * cp)
    return cycles * block + min(max(rest - rank * block, 0), block)


def local_slot(position: Index, block: int, cp: int) -> Index:
    """Index of global `position` inside its owner's shard (equals `local_length(position, ..., owner)`)."""
    return position // (block * cp) * block + position % block


def global_position(slot: int, block: int, cp: int, rank: int) -> int:
    """Inverse of `local_slot` on cp rank `rank`."""
    return (slot // block * cp + rank) * block + slot % block


# --- The model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding. `interleaved` pairs (2i, 2i+1) (DeepSeek); otherwise (i, i + dim/2) (Llama, Qwen3)."""

    theta: float
    interleaved: bool
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: round the correction range to whole dims
    attention_factor: float = 1.0  # multiplies cos and sin
    softmax_factor: float = 1.0  # multiplies the softmax scale (DeepSeek's yarn mscale_all_dim, squared)


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention. `q_lora_rank` None: queries come from one full projection."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True)
class Moe:
    """Mixture-of-experts routing and sizes; `layers` are the MoE layers, all others are dense."""

    layers: tuple[int, ...]
    experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int  # all shared experts together; 0: none
    scoring: Literal["softmax", "sigmoid"]
    correction_bias: bool  # added to the scores for the choice only (V3)
    groups: int  # 1: no group limit
    top_groups: int
    group_score: Literal["max", "top2_sum"]
    normalize: bool  # divide the chosen weights by their sum
    scale: float  # routed_scaling_factor


@dataclass(frozen=True, slots=True)
class ModelArch:
    """Geometry of a decoder-only model. For MLA, num_kv_heads is 1 and head_dim is latent + rope."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope: Rope
    mla: Mla | None
    moe: Moe | None
    qk_norm: bool
    attention_bias: bool
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]

    @property
    def rope_dim(self) -> int:
        """Dims of the query and key that are rotated: the last ones of `head_dim`."""
        return self.mla.qk_rope_head_dim if self.mla else self.head_dim

    @property
    def partial_dim(self) -> int:
        """Width of a partial: the latent for MLA, else head_dim."""
        return self.mla.kv_lora_rank if self.mla else self.head_dim

    def exchanged_dim(self, space: Space) -> int:
        """Width of a partial as the cp ranks exchange it."""
        return self.mla.v_head_dim if self.mla and space == "value" else self.partial_dim

    @property
    def kv_width(self) -> int:
        """Elements cached per token, layer and KV head."""
        return self.head_dim if self.mla else 2 * self.head_dim

    def kv_bytes(self, kv_dtype: KvDtype) -> int:
        """Bytes cached per token, layer and KV head: the elements and, of an FP8 cache, their scales."""
        vectors = 1 if self.mla else 2
        return self.kv_width * DTYPE_BYTES[kv_dtype] + vectors * scale_bytes(kv_dtype)

    @property
    def softmax_scale(self) -> float:
        dim = self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim if self.mla else self.head_dim
        return float(dim**-0.5 * self.rope.softmax_factor)

    def is_moe(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers


@dataclass(frozen=True, slots=True)
class Model:
    """What is served: where the weights come from, in which dtype, and the geometry."""

    name: str  # built-in name or the checkpoint folder's name
    checkpoint: str | None  # absolute folder, None for a built-in geometry
    load_format: Literal["auto", "dummy"]
    seed: int  # of dummy weights
    dtype: Dtype
    kv_dtype: KvDtype
    arch: ModelArch

    @property
    def kv_bytes(self) -> int:
        """Bytes that a generation rank caches per token, layer and KV head."""
        return self.arch.kv_bytes(self.kv_dtype)

    @property
    def rounds(self) -> bool:
        """Whether anything is kept in less than float32, so that results depend on where it is rounded."""
        return not self.dtype == self.kv_dtype == "float32"


# --- The plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hop:
    """HOP-B: the rows of a decode step in groups, and the exchange of each under the attention of the next."""

    groups: int  # 1: off
    rows: int  # of a batch, padding included: smaller ones are not split
    processors: int  # of a GPU, that the attention of all groups but the first leaves to the exchange
    reason: str  # for people


WITHOUT_HOP = Hop(1, 1, 0, "")


@dataclass(frozen=True, slots=True)
class Instance:
    """One model replica. `ranks` are global; max_seq_len counts prompt and generated tokens of one request.

    A generation rank's KV pool may take at most free_gpu_memory_fraction of what is free once the weights are loaded.
    One-sided: on GPUs, kernels write into the memory of the other ranks of a group, which all share a host.

    Peer: context ranks write a prompt's KV into the pages of those generation ranks that share their host (`shares`).
    """

    role: Role
    index: int
    ranks: tuple[int, ...]
    tp: int
    cp: int
    pp: int
    moe_tp: int
    moe_ep: int
    attention_dp: bool
    max_batch_size: int
    max_seq_len: int
    free_gpu_memory_fraction: float
    exchange: Transport  # in the cp groups
    reduce_rows: int  # decode batches up to this are summed in the ffn_tp groups one-sidedly, larger ones collectively
    hop: Hop
    handoff: Handoff  # how a context instance's KV leaves it; "host" where nothing does


@dataclass(frozen=True, slots=True)
class Groups:
    """Global ranks of every group a rank is in, itself included. ffn_*, moe_*: after repurposing."""

    tp: tuple[int, ...]
    cp: tuple[int, ...]
    pp: tuple[int, ...]
    ffn_tp: tuple[int, ...]
    moe_tp: tuple[int, ...]
    moe_ep: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank, except kv_capacity_tokens (tokens of its local shard)."""

    weights: int
    kv_per_token: int
    kv_capacity_tokens: int
    workspace: int
    total: int


@dataclass(frozen=True, slots=True)
class Rank:
    """Everything one process needs to know of itself. `shard` indexes Plan.shards."""

    rank: int
    role: Role
    instance: int
    local_rank: int  # in the instance
    node: int
    device: int
    pp_rank: int
    tp_rank: int
    cp_rank: int
    ffn_tp_rank: int
    moe_tp_rank: int
    moe_ep_rank: int
    groups: Groups
    layers: Range
    q_heads: Range  # attended before the exchange
    kv_heads: Range
    out_heads: Range  # held after the exchange; also the row shard of o_proj
    exchange_space: Space  # MLA: W_UV is of out_heads if latent, of q_heads if value
    experts: Range | None
    shard: int
    memory: Memory
    kernels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One slice of a checkpoint tensor, or of a family of them.

    `tensor` may hold {layer} and {expert}; `layers`, `experts` say which. The stored tensor is viewed as `shape`
    (same elements, same order) and the piece is `box`, one range a dim. `name` is what the runtime calls it.
    """

    name: str
    tensor: str
    layers: tuple[int, ...] | None
    experts: Range | None
    shape: tuple[int, ...]
    box: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Transfer:
    """KV that local rank `source` of any context instance sends to local rank `target` of any generation instance.

    The blocks j with j % cp == cp_rank, of these layers and KV heads. Under attention data parallelism it applies
    to requests whose dp ranks are the tp ranks of both ends.
    """

    source: int
    target: int
    layers: Range
    kv_heads: Range
    cp_rank: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """One specialised kernel for one architecture. The last four are None until it is compiled."""

    name: str
    template: str
    params: dict[str, int | float | str | bool]
    arch: str
    cubin: str | None = None  # path inside the artifact
    registers: int | None = None
    shared_bytes: int | None = None
    spill_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole deployment, as it will run. `reference` is the unsharded model on one rank, for --verify."""

    schema: int
    name: str
    model: Model
    tokens_per_block: int
    instances: tuple[Instance, ...]
    ranks: tuple[Rank, ...]
    shards: tuple[tuple[Piece, ...], ...]
    transfers: tuple[Transfer, ...]
    reference: Rank
    kernels: tuple[Kernel, ...]

    def instance_of(self, rank: Rank) -> Instance:
        return next(i for i in self.instances if (i.role, i.index) == (rank.role, rank.instance))

    def kernels_of(self, rank: Rank) -> list[Kernel]:
        """The kernels that `rank` runs, for every architecture."""
        return [kernel for kernel in self.kernels if kernel.name in rank.kernels]

    def shares(self, source: Rank, target: Rank) -> bool:
        """Whether context rank `source` writes its KV into the pages of generation rank `target`, its peer."""
        return source.node == target.node and self.instance_of(source).handoff == "peer"

    def token_bytes(self, t: Transfer) -> int:
        """Bytes of one token of `t`, as it is cached."""
        return (t.layers[1] - t.layers[0]) * (t.kv_heads[1] - t.kv_heads[0]) * self.model.kv_bytes

    def most_pages(self, instance: Instance) -> int:
        """Pages that a request may need on one rank of `instance`: on its fullest one, cp rank 0."""
        return -(-local_length(instance.max_seq_len, self.tokens_per_block, instance.cp, 0) // self.tokens_per_block)


# --- JSON -------------------------------------------------------------------------------------------------------


class ManifestError(ValueError):
    """plan.json or manifest.json does not have the expected form; the message names the JSON path."""


def to_json(value: Any) -> str:
    """Deterministic JSON text of a dataclass tree (fields in declaration order, one trailing newline)."""
    return json.dumps(value, default=_plain, ensure_ascii=False, separators=(",", ":")) + "\n"


def _plain(value: Any) -> Any:
    return {f: getattr(value, f) for f in value.__dataclass_fields__}


def plan_from_json(text: str) -> Plan:
    """Parse plan.json. Raises ManifestError for another schema version, a missing or unknown key, or a wrong type."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"not JSON: {error}") from None
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise ManifestError(f"plan schema {found!r}, this runtime reads {SCHEMA}: compile the deployment again")
    return typing.cast(Plan, read(Plan, data))


def read(kind: Any, data: Any, path: str = "$") -> Any:
    """Build `kind` (a dataclass, tuple, union, literal or scalar) from parsed JSON; ManifestError names the path."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, path)
    if origin is tuple:
        if not isinstance(data, list) or (args[-1] is not Ellipsis and len(data) != len(args)):
            raise ManifestError(f"{path}: expected an array, got {data!r}")
        kinds = [args[0]] * len(data) if args[-1] is Ellipsis else args
        return tuple([read(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, data, strict=True))])
    if origin in (typing.Union, types.UnionType):
        if data is None and types.NoneType in args:
            return None
        options = [a for a in args if a is not types.NoneType]
        return read(options[0], data, path) if len(options) == 1 else data
    if origin is Literal:
        if data not in args:
            raise ManifestError(f"{path}: expected one of {', '.join(map(str, args))}, got {data!r}")
        return data
    if origin is dict:
        if not isinstance(data, dict):
            raise ManifestError(f"{path}: expected an object, got {data!r}")
        return data
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is not kind:
        raise ManifestError(f"{path}: expected {kind.__name__}, got {data!r}")
    return data


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read_dataclass(kind: Any, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise ManifestError(f"{path}: expected an object, got {data!r}")
    hints = _hints(kind)
    if unknown := data.keys() - hints.keys():
        raise ManifestError(f"{path}: unknown key {sorted(unknown)[0]!r}")
    if missing := hints.keys() - data.keys():
        raise ManifestError(f"{path}: missing key {sorted(missing)[0]!r}")
    return kind(**{key: read(hint, data[key], f"{path}.{key}") for key, hint in hints.items()})
