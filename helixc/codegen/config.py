"""The choice for a kernel problem: threads and tile sizes, within one thread block's static shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from helixc.codegen.problem import KernelSpec, Param
from helixc_runtime.manifest import DTYPE_BYTES, Kernel

_STATIC_SHARED = 48 * 1024  # bytes a thread block may declare without asking the driver for more
_THREADS = 128
_HEAD_TILES = (8, 4, 2, 1)
_TOKEN_TILES = (64, 32, 16, 8, 4)


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """A problem and how to run it. The tiles belong to the partial kernel and are None for the others."""

    spec: KernelSpec
    threads: int
    head_tile: int | None = None  # query heads of one KV head that a thread block serves
    token_tile: int | None = None  # tokens in shared memory at a time

    @property
    def params(self) -> dict[str, Param]:
        """Problem and choice together, as the template and the artifact see them."""
        choice = {"threads": self.threads, "head_tile": self.head_tile, "token_tile": self.token_tile}
        return dict(self.spec.params) | {key: value for key, value in choice.items() if value is not None}

    def planned(self) -> Kernel:
        """The plan's entry of a kernel that has not been compiled."""
        return Kernel(self.spec.name, self.spec.template, self.params, self.spec.arch)


def configure(spec: KernelSpec) -> KernelConfig:
    """Choose threads and tiles. Raises ValueError if no tile of the partial kernel fits shared memory."""
    if spec.template != "partial":
        return KernelConfig(spec, _THREADS)
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
