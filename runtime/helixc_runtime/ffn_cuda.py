"""Ops.linear, Ops.mlp and Ops.mixture by cubins, for few tokens; what they do not serve is torch's.

Arguments are checked here. A call allocates its result and scratch memory, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from helixc_runtime.attend_cuda import address
from helixc_runtime.cubin import LoadedKernel
from helixc_runtime.ffn_shape import FfnShape, team_of
from helixc_runtime.manifest import Kernel
from helixc_runtime.models.layers import gated_mlp, linear, mix
from helixc_runtime.ops import GatedMlp, Mixture
from helixc_runtime.shape_checks import check_linear, check_mixture, check_mlp

# The launch arguments of each template, in order.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "router": ("pointer",) * 3,
    "gate_up": ("pointer",) * 8 + ("int32",) * 2,
    "down": ("pointer",) * 6 + ("int32",) * 2,
    "linear": ("pointer",) * 3 + ("int32",) * 8,
}
# Launched before their predecessor has ended (programmatic dependent launch). Until they wait for it they read weights;
# `down` reads the router's logits, too, which are older than its predecessor.
EARLY = frozenset(ARGUMENTS)

_WARP, _EIGHT, _TILE_ROWS = 32, 8, 16

Gated = tuple[Kernel, LoadedKernel, Kernel, LoadedKernel]  # gate_up, down


class CudaFfn:
    """The FFN and the projections of one rank's `shape` (None: projections alone, by torch) on one GPU."""

    def __init__(
        self,
        shape: FfnShape | None,
        kernels: Sequence[Kernel],
        loaded: Mapping[str, LoadedKernel],
        processors: int,
        device: torch.device,
    ) -> None:
        """Raises ValueError if `kernels` are not those of `shape`."""
        self.shape, self.processors, self.device = shape, processors, device
        self._linear: dict[tuple[int, int], tuple[Kernel, LoadedKernel]] = {}  # by eights and team
        self._gated: dict[tuple[int, bool], Gated] = {}  # by eights, and whether it is a mixture
        self._router: LoadedKernel | None = None
        downs = {_key(kernel): (kernel, loaded[kernel.name]) for kernel in kernels if kernel.template == "down"}
        for kernel in kernels:
            _check(kernel, shape)
            if kernel.template == "linear":
                key = int(kernel.params["eights"]), int(kernel.params["team"])
                self._linear[key] = kernel, loaded[kernel.name]
            elif kernel.template == "router":
                self._router = loaded[kernel.name]
            elif kernel.template == "gate_up":
                self._gated[_key(kernel)] = kernel, loaded[kernel.name], *downs[_key(kernel)]

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """See Ops.linear."""
        check_linear(x, weight)
        matrices, rows, columns = (1, *weight.shape) if weight.dim() == 2 else weight.shape
        chosen = self._linear.get((_eights(x), team_of(columns)))
        if chosen is None or not _loadable(x) or not _loadable(weight) or not weight.is_contiguous():
            return linear(x, weight)
        kernel, loaded = chosen
        y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
        teams = int(kernel.params["threads"]) // _WARP // int(kernel.params["team"])
        blocks = self._blocks(kernel, -(-matrices * -(-rows // _TILE_ROWS) // teams))
        strides = [t.stride(dim) if t.dim() == 3 or dim == 0 else 0 for t in (x, y) for dim in (0, 1)]
        pointers = map(address, (y, x, weight))
        loaded.launch((blocks, 1, 1), *pointers, len(x), rows, columns, matrices, *strides)
        return y

    def mlp(self, x: Tensor, weights: GatedMlp) -> Tensor:
        """See Ops.mlp."""
        check_mlp(x, weights)
        gated = self._gated.get((_eights(x), False))
        if gated is None:
            return gated_mlp(x, weights.gate, weights.up, weights.down)
        self._expect(x, weights.gate, weights.up, weights.down)
        return self._launch_gated(gated, x, None, weights, None, None)

    def mixture(self, x: Tensor, weights: Mixture) -> Tensor:
        """See Ops.mixture."""
        assert self.shape is not None and self.shape.moe is not None and self.shape.experts is not None
        check_mixture(self.shape, x, weights)
        gated = self._gated.get((_eights(x), True))
        if gated is None or self._router is None:
            return mix(self.shape.moe, self.shape.experts, weights, x)
        experts, shared = weights.experts, weights.shared
        self._expect(x, weights.router, experts.gate, experts.up, experts.down)
        if shared is not None:
            self._expect(shared.gate, shared.up, shared.down)
        if weights.bias is not None and weights.bias.dtype != torch.float32:
            raise ValueError(f"the router's bias is {weights.bias.dtype}, expected torch.float32")
        logits = torch.empty(len(x), self.shape.moe.experts, dtype=torch.float32, device=x.device)
        self._router.launch((self.shape.moe.experts, len(x), 1), *map(address, (logits, x, weights.router)))
        return self._launch_gated(gated, x, experts, shared, logits, weights.bias)

    def _launch_gated(
        self,
        gated: Gated,
        x: Tensor,
        experts: GatedMlp | None,
        always: GatedMlp | None,
        logits: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        kernel, gate_up, down_kernel, down = gated
        params = {name: int(kernel.params[name]) for name in ("always_columns", "expert_columns", "top_k")}
        width = params["always_columns"] + params["top_k"] * params["expert_columns"]
        activated = torch.empty(len(x), width, dtype=x.dtype, device=x.device)
        out = torch.empty_like(x)
        pairs = min(int(kernel.params["local_experts"]), len(x) * params["top_k"])
        tiles = -(-params["always_columns"] // _EIGHT) + pairs * (params["expert_columns"] // _EIGHT)
        first = self.shape.experts[0] if self.shape and self.shape.experts else 0
        e_gate, e_up, e_down = (experts.gate, experts.up, experts.down) if experts else (None,) * 3
        a_gate, a_up, a_down = (always.gate, always.up, always.down) if always else (None,) * 3
        pointers = map(address, (activated, x, e_gate, e_up, a_gate, a_up, logits, bias))
        gate_up.launch((self._blocks(kernel, tiles), 1, 1), *pointers, len(x), first)
        pointers = map(address, (out, activated, e_down, a_down, logits, bias))
        down.launch((self._blocks(down_kernel, -(-x.shape[1] // _TILE_ROWS)), 1, 1), *pointers, len(x), first)
        return out

    def _blocks(self, kernel: Kernel, most: int) -> int:
        """As many as run at once, `most` at most."""
        return min(most, int(kernel.params["blocks"]) * self.processors)

    def _expect(self, *tensors: Tensor) -> None:
        """Raise ValueError unless each is bfloat16, contiguous, aligned to 16 bytes and on this GPU."""
        for tensor in tensors:
            if tensor.device != self.device or not _loadable(tensor) or not tensor.is_contiguous():
                described = f"{tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
                raise ValueError(
                    f"expected contiguous bfloat16 at a multiple of 16 bytes on {self.device}: {described}"
                )


def _key(kernel: Kernel) -> tuple[int, bool]:
    return int(kernel.params["eights"]), int(kernel.params["experts"]) > 0


def _eights(x: Tensor) -> int:
    return -(-len(x) // _EIGHT)


def _loadable(x: Tensor) -> bool:
    """Whether its last dim can be loaded by 16 bytes."""
    steps = [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    in_rows = x.stride(-1) == 1 and x.shape[-1] % 8 == 0 and not any(step % 8 for step in steps)
    return x.dtype == torch.bfloat16 and in_rows and x.data_ptr() % 16 == 0


def _check(kernel: Kernel, shape: FfnShape | None) -> None:
    """Raise ValueError unless what the kernel was specialised on is what `shape` says."""
    if kernel.template == "linear":
        return
    mixture = int(kernel.params["experts"]) > 0
    wanted: dict[str, object] = {"hidden": shape.hidden if shape else None}
    if shape and kernel.template != "router":
        wanted["always_columns"] = shape.shared_columns if mixture else shape.dense_columns
        wanted["expert_columns"] = shape.expert_columns if mixture else 0
        wanted["local_experts"] = shape.local_experts if mixture else 0
    for name, value in wanted.items():
        if kernel.params[name] != value:
            raise ValueError(f"kernel {kernel.name} has {name} {kernel.params[name]}, this rank needs {value}")
