"""Ops by the compiled kernels: checks, scratch memory and launches. Nothing here waits for the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from helixc_runtime.attend_cuda import ARGUMENTS as ATTEND_ARGUMENTS
from helixc_runtime.attend_cuda import EARLY, address, combine_grid, make_attend
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.cubin import LoadedKernel, check_arch
from helixc_runtime.ffn_cuda import ARGUMENTS as FFN_ARGUMENTS
from helixc_runtime.ffn_cuda import EARLY as FFN_EARLY
from helixc_runtime.ffn_cuda import CudaFfn
from helixc_runtime.ffn_shape import FfnShape
from helixc_runtime.kv import KvCache
from helixc_runtime.manifest import WITHOUT_HOP, Hop, Kernel
from helixc_runtime.models.rotary import Rotary
from helixc_runtime.ops import (
    DecodeBatch,
    GqaProjections,
    LayerCache,
    MlaProjections,
    MlaUnabsorbed,
    Norm,
    Partial,
    Projections,
    SplitPartial,
)
from helixc_runtime.shape_checks import (
    check_add_norm,
    check_append,
    check_attend,
    check_combine,
    expect_shape,
    indices_of,
)
from helixc_runtime.switches import read_switches
from helixc_runtime.watched_kernel import WatchedKernel

_WARP = 32

# The launch arguments of each template, in order.
ARGUMENTS = {
    "append": ("pointer",) * 15 + ("int32",) * 9,
    "absorb": ("pointer",) * 12 + ("int32",) * 7,
    "batch": ("pointer",) * 9 + ("int32",) * 3,
    "embed": ("pointer",) * 3 + ("int32",) * 2,
    "combine": ("pointer",) * 4 + ("int32",),
    "exchange": ("pointer",) * 7 + ("int32",) * 5,  # the limit in nanoseconds is as wide as a pointer
    "merge_exchange": ("pointer",) * 11 + ("int32",) * 6,
    "handoff": ("pointer",) * 4 + ("int32",) * 8,
    "reduce": ("pointer",) * 10 + ("int32",) * 4,
    "argmax": ("pointer",) * 6 + ("int32",) * 6,
    **ATTEND_ARGUMENTS,
    **FFN_ARGUMENTS,
}
EXCHANGES = ("exchange", "merge_exchange")
# Of these, absorb and reduce read weights before they wait, merge_exchange the schedule; the others wait first.
_EARLY = EARLY | FFN_EARLY | {*EXCHANGES, "reduce", "argmax", "embed", "absorb"}
_NO_GROUP = (0,) * 7  # what one rank's reduction and argmax have for the arguments that are a group's


class CudaOps:
    """Ops for one rank's `shape` on one GPU, by the rank's `kernels` (see manifest.Kernel) of one artifact.

    Tensors must be contiguous, on `device`, and of the dtypes ops.py states; q, o and projections of shape.dtype and
    the cache of shape.kv_dtype. Projections may be strided over tokens and heads, by multiples of the append kernel's
    loads (16 bytes where the dims allow). Everything is enqueued on torch's current stream.
    """

    def __init__(
        self,
        shape: AttentionShape,
        kernels: Sequence[Kernel],
        artifact_dir: Path,
        device: torch.device,
        ffn: FfnShape | None = None,
        hop: Hop = WITHOUT_HOP,
    ) -> None:
        """Load the cubins. Raises CubinError on a wrong architecture, ValueError if `kernels` do not serve `shape`.

        Without the shape of the FFN, `ffn`, there is no mixture. Steps have at most the groups of `hop`.
        """
        if device.type == "cuda" and device.index is None:  # tensors know their index, and are compared with this
            device = torch.device(device.type, torch.cuda.current_device())
        arch = check_arch([kernel.arch for kernel in kernels], device)
        chosen = [kernel for kernel in kernels if kernel.arch == arch]
        self.shape = shape
        self.device = device
        of_ffn = [kernel for kernel in chosen if kernel.template in FFN_ARGUMENTS]
        chosen = [kernel for kernel in chosen if kernel.template not in FFN_ARGUMENTS]
        chosen = [  # the others are one_sided.py's
            kernel for kernel in chosen if kernel.template not in EXCHANGES and kernel.params.get("members", 1) == 1
        ]
        several = ("combine", "reduce", "absorb")  # kernels of one template
        self._kernels = {kernel.template: kernel for kernel in chosen if kernel.template not in several}
        self._combines = {int(kernel.params["cp"]): kernel for kernel in chosen if kernel.template == "combine"}
        self._absorbs = {int(kernel.params["eights"]): kernel for kernel in chosen if kernel.template == "absorb"}
        self._add_norms = [kernel for kernel in chosen if kernel.template == "reduce"]
        for kernel in chosen:
            _check_kernel(kernel, shape)
        if "append" not in self._kernels:
            raise ValueError(f"the rank has no append kernel for {arch}")
        self._loaded = {kernel.name: load_kernel(kernel, artifact_dir, device) for kernel in (*chosen, *of_ffn)}
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._processors = processors
        # A group has its own schedule and scratch memory: its exchange may still read when the next attends.
        self._attends = [
            make_attend(shape, self._kernels, self._loaded, processors - (hop.processors if group else 0), device)
            for group in range(hop.groups)
        ]
        self._ffn = CudaFfn(ffn, of_ffn, self._loaded, processors, device)
        # Few tokens by the kernels, more by torch. Raise ValueError on a wrong shape, dtype, device or memory layout.
        self.linear, self.mlp, self.mixture = self._ffn.linear, self._ffn.mlp, self._ffn.mixture
        self._steps: list[DecodeBatch | None] = [None] * hop.groups

    def make_batch(self, cache: KvCache, positions: Tensor, attends: Tensor, rotary: Rotary) -> DecodeBatch:
        """See Ops.make_batch. Raises ValueError on a wrong dtype, device, memory layout, or another model's angles."""
        kernel = self._kernels.get("batch")
        if kernel is None or kernel.params["factor"] != rotary.factor:
            raise ValueError(f"no kernel makes a batch with angles times {rotary.factor}")
        rows, width = len(positions), cache.table.shape[1]
        expect_shape("attends", attends, (rows,))
        table = cache.table[:rows]
        self._expect("int64", positions=positions, attends=attends)
        self._expect("int32", page_table=table)
        self._expect("float32", frequencies=rotary.frequencies)

        def empty(dtype: torch.dtype, *size: int) -> Tensor:
            return torch.empty(rows, *size, dtype=dtype, device=self.device)

        angles = self.shape.rope_dim // 2
        cos, sin = empty(torch.float32, angles), empty(torch.float32, angles)
        lengths, owned, slots = empty(torch.int32), empty(torch.uint8), empty(torch.int64)
        pointers = (cos, sin, lengths, owned, slots, positions, attends, table, rotary.frequencies)
        self._loaded[kernel.name].launch((rows, 1, 1), *map(address, pointers), width, cache.cp, cache.cp_rank)
        return DecodeBatch(cos=cos, sin=sin, page_table=table, lengths=lengths, owned=owned, slots=slots)

    def embed(self, tokens: Tensor, table: Tensor, first: int) -> Tensor:
        """See Ops.embed. Raises ValueError on a wrong shape, dtype, device or memory layout."""
        kernel = self._kernels.get("embed")
        if kernel is None:
            raise ValueError("the rank has no kernel that embeds tokens")
        expect_shape("tokens", tokens, (None,))
        expect_shape("table", table, (None, int(kernel.params["hidden"])))
        self._expect("int64", tokens=tokens)
        self._expect(self.shape.dtype, table=table)
        _expect_aligned(table=table)
        x = torch.empty(len(tokens), table.shape[1], dtype=table.dtype, device=self.device)
        if len(tokens):
            pointers = map(address, (x, tokens, table))
            self._loaded[kernel.name].launch((len(tokens), 1, 1), *pointers, first, len(table))
        return x

    def begin_step(self, batch: DecodeBatch) -> None:
        """See Ops.begin_step. Raises ValueError on a wrong dtype, device or memory layout."""
        self._expect("int32", page_table=batch.page_table, lengths=batch.lengths)
        if len(batch.lengths):
            self._attends[batch.group].begin_step(batch)
        self._steps[batch.group] = batch

    def append(self, new: Projections, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        """See Ops.append. Raises ValueError on a wrong shape, dtype, device or memory layout."""
        check_append(self.shape, new, cache, batch)
        if isinstance(new, MlaUnabsorbed):
            return self._absorb(new, cache, batch)
        kernel = self._kernels["append"]
        self._expect_appendable(kernel, new, cache, batch)
        q = self._empty_queries(batch)
        tokens, heads = q.shape[:2]
        strided, norms = self._append_inputs(new)
        caches = (cache.k, cache.v, cache.k_scale, cache.v_scale)
        pointers = (q, *strided, *norms, *caches, batch.cos, batch.sin, batch.owned, batch.slots)
        strides = (t.stride(dim) if t is not None else 0 for t in strided for dim in (0, 1))
        vectors = _WARP // int(kernel.params["lanes"])  # of a warp
        keys = -(-tokens * self.shape.kv_heads // vectors)
        warps = keys * (1 if cache.v is None else 2) - (-tokens * heads // vectors)
        self._launch_warps(kernel, warps, *map(address, pointers), tokens, *strides)
        return q

    def _absorb(self, new: MlaUnabsorbed, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        """Few tokens by one kernel; more by a product, and append."""
        nope = new.k_up.shape[2]
        plain, rotary = new.q[..., :nope], new.q[..., nope:]
        tokens = len(batch.slots)
        kernel = self._absorbs.get(-(-tokens // 8))
        if kernel is None or kernel.params["nope"] != nope:
            absorbed = self.linear(plain, new.k_up)
            return self.append(MlaProjections(absorbed, rotary, new.kv, new.norm), cache, batch)
        self._expect(self.shape.dtype, k_up=new.k_up)
        _expect_aligned(k_up=new.k_up)
        q = self._empty_queries(batch)
        self._expect_appendable(kernel, MlaProjections(plain, rotary, new.kv, new.norm), cache, batch)
        projections = (q, plain, new.k_up, rotary, new.kv, new.norm)
        pointers = (*projections, cache.k, cache.k_scale, batch.cos, batch.sin, batch.owned, batch.slots)
        warps = int(kernel.params["threads"]) // _WARP  # of a thread block
        vectors = _WARP // int(kernel.params["lanes"])  # of a warp
        appending = -(-(-(-tokens // vectors) - (-tokens * self.shape.heads // vectors)) // warps)
        tiles = self.shape.heads * -(-self.shape.partial_dim // 16)
        multiplying = min(
            -(-tiles * int(kernel.params["team"]) // warps), int(kernel.params["blocks"]) * self._processors
        )
        strides = (*plain.stride()[:2], *rotary.stride()[:2], new.kv.stride(0))
        grid = (appending + multiplying, 1, 1)
        self._loaded[kernel.name].launch(grid, *map(address, pointers), tokens, appending, *strides)
        return q

    def _empty_queries(self, batch: DecodeBatch) -> Tensor:
        size, dtype = (len(batch.slots), self.shape.heads, self.shape.head_dim), getattr(torch, self.shape.dtype)
        return torch.empty(*size, dtype=dtype, device=self.device)

    def _expect_appendable(self, kernel: Kernel, new: Projections, cache: LayerCache, batch: DecodeBatch) -> None:
        """Raise ValueError on a wrong dtype, device or memory layout."""
        self._expect_loadable(int(kernel.params["columns"]), new)
        self._expect(self.shape.kv_dtype, cache_k=cache.k, cache_v=cache.v)
        self._expect("uint8", owned=batch.owned, k_scale=cache.k_scale, v_scale=cache.v_scale)
        self._expect("float32", cos=batch.cos, sin=batch.sin)
        self._expect("int64", slots=batch.slots)
        _expect_aligned(cache_k=cache.k, cache_v=cache.v, cos=batch.cos, sin=batch.sin)

    def _append_inputs(
        self, new: MlaProjections | GqaProjections
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """The append kernel's q_plain, q_rotary, k and v, each [N, heads, columns], and its q_norm and k_norm."""
        if isinstance(new, MlaProjections):
            return (new.q_latent, new.q_rope, new.kv.unsqueeze(1), None), (None, new.norm)
        plain = self.shape.head_dim - self.shape.rope_dim
        return (new.q[..., :plain], new.q[..., plain:], new.k, new.v), (new.q_norm, new.k_norm)

    def attend(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial:
        """See Ops.attend. Raises ValueError on a wrong shape, dtype, device or memory layout."""
        return self.attend_split(q, cache, batch).merged()

    def attend_split(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Partial | SplitPartial:
        """See Ops.attend_split. Raises ValueError as attend."""
        check_attend(self.shape, q, cache, batch)
        self._expect(self.shape.dtype, q=q)
        self._expect(self.shape.kv_dtype, cache_k=cache.k, cache_v=cache.v)
        self._expect("uint8", k_scale=cache.k_scale, v_scale=cache.v_scale)
        _expect_aligned(cache_k=cache.k, cache_v=cache.v, k_scale=cache.k_scale, v_scale=cache.v_scale)
        if self._steps[batch.group] is not batch:
            self.begin_step(batch)
        out = self._empty_partial(len(q), self.shape.heads, self.shape.partial_dim)
        return self._attends[batch.group].attend(q, cache, batch, out) if len(q) else out

    def combine(self, o: Tensor, lse: Tensor) -> Partial:
        """See Ops.combine. Raises ValueError on a wrong shape, dtype, device, layout or number of partials."""
        check_combine(self.shape, o, lse)
        self._expect(self.shape.dtype, o=o)
        self._expect("float32", lse=lse)
        _expect_aligned(o=o)
        parts, rows, heads = lse.shape
        if parts not in self._combines:
            raise ValueError(f"no kernel combines {parts} partials, only {sorted(self._combines) or 'none'}")
        out = self._empty_partial(rows, heads, self.shape.exchanged_dim)
        if rows:
            kernel, count = self._combines[parts], rows * heads
            grid = combine_grid(kernel, count)
            self._loaded[kernel.name].launch(grid, *map(address, (out.o, out.lse, o, lse)), count)
        return out

    def add_norm(
        self, x: Tensor, residual: Tensor | None, bias: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor]:
        """See Ops.add_norm. Raises ValueError on a wrong shape, dtype, device, layout or epsilon."""
        check_add_norm(x, residual, bias, norm)
        weight = norm.weight if norm else None
        self._expect(self.shape.dtype, x=x, residual=residual, bias=bias, weight=weight)
        _expect_aligned(x=x, residual=residual, bias=bias, weight=weight)
        fits = {"hidden": x.shape[1]} | ({"eps": norm.eps} if norm else {})
        kernel = next((kernel for kernel in self._add_norms if fits.items() <= kernel.params.items()), None)
        if kernel is None:
            raise ValueError(f"no kernel adds and norms {x.shape[1]} columns with {norm and norm.eps}")
        out = torch.empty_like(x)
        normed = torch.empty_like(x) if norm else out
        pointers = (out, normed, x, residual, bias, weight)
        if len(x):
            self._loaded[kernel.name].launch((len(x), 1, 1), *map(address, pointers), *_NO_GROUP, len(x))
        return out, normed

    def argmax(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See Ops.argmax. Raises ValueError on a wrong shape, dtype, device or memory layout."""
        kernel = self._kernels.get("argmax")
        if kernel is None:
            raise ValueError("the rank has no kernel that finds the largest logit")
        expect_shape("x", x, (None, None))
        out = indices_of(x, out)
        self._expect(self.shape.dtype, x=x)
        self._expect("int64", out=out)
        rows, columns = x.shape
        if rows:
            self._loaded[kernel.name].launch((rows, 1, 1), *map(address, (out, x)), *_NO_GROUP, columns, 0, rows)
        return out

    def _empty_partial(self, rows: int, heads: int, width: int) -> Partial:
        dtype: torch.dtype = getattr(torch, self.shape.dtype)
        o = torch.empty(rows, heads, width, dtype=dtype, device=self.device)
        return Partial(o, torch.empty(rows, heads, dtype=torch.float32, device=self.device))

    def _launch_warps(self, kernel: Kernel, warps: int, *values: int) -> None:
        """Launch a kernel in which each warp does one unit of work."""
        if warps:
            per_block = int(kernel.params["threads"]) // _WARP
            self._loaded[kernel.name].launch((-(-warps // per_block), 1, 1), *values)

    def _expect_loadable(self, columns: int, new: Projections) -> None:
        """Raise ValueError unless each of `new` is of shape.dtype, on this GPU, and all its rows can be loaded."""
        for name in new.__slots__:
            tensor: Tensor | None = getattr(new, name)
            if tensor is None:
                continue
            self._expect_place(name, tensor, self.shape.dtype)
            *steps, last = tensor.stride()
            loadable = last == 1
            for step, size in zip(steps, tensor.shape, strict=False):
                if size > 1 and (step % columns or step >= 1 << 31):
                    loadable = False
            if not loadable:
                raise ValueError(f"{name} has strides {tensor.stride()}, expected multiples of {columns} and then 1")
            if tensor.data_ptr() % (columns * tensor.element_size()):
                raise ValueError(f"{name} does not start at a multiple of {columns * tensor.element_size()} bytes")

    def _expect(self, dtype: str, **tensors: Tensor | None) -> None:
        """Raise ValueError unless each tensor (None: not there) is of `dtype`, contiguous, and on this GPU."""
        wanted = getattr(torch, dtype)
        for name, tensor in tensors.items():
            if tensor is None or (tensor.dtype is wanted and tensor.device == self.device and tensor.is_contiguous()):
                continue
            self._expect_place(name, tensor, dtype)
            raise ValueError(f"{name} is not contiguous: strides {tensor.stride()} of shape {list(tensor.shape)}")

    def _expect_place(self, name: str, tensor: Tensor, dtype: str) -> None:
        if tensor.dtype != getattr(torch, dtype):
            raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected {dtype}")
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {self.device}")


def load_kernel(kernel: Kernel, artifact_dir: Path, device: torch.device, *, early: bool = True) -> LoadedKernel:
    """`kernel` of the artifact, ready to launch. Raises CubinError, or ValueError if it was never compiled.

    Not `early`: it starts when the kernel before it has ended, even if it could wait itself.
    """
    if kernel.cubin is None:
        raise ValueError(f"kernel {kernel.name} was planned but not compiled")
    arguments, threads = ARGUMENTS[kernel.template], int(kernel.params["threads"])
    shared, early = int(kernel.params.get("dynamic_shared", 0)), early and kernel.template in _EARLY
    described = (artifact_dir / kernel.cubin, kernel.name, arguments, threads, device, shared, early)
    switches = read_switches()
    return WatchedKernel(switches, *described) if switches.sync or switches.log_launches else LoadedKernel(*described)


def _check_kernel(kernel: Kernel, shape: AttentionShape) -> None:
    """Raise ValueError unless what the kernel was specialised on is what `shape` says."""
    named: dict[str, object] = {"mla": shape.is_mla}
    if kernel.template == "combine":
        named["partial_dim"] = shape.exchanged_dim
    for name, value in kernel.params.items():
        wanted = named.get(name, getattr(shape, name, value))
        if value != wanted:
            raise ValueError(f"kernel {kernel.name} has {name} {value}, this rank needs {wanted}")


def _expect_aligned(**tensors: Tensor | None) -> None:
    """Raise ValueError unless each tensor (None: not there) starts at a multiple of 16 bytes, the widest load."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(f"{name} does not start at a multiple of 16 bytes")
