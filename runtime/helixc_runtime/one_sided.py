"""Comm whose decode steps write into the other GPUs' memory: one launch for an exchange and the merges around it, one
for a reduction with the residual and the norm after it, and one for the largest of the logits that the ranks share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from helixc_runtime.attend_cuda import address
from helixc_runtime.attention_shape import PIECE_COLUMNS
from helixc_runtime.comm import GroupName, PeerTimeout, TorchComm
from helixc_runtime.cubin import check_arch
from helixc_runtime.manifest import DTYPE_BYTES, Instance, Kernel, Rank
from helixc_runtime.ops import Norm, Ops, Partial, SplitPartial
from helixc_runtime.ops_cuda import EXCHANGES, load_kernel
from helixc_runtime.peer_memory import open_inboxes
from helixc_runtime.shape_checks import check_add_norm, expect_shape, indices_of

_WARP = 32


class OneSidedComm(TorchComm):
    """What `instance` says is one-sided is done by `kernels` (templates [merge_]exchange and reduce), else collectives.

    What a step needs of the step before it, how many messages there were, lies on the GPU: a step can be captured and
    replayed. Waits for a peer end after `patience` seconds: `check` then raises, and the rank must not go on.
    """

    def __init__(
        self,
        rank: Rank,
        groups: Mapping[str, dist.ProcessGroup],
        instance: Instance,
        kernels: Sequence[Kernel],
        artifact_dir: Path,
        device: torch.device,
        patience: float,
    ) -> None:
        """All ranks of a group together. Raises CubinError, PeerMemoryError, or ValueError if a kernel is missing."""
        super().__init__(rank, groups)
        arch = check_arch([kernel.arch for kernel in kernels], device)
        chosen = [kernel for kernel in kernels if kernel.arch == arch]
        self._device, self._patience = device, patience
        self._none = torch.zeros(1, dtype=torch.int32, device=device)  # rows in splits
        self._status = torch.zeros(4, dtype=torch.int32, pin_memory=device.type == "cuda")  # Status of inbox.cuh
        self._seen = self._status.numpy()
        self._calls: list[tuple[GroupName, str]] = []  # what the kernels know by its number
        self._exchange = self._reduce = self._argmax = None
        if instance.exchange == "one_sided":
            kernel = _find(chosen, *EXCHANGES, cp=instance.cp)
            grouped = instance.hop.groups > 1
            self._exchange = _Messages(self, kernel, "cp", instance.max_batch_size, artifact_dir, in_order=grouped)
        if instance.reduce_rows:
            kernel = _find(chosen, "reduce", members=len(rank.groups.ffn_tp))
            self._reduce = _Messages(self, kernel, "ffn_tp", instance.reduce_rows, artifact_dir)
            kernel = _find(chosen, "argmax", members=len(rank.groups.ffn_tp))
            self._argmax = _Messages(self, kernel, "ffn_tp", instance.max_batch_size, artifact_dir)
        self._kinds = [kind for kind in (self._exchange, self._reduce, self._argmax) if kind]
        self._progress = [kind.progress[i : i + 1] for kind in self._kinds for i in range(2)]

    def open_inboxes(self, message: int, group: GroupName, members: int, index: int) -> Tensor:
        """peer_memory.open_inboxes of inboxes of [2 halves][members] messages of so many bytes."""
        return open_inboxes(2 * members * message, group, members, index, self, self._device)

    def begin_step(self) -> None:
        for kind in self._kinds:
            kind.sent = 0

    def end_step(self) -> None:
        # One launch; the numbers are fixed when it is captured.
        torch._foreach_add_(self._progress, [number for kind in self._kinds for number in (kind.sent, 1)])

    def check(self) -> None:
        failed, peer, step, call = self._seen.tolist()
        if failed:
            group, what = self._calls[call]
            gone = getattr(self.rank.groups, group)[peer]
            raise PeerTimeout(
                f"rank {self.rank.rank} waited {self._patience:g} s for rank {gone} in vain: {what}, decode step {step}"
            )

    def exchange(self, partial: Partial | SplitPartial, ops: Ops, what: str, out: Tensor | None = None) -> Tensor:
        kind = self._exchange
        if kind is None:
            return super().exchange(partial, ops, what, out)
        params, splits = kind.kernel.params, None
        merges = kind.kernel.template == "merge_exchange"
        if merges and isinstance(partial, SplitPartial):
            splits, partial = partial, partial.partial
        o, lse = partial.merged()
        rows, heads, width = len(o), int(params["out_heads"]), int(params["partial_dim"])
        kind.expect(rows, o=o)
        expect_shape("o", o, (rows, heads * kind.members, width))
        expect_shape("lse", lse, (rows, heads * kind.members))
        if lse.dtype != torch.float32 or not lse.is_contiguous():
            raise ValueError(f"lse is {lse.dtype}, or not contiguous, expected float32")
        early = out is None  # else the attention of other rows shall have its thread blocks before
        if out is None:
            out = torch.empty(rows, heads, width, dtype=o.dtype, device=o.device)
        expect_shape("out", out, (rows, heads, width))
        kind.expect(rows, out=out)
        blocks = -(-rows * heads // (int(params["threads"]) // _WARP))
        tensors: tuple[Tensor | None, ...] = (out, o, lse)
        sizes: tuple[int, ...] = (rows, kind.rows)
        if merges:
            mergers = kind.mergers(splits, rows)
            tensors += (splits.o, splits.lse, splits.rows, splits.count) if splits else (None, None, None, self._none)
            blocks, sizes = mergers + blocks, (*sizes, mergers)
        kind.launch(blocks, tensors, sizes, self._call("cp", what), early=early)
        return out

    def reduce(
        self, x: Tensor, residual: Tensor | None, bias: Tensor | None, norm: Norm | None, ops: Ops, what: str
    ) -> tuple[Tensor, Tensor]:
        kind = self._reduce
        if kind is None or len(x) > kind.rows:
            return super().reduce(x, residual, bias, norm, ops, what)
        params, weight = kind.kernel.params, norm.weight if norm else None
        check_add_norm(x, residual, bias, norm)
        kind.expect(len(x), x=x, residual=residual, bias=bias, weight=weight)
        if x.shape[1:] != (params["hidden"],) or (norm and norm.eps != params["eps"]):
            raise ValueError(
                f"the reduction is of {params['hidden']} columns with {params['eps']}, not {list(x.shape)}"
            )
        out = torch.empty_like(x)
        normed = torch.empty_like(x) if norm else out
        kind.launch(len(x), (out, normed, x, residual, bias, weight), (kind.rows,), self._call("ffn_tp", what))
        return out, normed

    def argmax(self, x: Tensor, first: int, ops: Ops, what: str, out: Tensor | None = None) -> Tensor:
        kind = self._argmax
        if kind is None:
            return super().argmax(x, first, ops, what, out)
        rows, columns = x.shape
        kind.expect(rows, x=x)
        out = indices_of(x, out)
        kind.launch(rows, (out, x), (columns, first, kind.rows), self._call("ffn_tp", what))
        return out

    def _call(self, group: GroupName, what: str) -> int:
        if (group, what) not in self._calls:
            self._calls.append((group, what))
        return self._calls.index((group, what))


class _Messages:
    """One kind of messages of a rank: its kernel, the group's inboxes, and how many there have been."""

    def __init__(
        self,
        comm: OneSidedComm,
        kernel: Kernel,
        group: GroupName,
        rows: int,
        artifact_dir: Path,
        *,
        in_order: bool = False,
    ) -> None:
        """`rows`: the most of a message. `in_order`: some launches shall not be early."""
        ranks = getattr(comm.rank.groups, group)
        self.kernel, self.rows, self.members = kernel, rows, len(ranks)
        self.sent = 0  # in this step
        self._comm, self._index = comm, ranks.index(comm.rank.rank)
        self._device, self._dtype = comm._device, getattr(torch, str(kernel.params["dtype"]))
        self._early = load_kernel(kernel, artifact_dir, self._device)
        self._in_order = load_kernel(kernel, artifact_dir, self._device, early=False) if in_order else self._early
        self._resident = 0  # thread blocks that merge, of those the GPU holds at once
        if kernel.template == "merge_exchange":
            processors = torch.cuda.get_device_properties(self._device).multi_processor_count
            self._resident = processors * int(kernel.params["blocks"])
        self.progress = torch.zeros(2, dtype=torch.int32, device=self._device)  # Progress of inbox.cuh
        self._inboxes = comm.open_inboxes(message_bytes(kernel, rows), group, self.members, self._index)

    def mergers(self, splits: SplitPartial | None, rows: int) -> int:
        """Thread blocks for the splits of so many rows: what the GPU holds at once, if there is a piece for each."""
        if splits is None:
            return 0
        params = self.kernel.params
        heads, width = int(params["out_heads"]) * self.members, int(params["partial_dim"])
        expect_shape("the splits' o", splits.o, (len(splits.lse), heads * int(params["row_tokens"]), width))
        return min(self._resident, rows * heads * pieces_of(self.kernel))

    def launch(
        self, blocks: int, tensors: Sequence[Tensor | None], sizes: tuple[int, ...], call: int, *, early: bool = True
    ) -> None:
        """Send this rank's message and take in the others'. `early`: the launch, but for its work, may overtake."""
        group = (self._inboxes, self.progress, self._comm._status)
        numbers = (int(self._comm._patience * 1e9), self._index, self.sent, call)
        loaded = self._early if early else self._in_order
        loaded.launch((blocks, 1, 1), *map(address, (*tensors, *group)), *numbers, *sizes)
        self.sent += 1

    def expect(self, rows: int, **tensors: Tensor | None) -> None:
        """Raise ValueError unless so many rows fit and the kernel can read `tensors` (None: not there)."""
        if not 0 < rows <= self.rows:
            raise ValueError(f"{rows} rows, expected 1 to {self.rows}")
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.dtype != self._dtype or tensor.device != self._device:
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}, expected {self._dtype} on {self._device}"
                )
            if not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise ValueError(f"{name} is not contiguous, or does not start at a multiple of 16 bytes")


def message_bytes(kernel: Kernel, rows: int) -> int:
    """What a message of at most `rows` rows takes of an inbox: see exchange.cuh, reduce.cuh, argmax.cuh."""
    params, size = kernel.params, DTYPE_BYTES[str(kernel.params["dtype"])]
    if kernel.template in EXCHANGES:
        heads = rows * int(params["out_heads"])
        return heads * int(params["partial_dim"]) * size + -(-heads * pieces_of(kernel) * 4 // 16) * 16
    if kernel.template == "argmax":
        return rows * 2 * 4
    return rows * int(params["hidden"]) * size


def pieces_of(kernel: Kernel) -> int:
    """Pieces of a head that may be sent apart, each with its LSE."""
    return int(kernel.params["partial_dim"]) // PIECE_COLUMNS if kernel.template == "merge_exchange" else 1


def _find(kernels: Sequence[Kernel], *templates: str, **params: int) -> Kernel:
    for kernel in kernels:
        if kernel.template in templates and params.items() <= kernel.params.items():
            return kernel
    raise ValueError(f"the rank has no {templates[0]} kernel for {params}")
