"""A small planned deployment for the launcher's tests: no checkpoint, no kernels."""

from __future__ import annotations

from helixc.spec.spec import Hardware
from helixc_runtime.manifest import Plan
from tests.deployments import plan_of, role


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
    generation = role(tp=tp, cp=cp, batch=4, max_seq_len=max_seq_len, block=32, max_tokens=max_tokens)
    context = role(n=context_instances, tp=context_tp, batch=4, max_seq_len=max_seq_len - 16, block=32)
    hardware = Hardware(nodes=None, gpus_per_node=gpus_per_node, share_gpus=False)
    return plan_of(
        "llama-3.1-8b", context if context_instances else None, generation, load_format="dummy", hardware=hardware
    )
