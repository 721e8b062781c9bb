"""The choice for a kernel problem: threads and tile sizes, within one thread block's static shared memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from helixc.codegen.problem import KernelSpec, Param
from helixc_runtime.attention_shape import MAX_PROCESSORS
from helixc_runtime.manifest import DTYPE_BYTES, Kernel

_STATIC_SHARED = 48 * 1024  # bytes a thread block may declare without asking the driver for more
_THREADS = 128
_WARP = 32
_VECTOR_BYTES = 16  # the widest load and store of one thread
_HOPPER_SHARED = 231_424  # what the MLA partial uses of the 232,448 bytes a thread block may have
_SKINNY_THREADS = 256  # two thread blocks fill a multiprocessor: 512 threads keep 64 to 128 KiB of loads under way
_EXCHANGE_THREADS = 64  # few, so that a row's heads are spread over the multiprocessors
_GQA_TILES = {"bfloat16": 64, "float8_e4m3fn": 128}  # tokens, 32 KiB of K and V at D 128
_HEAD_TILES = (8, 4, 2, 1)
_TOKEN_TILES = (64, 32, 16, 8, 4)


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """A problem and how to run it. What a kernel has no use for is None."""

    spec: KernelSpec
    threads: int
    head_tile: int | None = None  # query heads of one KV head that a thread block serves
    token_tile: int | None = None  # tokens in shared memory at a time
    stages: int | None = None  # tiles in flight
    cluster: int | None = None  # thread blocks that share a tile
    width: int | None = None  # queries of a thread block, filled up to what a matrix instruction takes
    max_splits: int | None = None  # partials of one row that the merge has room for
    overlap: str | None = None  # what it does while the kernel before it still runs: Overlap in gqa_tile.cuh
    dynamic_shared: int | None = None  # bytes of shared memory that the launch gives
    lanes: int | None = None  # of a warp that share one vector of columns
    columns: int | None = None  # of a vector that a lane moves at a time
    blocks: int | None = None  # thread blocks that fill a multiprocessor
    team: int | None = None  # warps that share the columns of a tile of weights
    batch: int | None = None  # parts that a thread has on their way at once

    @property
    def params(self) -> dict[str, Param]:
        """Problem and choice together, as the template and the artifact see them."""
        choice = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "spec"}
        return dict(self.spec.params) | {key: value for key, value in choice.items() if value is not None}

    def planned(self) -> Kernel:
        """The plan's entry of a kernel that has not been compiled."""
        return Kernel(self.spec.name, self.spec.template, self.params, self.spec.arch)


def configure(spec: KernelSpec) -> KernelConfig:
    """Choose threads and tiles. Raises ValueError for dims that the kernel does not serve."""
    match spec.template:
        case "append":
            return _append(spec)
        case "absorb":
            return replace(_append(spec), threads=_SKINNY_THREADS, blocks=2)
        case "partial":
            return _portable_partial(spec)
        case "mla_schedule":
            return KernelConfig(spec, threads=256)
        case "mla_partial":
            return KernelConfig(spec, threads=512, cluster=_mla_cluster(spec), dynamic_shared=_HOPPER_SHARED)
        case "mla_fp8_partial":
            return _mla_fp8_partial(spec)
        case "mla_merge":
            return KernelConfig(spec, threads=512, max_splits=MAX_PROCESSORS)
        case "gqa_schedule":
            return KernelConfig(spec, threads=32, token_tile=_gqa_tile(spec))
        case "gqa_partial":
            return _gqa_partial(spec)
        case "handoff":
            return _handoff(spec)
        case "combine" | "merge":
            return _combine(spec)
        case "batch":
            return KernelConfig(spec, threads=64)
        case "exchange":
            _expect_vectors(spec, "partial_dim")
            return KernelConfig(spec, threads=_EXCHANGE_THREADS)
        case "merge_exchange":
            return _merge_exchange(spec)
        case "reduce" | "embed":
            return _of_rows(spec)
        case "argmax":
            return KernelConfig(spec, threads=1024)
        case "router":
            return KernelConfig(spec, _THREADS)
        case "linear":
            return KernelConfig(spec, _SKINNY_THREADS, blocks=2)
        case "gate_up":
            return KernelConfig(spec, _SKINNY_THREADS, blocks=2, team=_SKINNY_THREADS // _WARP)
        case "down":  # it has about as many tiles as there are multiprocessors: one thread block each, of all its warps
            return KernelConfig(spec, 2 * _SKINNY_THREADS, blocks=1, team=2 * _SKINNY_THREADS // _WARP)
        case _:
            return KernelConfig(spec, _THREADS)


def _of_rows(spec: KernelSpec) -> KernelConfig:
    """A thread for each 16 bytes of a row, as far as a thread block goes."""
    return KernelConfig(spec, threads=min(-(-_expect_vectors(spec, "hidden") // 512) * 32, 1024))


def _expect_vectors(spec: KernelSpec, width: str) -> int:
    """The bytes of `width` columns; ValueError unless they are whole loads of 16."""
    params = dict(spec.params)
    size = int(params[width]) * DTYPE_BYTES[str(params["dtype"])]
    if size % _VECTOR_BYTES:
        raise ValueError(f"{spec.name}: {params[width]} columns of {size} bytes are not a multiple of {_VECTOR_BYTES}")
    return size


def _merge_exchange(spec: KernelSpec) -> KernelConfig:
    """A thread block has all splits of the longest row under way at once: a warp four of them a load, of `batch` loads.

    That row is cut among all workers: 66 clusters of two thread blocks, or 132 thread blocks. Registers are for 1,024
    threads a multiprocessor, with which as much is under way as in the merge kernel alone.
    """
    params = dict(spec.params)
    queries = int(params["cp"]) * int(params["out_heads"]) * int(params["row_tokens"])
    threads = 256 if queries <= 64 else 128
    return KernelConfig(spec, threads=threads, blocks=1024 // threads, batch=5)


def _append(spec: KernelSpec) -> KernelConfig:
    """The widest loads that neither straddle plain and rotary columns nor part a pair; a lane for each, or a warp."""
    params = dict(spec.params)
    _check_head_dim(spec)
    rope, itemsize = int(params["rope_dim"]), DTYPE_BYTES[str(params["dtype"])]
    if rope < 2:
        raise ValueError(f"{spec.name}: rope_dim {rope} leaves nothing to rotate")
    plain, run = int(params["head_dim"]) - rope, rope if params["interleaved"] else rope // 2
    columns = math.gcd(_VECTOR_BYTES // itemsize, plain, run)
    loads = max(plain, run) // columns
    return KernelConfig(spec, _THREADS, lanes=min(_WARP, 1 << (loads - 1).bit_length()), columns=columns)


def _handoff(spec: KernelSpec) -> KernelConfig:
    """Loads of 16 bytes where a vector is made of them; a lane for each, or a warp."""
    params = dict(spec.params)
    _check_head_dim(spec)
    columns = _VECTOR_BYTES // DTYPE_BYTES[str(params["dtype"])]
    loads = int(params["head_dim"]) // columns
    return KernelConfig(spec, 2 * _THREADS, lanes=min(_WARP, 1 << (loads - 1).bit_length()), columns=columns)


def _combine(spec: KernelSpec) -> KernelConfig:
    """The widest loads that part no row, and all parts at once as far as registers go. A merge's parts are float32."""
    params = dict(spec.params)
    itemsize = DTYPE_BYTES[str(params["dtype"])] if spec.template == "combine" else 4
    batch = _even_tile(int(params["cp"]), 16) if spec.template == "combine" else 8
    columns = math.gcd(_VECTOR_BYTES // itemsize, int(params["partial_dim"]))
    return KernelConfig(spec, _THREADS, columns=columns, batch=batch)


def _mla_cluster(spec: KernelSpec) -> int:
    """Thread blocks that share each tile: the output of 64 queries fills a multiprocessor's registers."""
    return -(-_mla_queries(spec) // 64)


def _mla_queries(spec: KernelSpec) -> int:
    params = dict(spec.params)
    return int(params["heads"]) * int(params["cluster_tokens"])


def _mla_fp8_partial(spec: KernelSpec) -> KernelConfig:
    """As many tiles in flight as fit beside the queries."""
    width = next(n for n in (16, 32, 64) if n >= min(_mla_queries(spec), 64))
    stages = 4 if width == 64 else 5
    used = width * (1152 + 128 + 16) + stages * (64 * 577 + 16) + 16 + 32  # MlaFp8Shared, mla_fp8_layout.cuh
    return KernelConfig(spec, threads=512, stages=stages, cluster=_mla_cluster(spec), width=width, dynamic_shared=used)


def _gqa_partial(spec: KernelSpec) -> KernelConfig:
    """Four warps that compute for each eight queries, and one that copies; 128 KiB of K and V."""
    params = dict(spec.params)
    dim, tile = int(params["head_dim"]), _gqa_tile(spec)
    queries = int(params["share_heads"]) * int(params["share_tokens"])
    fp8 = params["kv_dtype"] == "float8_e4m3fn"
    columns, token_bytes = 8 if queries <= 8 else 16, dim if fp8 else 2 * dim
    stages = 512 // dim
    stage = 2 * tile * token_bytes + 16 + (2 * tile if fp8 else 0)
    computing = 16 * columns  # threads: MergeShared has 24 bytes for each
    used = stages * stage + 2 * 4 * columns * 4 + 64 + 24 * computing + 16  # GqaShared, gqa_tile.cuh
    shared = -(-used // 1024) * 1024
    cluster = 2 if int(params["shares"]) % 2 == 0 else 1
    return KernelConfig(
        spec,
        computing + 32,
        token_tile=tile,
        stages=stages,
        cluster=cluster,
        overlap="old_tokens",
        dynamic_shared=shared,
    )


def _gqa_tile(spec: KernelSpec) -> int:
    return _GQA_TILES[str(dict(spec.params)["kv_dtype"])]


def _portable_partial(spec: KernelSpec) -> KernelConfig:
    params = dict(spec.params)
    heads, kv_heads, dim = int(params["heads"]), int(params["kv_heads"]), int(params["head_dim"])
    tiled = "bfloat16" if params["kv_dtype"] == "float8_e4m3fn" else str(params["kv_dtype"])  # Tiled, partial.cuh
    size, copies = DTYPE_BYTES[tiled], 1 if params["mla"] else 2
    _check_head_dim(spec)
    for most in _HEAD_TILES:
        tile = _even_tile(heads // kv_heads, most)
        for tokens in _TOKEN_TILES:
            if _shared_bytes(tile, tokens, dim, size, copies) <= _STATIC_SHARED:
                return KernelConfig(spec, _THREADS, tile, tokens)
    raise ValueError(f"{spec.name}: head_dim {dim} does not fit {_STATIC_SHARED} bytes of shared memory")


def _check_head_dim(spec: KernelSpec) -> None:
    dim = dict(spec.params)["head_dim"]
    if int(dim) % 8:
        raise ValueError(f"{spec.name}: head_dim {dim} is not a multiple of 8")


def _even_tile(group: int, most: int) -> int:
    """Of a tile, at most `most`: cuts `group` heads, or parts, into the fewest tiles of nearly equal size."""
    tiles = -(-group // most)
    return -(-group // tiles)


def _shared_bytes(heads: int, tokens: int, dim: int, size: int, copies: int) -> int:
    """Upper bound of PartialTile's size (templates/include/helix/partial.cuh)."""
    return 4 * heads * (dim + tokens + 3) + copies * tokens * (dim * size + 4) + 16
