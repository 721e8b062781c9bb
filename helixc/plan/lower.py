"""Spec + ModelArch -> Model and one Layout a role: every number decided, no `auto` left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helixc.model import is_builtin, native_dtype
from helixc.plan.exchange_space import exchange_space
from helixc.plan.hop import hop
from helixc.plan.mapping import Mapping, stages
from helixc.spec.spec import Hardware, RoleSpec, Spec
from helixc_runtime.manifest import WITHOUT_HOP, Dtype, Hop, KvDtype, Model, ModelArch, Range, Role, Space, local_length


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape all instances of one role share."""

    role: Role
    num_instances: int
    mapping: Mapping
    attention_dp: bool
    stages: tuple[Range, ...]  # layers of every pipeline stage
    max_batch_size: int
    max_seq_len: int
    kv_capacity: int  # tokens of one rank's shard
    free_gpu_memory_fraction: float
    exchange_space: Space
    hop: Hop

    @property
    def attention_tp(self) -> int:
        """How many ways heads are split before the exchange: 1 under attention data parallelism."""
        return 1 if self.attention_dp else self.mapping.tp


@dataclass(frozen=True, slots=True)
class Deployment:
    """What `place` needs: the model, the layout of each role and where to put the instances."""

    model: Model
    tokens_per_block: int
    context: Layout | None
    generation: Layout
    hardware: Hardware


def lower(spec: Spec, arch: ModelArch) -> Deployment:
    """Resolve `spec` for a model. The checks have passed, so nothing here can fail on user input."""
    dtype = native_dtype(spec.model) if spec.dtype == "auto" else spec.dtype
    builtin = is_builtin(spec.model)
    model = Model(
        name=spec.model if builtin else Path(spec.model).name,
        checkpoint=None if builtin else spec.model,
        load_format=spec.load_format,
        seed=spec.seed,
        dtype=dtype,
        kv_dtype=kv_dtype(spec.generation, dtype),
        arch=arch,
    )
    context = _layout("context", spec.context, model, spec.hardware) if spec.context else None
    generation = _layout("generation", spec.generation, model, spec.hardware)
    return Deployment(model, spec.generation.tokens_per_block, context, generation, spec.hardware)


def kv_dtype(spec: RoleSpec, dtype: Dtype) -> KvDtype:
    """The element type of the KV cache of a model of `dtype`."""
    if spec.kv_dtype == "auto":
        return dtype
    return "float8_e4m3fn" if spec.kv_dtype == "fp8" else spec.kv_dtype


def kv_tokens(batch: int, length: int, block: int, cp: int) -> int:
    """Tokens that rank 0 of a cp group, which holds the most, needs room for, in whole blocks."""
    return batch * -(-local_length(length, block, cp, 0) // block) * block


def _layout(role: Role, spec: RoleSpec, model: Model, hardware: Hardware) -> Layout:
    arch = model.arch
    ranks = spec.tensor_parallel_size * spec.context_parallel_size
    moe_ep = 1  # of a model without experts, whatever the file says: HX203
    if arch.moe is not None:
        moe_ep = spec.moe_expert_parallel_size or ranks // (spec.moe_tensor_parallel_size or ranks)
    mapping = Mapping(spec.tensor_parallel_size, spec.context_parallel_size, spec.pipeline_parallel_size, moe_ep)
    max_seq_len = spec.max_seq_len or arch.max_position
    needed = kv_tokens(spec.max_batch_size, max_seq_len, spec.tokens_per_block, mapping.cp)
    space = exchange_space(spec, arch, hardware)
    return Layout(
        role=role,
        num_instances=spec.num_instances,
        mapping=mapping,
        attention_dp=spec.enable_attention_dp,
        stages=stages(arch.num_layers, mapping.pp, spec.pp_partition),
        max_batch_size=spec.max_batch_size,
        max_seq_len=max_seq_len,
        kv_capacity=needed if spec.max_tokens is None else min(needed, spec.max_tokens),
        free_gpu_memory_fraction=spec.free_gpu_memory_fraction,
        exchange_space=space,
        hop=WITHOUT_HOP if role == "context" else hop(spec, model, space, max_seq_len, hardware),
    )
