"""The memory of a deployment's largest ranks, without placing it: what a check compares with the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from helixc.plan.lower import Deployment, Layout, kv_tokens
from helixc.plan.parameters import parameters
from helixc.plan.place import rank_memory
from helixc.plan.shards import head_ranges, pieces
from helixc_runtime.manifest import Memory


@dataclass(frozen=True, slots=True)
class Footprint:
    """The first rank of a pipeline stage: none of the stage needs more, because remainders go to the first ranks."""

    layout: Layout
    stage: int
    memory: Memory

    @property
    def kv(self) -> int:
        """Bytes of the KV cache."""
        return self.memory.kv_per_token * self.memory.kv_capacity_tokens


def footprints(deployment: Deployment, layout: Layout) -> Iterator[Footprint]:
    """One for every pipeline stage of `layout`."""
    arch = deployment.model.arch
    weights = parameters(arch)
    for stage, layers in enumerate(layout.stages):
        at = layout.mapping.coordinates(stage * layout.mapping.ffn_tp)
        q, kv, _ = head_ranges(arch, layout, at)
        own = pieces(weights, arch, layout, at)
        yield Footprint(layout, stage, rank_memory(deployment.model, layout, own, layers, q, kv))


def resized(footprint: Footprint, deployment: Deployment, batch: int, length: int) -> Footprint:
    """The same rank with room for `batch` requests of `length` tokens."""
    layout, memory = footprint.layout, footprint.memory
    tokens = kv_tokens(batch, length, deployment.tokens_per_block, layout.mapping.cp)
    if layout.role == "context":
        tokens = length
    workspace = memory.workspace // layout.max_batch_size * batch  # every term grows with the batch
    total = memory.weights + memory.kv_per_token * tokens + workspace
    layout = replace(layout, max_batch_size=batch, max_seq_len=length, kv_capacity=tokens)
    return replace(
        footprint,
        layout=layout,
        memory=Memory(memory.weights, memory.kv_per_token, tokens, workspace, total),
    )


def largest(fits: Callable[[int], bool], below: int) -> int:
    """The largest number under `below` that fits, 0 if none does; what fits must also fit smaller."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
