"""The deployment as the user wrote it, typed, with defaults filled in and the two roles resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from helixc_runtime.manifest import Dtype, Space


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """One of the sections context_servers and generation_servers. None: to be decided by `lower` from the model."""

    num_instances: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    context_parallel_size: int
    moe_tensor_parallel_size: int | None
    moe_expert_parallel_size: int | None
    pp_partition: tuple[int, ...] | None
    enable_attention_dp: bool
    max_batch_size: int
    max_seq_len: int | None
    tokens_per_block: int
    kv_dtype: Dtype | Literal["auto", "fp8"]
    max_tokens: int | None  # KV tokens one rank holds
    free_gpu_memory_fraction: float
    exchange_space: Space | Literal["auto"]
    hop_groups: int | None  # 1: HOP-B is off


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where instances are placed, in order. None: as many nodes as the instances need."""

    nodes: int | None
    gpus_per_node: int
    share_gpus: bool
    gpu: str | None = None  # a key of helixc.hardware.GPUS; None: unknown, nothing is checked against it


@dataclass(frozen=True, slots=True)
class Spec:
    """A whole deployment. `model` is an absolute checkpoint folder or a built-in geometry's name."""

    model: str
    load_format: Literal["auto", "dummy"]
    seed: int
    dtype: Dtype | Literal["auto"]
    context: RoleSpec | None  # None: no context instances; such a plan cannot prefill
    generation: RoleSpec
    hardware: Hardware
