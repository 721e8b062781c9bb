"""Ops by the compiled kernels: checks, scratch memory and launches. Nothing here waits for the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from helixc_runtime.attend_cuda import ARGUMENTS as ATTEND_ARGUMENTS
from helixc_runtime.attend_cuda import EARLY, address, make_attend
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.cubin import LoadedKernel, check_arch
from helixc_runtime.manifest import Kernel
from helixc_runtime.ops import DecodeBatch, LayerCache, Partial
from helixc_runtime.shape_checks import check_append, check_attend, check_combine

_WARP = 32

# The launch arguments of each template, in order.
_ARGUMENTS = {
    "append": ("pointer",) * 10 + ("int32",),
    "combine": ("pointer",) * 4 + ("int32",),
    **ATTEND_ARGUMENTS,
}


class CudaOps:
    """Ops for one rank's `shape` on one GPU, by the rank's `kernels` (see manifest.Kernel) of one artifact.

    Tensors must be contiguous, on `device`, and of the dtypes ops.py states; q, k, v and o of shape.dtype and the
    cache of shape.kv_dtype. Everything is enqueued on torch's current stream.
    """

    def __init__(
        self, shape: AttentionShape, kernels: Sequence[Kernel], artifact_dir: Path, device: torch.device
    ) -> None:
        """Load the cubins. Raises CubinError on a wrong architecture, ValueError if `kernels` do not serve `shape`."""
        if device.type == "cuda" and device.index is None:  # tensors know their index, and are compared with this
            device = torch.device(device.type, torch.cuda.current_device())
        arch = check_arch([kernel.arch for kernel in kernels], device)
        chosen = [kernel for kernel in kernels if kernel.arch == arch]
        self.shape = shape
        self.device = device
        self._kernels = {kernel.template: kernel for kernel in chosen if kernel.template != "combine"}
        self._combines = {int(kernel.params["cp"]): kernel for kernel in chosen if kernel.template == "combine"}
        for kernel in chosen:
            _check_kernel(kernel, shape)
        if "append" not in self._kernels:
            raise ValueError(f"the rank has no append kernel for {arch}")
        self._loaded = {kernel.name: _load(kernel, artifact_dir, device) for kernel in chosen}
        self._attend = make_attend(shape, self._kernels, self._loaded, device)
        self._step: DecodeBatch | None = None

    def begin_step(self, batch: DecodeBatch) -> None:
        """See Ops.begin_step. Raises ValueError on a wrong dtype, device or memory layout."""
        self._expect("int32", page_table=batch.page_table, lengths=batch.lengths)
        if len(batch.lengths):
            self._attend.begin_step(batch)
        self._step = batch

    def append(self, q: Tensor, k: Tensor, v: Tensor | None, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        """See Ops.append. Raises ValueError on a wrong shape, dtype, device or memory layout."""
        check_append(self.shape, q, k, v, cache, batch)
        self._expect(self.shape.dtype, q=q, k=k, v=v)
        self._expect(self.shape.kv_dtype, cache_k=cache.k, cache_v=cache.v)
        self._expect("float32", cos=batch.cos, sin=batch.sin)
        self._expect("uint8", owned=batch.owned)
        self._expect("int64", slots=batch.slots)
        rotated, rows = torch.empty_like(q), q.shape[0]
        pointers = (rotated, q, k, v, cache.k, cache.v, batch.cos, batch.sin, batch.owned, batch.slots)
        warps = rows * (self.shape.heads + self.shape.kv_heads)
        self._launch_warps(self._kernels["append"], warps, *map(address, pointers), rows)
        return rotated

    def attend(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
        """See Ops.attend. Raises ValueError on a wrong shape, dtype, device or memory layout."""
        check_attend(self.shape, q, cache, batch)
        self._expect(self.shape.dtype, q=q)
        self._expect(self.shape.kv_dtype, cache_k=cache.k, cache_v=cache.v)
        self._expect("uint8", k_scale=cache.k_scale, v_scale=cache.v_scale)
        _expect_aligned(cache)
        if self._step is not batch:
            self.begin_step(batch)
        out = self._empty_partial(len(q), self.shape.heads)
        if len(q):
            self._attend.attend(q, cache, batch, out)
        return out

    def combine(self, o: Tensor, lse: Tensor) -> Partial:
        """See Ops.combine. Raises ValueError on a wrong shape, dtype, device, layout or number of partials."""
        check_combine(self.shape, o, lse)
        self._expect(self.shape.dtype, o=o)
        self._expect("float32", lse=lse)
        parts, rows, heads = lse.shape
        if parts not in self._combines:
            raise ValueError(f"no kernel combines {parts} partials, only {sorted(self._combines) or 'none'}")
        out = self._empty_partial(rows, heads)
        count = rows * heads
        pointers = (out.o, out.lse, o, lse)
        self._launch_warps(self._combines[parts], count, *map(address, pointers), count)
        return out

    def _empty_partial(self, rows: int, heads: int) -> Partial:
        dtype: torch.dtype = getattr(torch, self.shape.dtype)
        o = torch.empty(rows, heads, self.shape.partial_dim, dtype=dtype, device=self.device)
        return Partial(o, torch.empty(rows, heads, dtype=torch.float32, device=self.device))

    def _launch_warps(self, kernel: Kernel, warps: int, *values: int) -> None:
        """Launch a kernel in which each warp does one unit of work."""
        if warps:
            per_block = int(kernel.params["threads"]) // _WARP
            self._loaded[kernel.name].launch((-(-warps // per_block), 1, 1), *values)

    def _expect(self, dtype: str, **tensors: Tensor | None) -> None:
        """Raise ValueError unless each tensor (None: not there) is of `dtype`, contiguous, and on this GPU."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.dtype != getattr(torch, dtype):
                raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected {dtype}")
            if tensor.device != self.device:
                raise ValueError(f"{name} is on {tensor.device}, expected {self.device}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name} is not contiguous: strides {tensor.stride()} of shape {list(tensor.shape)}")


def _load(kernel: Kernel, artifact_dir: Path, device: torch.device) -> LoadedKernel:
    if kernel.cubin is None:
        raise ValueError(f"kernel {kernel.name} was planned but not compiled")
    arguments, threads = _ARGUMENTS[kernel.template], int(kernel.params["threads"])
    shared, early = int(kernel.params.get("dynamic_shared", 0)), kernel.template in EARLY
    return LoadedKernel(artifact_dir / kernel.cubin, kernel.name, arguments, threads, device, shared, early)


def _check_kernel(kernel: Kernel, shape: AttentionShape) -> None:
    """Raise ValueError unless what the kernel was specialised on is what `shape` says."""
    for name, value in kernel.params.items():
        wanted = shape.is_mla if name == "mla" else getattr(shape, name, value)
        if value != wanted:
            raise ValueError(f"kernel {kernel.name} has {name} {value}, this rank needs {wanted}")


def _expect_aligned(cache: LayerCache) -> None:
    """Raise ValueError unless pages start at multiples of 16 bytes, the width of the kernel's loads."""
    for name, tensor in (("cache_k", cache.k), ("cache_v", cache.v)):
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(f"{name} does not start at a multiple of 16 bytes")
