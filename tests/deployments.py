"""Specs and plans for tests, without a YAML file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from helixc.model import read_model
from helixc.plan.lower import lower
from helixc.plan.place import place
from helixc.spec.spec import Hardware, RoleSpec, Spec
from helixc_runtime.manifest import Plan

_ROLE: dict[str, Any] = {
    "num_instances": 1,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "context_parallel_size": 1,
    "moe_tensor_parallel_size": None,
    "moe_expert_parallel_size": None,
    "pp_partition": None,
    "enable_attention_dp": False,
    "max_batch_size": 8,
    "max_seq_len": 512,
    "tokens_per_block": 4,
    "kv_dtype": "auto",
    "max_tokens": None,
    "free_gpu_memory_fraction": 0.9,
    "exchange_space": "auto",
    "hop_groups": None,
}
_SHORT = {
    "n": "num_instances",
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "cp": "context_parallel_size",
    "ep": "moe_expert_parallel_size",
    "dp": "enable_attention_dp",
    "block": "tokens_per_block",
    "batch": "max_batch_size",
}


def role(**sizes: Any) -> RoleSpec:
    """A RoleSpec by short names (n, tp, pp, cp, ep, dp, block, batch) or full ones."""
    return RoleSpec(**_ROLE | {_SHORT.get(key, key): value for key, value in sizes.items()})


def spec(model: str, context: RoleSpec | None, generation: RoleSpec, **fields: Any) -> Spec:
    """A Spec of two roles."""
    values: dict[str, Any] = {
        "load_format": "auto",
        "seed": 0,
        "dtype": "float32",
        "hardware": Hardware(None, 8, False),
    }
    return Spec(model=model, context=context, generation=generation, **values | fields)


def plan_of(model: str, context: RoleSpec | None, generation: RoleSpec, **fields: Any) -> Plan:
    """The plan, not verified, without kernels."""
    return place(lower(spec(model, context, generation, **fields), read_model(model)), lambda *_: ())


def on_gpus(plan: Plan, gpus: int) -> Plan:
    """`plan` with its ranks on the first `gpus` GPUs of their host, even if those of a group must share them.

    No deployment file can ask for that. What the ranks compute is the same, at the pace of the driver's time slices.
    """
    return replace(plan, ranks=tuple(replace(rank, device=rank.device % gpus) for rank in plan.ranks))
