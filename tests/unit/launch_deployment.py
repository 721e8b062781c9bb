"""A small planned deployment for the launcher's tests: no checkpoint, no kernels."""

from __future__ import annotations

from dataclasses import replace

from helixc.model import read_model
from helixc.plan.lower import lower
from helixc.plan.place import place
from helixc.spec.spec import Hardware, RoleSpec, Spec
from helixc_runtime.manifest import Plan


def deployment(
    context_tp: int = 1,
    context_instances: int = 1,
    tp: int = 1,
    cp: int = 2,
    max_seq_len: int = 256,
    max_tokens: int | None = None,
    gpus_per_node: int = 8,
) -> Plan:
    """`ctx tp / gen tp cp` of a built-in geometry; `context_instances` 0 plans none."""
    generation = RoleSpec(
        num_instances=1,
        tensor_parallel_size=tp,
        pipeline_parallel_size=1,
        context_parallel_size=cp,
        moe_tensor_parallel_size=None,
        moe_expert_parallel_size=None,
        pp_partition=None,
        enable_attention_dp=False,
        max_batch_size=4,
        max_seq_len=max_seq_len,
        free_gpu_memory_fraction=0.9,
        tokens_per_block=32,
        kv_dtype="auto",
        max_tokens=max_tokens,
        free_gpu_memory_fraction=0.9,
    )
    context = replace(
        generation,
        num_instances=context_instances,
        tensor_parallel_size=context_tp,
        context_parallel_size=1,
        max_seq_len=max_seq_len - 16,
        free_gpu_memory_fraction=0.9,
        max_tokens=None,
    )
    hardware = Hardware(nodes=None, gpus_per_node=gpus_per_node, share_gpus=False)
    roles = (context if context_instances else None, generation)
    spec = Spec("llama-3.1-8b", "dummy", 0, "float32", *roles, hardware)
    return place(lower(spec, read_model("llama-3.1-8b")), lambda *_: ())
