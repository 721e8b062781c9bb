"""The least time a kernel can take at the plan's largest batch and length, from the bytes and operations it must do."""

from __future__ import annotations

from dataclasses import dataclass

from helixc.hardware import GPUS, Gpu
from helixc_runtime.manifest import DTYPE_BYTES, Instance, Kernel, Plan, Rank, local_length

# Whose peak figures stand for an architecture where the deployment names no GPU.
_OF_ARCH = {"sm_90a": "h100", "sm_100a": "b200", "sm_103a": "gb300"}


@dataclass(frozen=True, slots=True)
class Roofline:
    """Of one launch: for one layer, all rows of the batch at max_seq_len."""

    gpu: str
    bytes: int
    operations: int
    seconds: float
    bound: str  # "memory", "arithmetic" or "NVLink"


def roofline(plan: Plan, kernel: Kernel, gpu: str | None) -> Roofline | None:
    """The roofline of a kernel of `plan` on `gpu` (None: its architecture's usual one).

    None for kernels whose work is not a function of batch and length: schedules, merges of splits, projections.
    """
    rank = next(rank for rank in plan.ranks if kernel.name in rank.kernels)
    name = gpu or _OF_ARCH[kernel.arch]
    work = _work(plan, plan.instance_of(rank), rank, kernel)
    return _bound(GPUS[name], kernel, *work) if work else None


def _bound(gpu: Gpu, kernel: Kernel, moved: int, operations: int) -> Roofline:
    if _sends(kernel):
        return Roofline(gpu.name, moved, operations, moved / gpu.nvlink, "NVLink")
    memory, arithmetic = moved / gpu.bandwidth, operations / gpu.bfloat16
    bound = "memory" if memory >= arithmetic else "arithmetic"
    return Roofline(gpu.name, moved, operations, max(memory, arithmetic), bound)


def _sends(kernel: Kernel) -> bool:
    """Whether what it moves are the bytes it sends to other GPUs."""
    return kernel.template == "exchange" or int(kernel.params.get("members", 1)) > 1


def _ffn_work(kernel: Kernel, rows: int) -> tuple[int, int]:
    """Of as many rows as the kernel takes; each draws its experts at random, which are read once for all rows."""
    params = {name: int(value) for name, value in kernel.params.items() if not isinstance(value, str)}
    hidden, experts = params["hidden"], params["experts"]
    if kernel.template == "router":
        return 2 * experts * hidden, 2 * rows * experts * hidden
    rows = min(rows, 8 * params["eights"])
    share = params["top_k"] / experts if experts else 0.0  # of the experts, that a row draws
    active = round(params["local_experts"] * (1 - (1 - share) ** rows))
    matrices = hidden * (2 if kernel.template == "gate_up" else 1)
    read = params["always_columns"] + active * params["expert_columns"]
    used = params["always_columns"] + round(share * params["local_experts"]) * params["expert_columns"]
    return 2 * matrices * read, 2 * rows * matrices * used


def _work(plan: Plan, instance: Instance, rank: Rank, kernel: Kernel) -> tuple[int, int] | None:
    """(bytes, operations) of one launch."""
    arch, rows = plan.model.arch, instance.max_batch_size
    heads, kv_heads = (span[1] - span[0] for span in (rank.q_heads, rank.kv_heads))
    exchanged = arch.exchanged_dim(rank.exchange_space)
    size, stored = DTYPE_BYTES[plan.model.dtype], kv_heads * plan.model.kv_bytes
    if kernel.template == "append":
        return rows * (2 * heads * arch.head_dim * size + kv_heads * arch.kv_width * size + stored), 0
    if kernel.template == "combine":
        partials = rows * (heads // instance.cp) * (exchanged * size + 4)
        return (instance.cp + 1) * partials, 0
    if kernel.template == "exchange":
        return (instance.cp - 1) * rows * (heads // instance.cp) * (exchanged * size + 4), 0
    if kernel.template == "reduce":
        others = int(kernel.params["members"]) - 1
        summed = min(rows, instance.reduce_rows) if others else rows
        return (others or 4) * summed * arch.hidden_size * size, 0  # alone: two read, two written
    if kernel.template in ("router", "gate_up", "down"):
        return _ffn_work(kernel, rows)
    if kernel.template not in ("partial", "mla_partial", "mla_fp8_partial", "gqa_partial"):
        return None
    tokens = rows * local_length(instance.max_seq_len, plan.tokens_per_block, instance.cp, rank.cp_rank)
    return tokens * stored, 2 * tokens * heads * (arch.head_dim + arch.partial_dim)
