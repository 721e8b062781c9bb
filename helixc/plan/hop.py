"""HOP-B: how many groups a decode step's rows are attended in, one group's exchange under the next one's attention.

More groups hide more of the exchange, and each costs one more launch of attention and of the exchange. The estimate is
of one layer, from the times of attention and exchange alone (docs/hardware.md says where they come from).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product, takewhile

from helixc.hardware import (
    ATTENTION_OPERATIONS_SHARE,
    ATTENTION_READ_SHARE,
    ATTENTION_START,
    EXCHANGE_SHARE,
    EXCHANGE_START,
    GPUS,
    JOIN,
    PROCESSORS,
)
from helixc.plan.exchange_space import MEASURED_ON, transport
from helixc.spec.spec import Hardware, RoleSpec
from helixc_runtime.manifest import DTYPE_BYTES, WITHOUT_HOP, Hop, Model, Space

MOST_GROUPS = 4
LEFT_FREE = (4, 8, 16)  # multiprocessors that may be left to the exchange
LEAST_GAIN = 0.02  # of a layer's time: the estimate is not exact enough for less
_WARPS = 32  # of the one-sided exchange that one multiprocessor holds, a row's head each


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer's attention and exchange take on a rank: seconds, and seconds a row."""

    attention_start: float
    attention_row: float
    exchange_start: float
    exchange_row: float
    warps_row: int | None  # of a one-sided exchange; None: by NCCL

    def seconds(self, rows: float, groups: int = 1, free: int = 0) -> float:
        """From the start of attention to the end of the exchange, of `rows` in `groups`.

        All attention but the first group's leaves `free` multiprocessors to the exchange before.
        """
        attended = exchanged = 0.0
        for group in range(groups):
            own = rows / groups
            slower = PROCESSORS / (PROCESSORS - free) if group else 1.0
            attended += self.attention_start + own * self.attention_row * slower
            last = group == groups - 1
            exchanged = max(attended, exchanged) + self._exchange(own, PROCESSORS if last else free)
        return exchanged + (JOIN if groups > 1 else 0.0)

    def _exchange(self, rows: float, processors: int) -> float:
        """On so many multiprocessors, in as many waves of thread blocks as that takes."""
        waves = 1.0 if self.warps_row is None else rows * self.warps_row / (_WARPS * processors)
        return max(self.exchange_start + rows * self.exchange_row, waves * self.exchange_start)


def layer(spec: RoleSpec, model: Model, space: Space, length: int, hardware: Hardware) -> Layer:
    """One layer of a rank of a generation instance, with rows of `length` tokens over all cp ranks."""
    arch, gpu, cp = model.arch, GPUS[hardware.gpu or MEASURED_ON], spec.context_parallel_size
    tp = 1 if spec.enable_attention_dp else spec.tensor_parallel_size
    heads, kv_heads, tokens = arch.num_heads // tp, max(1, arch.num_kv_heads // tp), length / cp
    read = tokens * kv_heads * model.kv_bytes / (gpu.bandwidth * ATTENTION_READ_SHARE)
    operations = 2 * tokens * heads * (arch.head_dim + arch.partial_dim)
    way = transport(cp, hardware)
    sent = heads * (1 - 1 / cp) * (arch.exchanged_dim(space) * DTYPE_BYTES[model.dtype] + 4)
    return Layer(
        attention_start=ATTENTION_START["mla" if arch.mla else "gqa"],
        attention_row=max(read, operations / (gpu.bfloat16 * ATTENTION_OPERATIONS_SHARE)),
        exchange_start=EXCHANGE_START[way],
        exchange_row=sent / (gpu.nvlink * EXCHANGE_SHARE[way]),
        warps_row=heads // cp if way == "one_sided" else None,
    )


def hop(spec: RoleSpec, model: Model, space: Space, length: int, hardware: Hardware) -> Hop:
    """The number of groups that the file says or, for full batches of rows of `length`, takes least time."""
    if spec.context_parallel_size == 1:
        return WITHOUT_HOP
    batch, one = spec.max_batch_size, layer(spec, model, space, length, hardware)
    attended = 1 / spec.tensor_parallel_size if spec.enable_attention_dp else 1.0  # of the rows, by one rank
    at_once = one.seconds(batch * attended)
    sizes = range(2, min(MOST_GROUPS, batch) + 1) if spec.hop_groups is None else [spec.hop_groups]
    choices = [(one.seconds(batch * attended, *choice), *choice) for choice in product(sizes, LEFT_FREE)]
    if not choices or spec.hop_groups == 1:
        return WITHOUT_HOP if spec.hop_groups is None else _off("the file says so")
    least, groups, free = min(choices)
    told = f"{least * 1e6:.1f} us a layer with {batch} rows of {length:,} tokens, {at_once * 1e6:.1f} us in one"
    if spec.hop_groups is not None:
        return Hop(groups, groups, free, f"the file says so; estimated {told}")
    if least > (1 - LEAST_GAIN) * at_once:
        return _off(f"in {groups} groups, an estimated {told}")

    def pays(rows: int) -> bool:
        return rows >= groups and one.seconds(rows * attended, groups, free) < one.seconds(rows * attended)

    fewest = [batch, *takewhile(pays, _padded_below(batch))][-1]
    return Hop(groups, fewest, free, f"estimated {told}")


def _off(reason: str) -> Hop:
    return Hop(1, 1, 0, reason)


def _padded_below(batch: int) -> Iterator[int]:
    """The smaller sizes that batches are padded to (step.py), largest first."""
    return (1 << power for power in reversed(range((batch - 1).bit_length())))
