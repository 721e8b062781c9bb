"""The choice for a kernel problem: threads and tile sizes, within one thread block's static shared memory."""

from __future__ import annotations

from dataclasses import dataclass, fields

from helixc.codegen.problem import KernelSpec, Param
from helixc_runtime.attention_shape import MAX_PROCESSORS
from helixc_runtime.manifest import DTYPE_BYTES, Kernel

_STATIC_SHARED = 48 * 1024  # bytes a thread block may declare without asking the driver for more
_THREADS = 128
_HOPPER_SHARED = 231_424  # what the MLA partial uses of the 232,448 bytes a thread block may have
_GQA_TILE = 64
_EXCHANGE_THREADS = 64  # few, so that a row's heads are spread over the multiprocessors
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
    max_splits: int | None = None  # partials of one row that the merge has room for
    overlap: str | None = None  # what it does while the kernel before it still runs: Overlap in gqa_tile.cuh
    dynamic_shared: int | None = None  # bytes of shared memory that the launch gives

    @property
    def params(self) -> dict[str, Param]:
        """Problem and choice together, as the template and the artifact see them."""
        choice = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "spec"}
        return dict(self.spec.params) | {key: value for key, value in choice.items() if value is not None}

    def planned(self) -> Kernel:
        """The plan's entry of a kernel that has not been compiled."""
        return Kernel(self.spec.name, self.spec.template, self.params, self.spec.arch)


def configure(spec: KernelSpec) -> KernelConfig:
    """Choose threads and tiles. Raises ValueError if no tile of the partial kernel fits shared memory."""
    match spec.template:
        case "partial":
            return _portable_partial(spec)
        case "mla_schedule":
            return KernelConfig(spec, threads=256)
        case "mla_partial":
            cluster = 2 if dict(spec.params)["heads"] == 128 else 1  # 64 heads' output fills the register files
            return KernelConfig(spec, threads=512, cluster=cluster, dynamic_shared=_HOPPER_SHARED)
        case "mla_merge":
            return KernelConfig(spec, threads=512, max_splits=MAX_PROCESSORS)
        case "gqa_schedule":
            return KernelConfig(spec, threads=32, token_tile=_GQA_TILE)
        case "gqa_partial":
            return _gqa_partial(spec)
        case "exchange":
            return KernelConfig(spec, threads=_EXCHANGE_THREADS)
        case "reduce":
            return _reduce(spec)
        case _:
            return KernelConfig(spec, _THREADS)


def _reduce(spec: KernelSpec) -> KernelConfig:
    """A thread for each 16 bytes of a row, as far as a thread block goes."""
    params = dict(spec.params)
    size = int(params["hidden"]) * DTYPE_BYTES[str(params["dtype"])]
    if size % 16:
        raise ValueError(f"{spec.name}: a row of {size} bytes is not a multiple of 16")
    return KernelConfig(spec, threads=min(-(-size // 512) * 32, 1024))


def _gqa_partial(spec: KernelSpec) -> KernelConfig:
    """Four warps that compute and one that copies; 128 KiB of K and V in flight."""
    params = dict(spec.params)
    dim, columns = int(params["head_dim"]), 8 if int(params["heads"]) // int(params["kv_heads"]) <= 8 else 16
    stages = 512 // dim
    used = stages * (2 * _GQA_TILE * dim * 2 + 16) + 2 * 4 * columns * 4 + 64 + 3072 + 16  # GqaShared, gqa_tile.cuh
    shared = -(-used // 1024) * 1024
    return KernelConfig(
        spec, threads=160, token_tile=_GQA_TILE, stages=stages, overlap="old_tokens", dynamic_shared=shared
    )


def _portable_partial(spec: KernelSpec) -> KernelConfig:
    params = dict(spec.params)
    heads, kv_heads, dim = int(params["heads"]), int(params["kv_heads"]), int(params["head_dim"])
    size, copies = DTYPE_BYTES[str(params["kv_dtype"])], 1 if params["mla"] else 2
    if dim % 8:
        raise ValueError(f"{spec.name}: head_dim {dim} is not a multiple of 8")
    for most in _HEAD_TILES:
        tile = _even_tile(heads // kv_heads, most)
        for tokens in _TOKEN_TILES:
            if _shared_bytes(tile, tokens, dim, size, copies) <= _STATIC_SHARED:
                return KernelConfig(spec, _THREADS, tile, tokens)
    raise ValueError(f"{spec.name}: head_dim {dim} does not fit {_STATIC_SHARED} bytes of shared memory")


def _even_tile(group: int, most: int) -> int:
    """Heads a tile, at most `most`, that cut `group` heads into the fewest tiles of nearly equal size."""
    tiles = -(-group // most)
    return -(-group // tiles)


def _shared_bytes(heads: int, tokens: int, dim: int, size: int, copies: int) -> int:
    """Upper bound of PartialTile's size (templates/include/helix/partial.cuh)."""
    return 4 * heads * (dim + tokens + 3) + copies * tokens * (dim * size + 4) + 16
