"""Unknown keys: each is reported with what was probably meant, and then read as that, so that checking can go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helixc.diagnostics import Diagnostic, closest, listed
from helixc.spec import rules
from helixc.spec.schema import CpConfig, Document, HardwareSection, KvCacheConfig, RoleSection, Section, section_class
from helixc.spec.source import KeyPath, Place, Source

SHORT_NAMES = {
    "tp": "tensor_parallel_size",
    "tp_size": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "pp_size": "pipeline_parallel_size",
    "cp": "context_parallel_size",
    "cp_size": "context_parallel_size",
    "kvp": "context_parallel_size",
    "kvp_size": "context_parallel_size",
    "ep": "moe_expert_parallel_size",
    "ep_size": "moe_expert_parallel_size",
    "expert_parallel_size": "moe_expert_parallel_size",
    "moe_ep": "moe_expert_parallel_size",
    "moe_tp": "moe_tensor_parallel_size",
    "attention_dp": "enable_attention_dp",
    "instances": "num_instances",
    "replicas": "num_instances",
    "block_size": "tokens_per_block",
    "ctx": "context_servers",
    "context": "context_servers",
    "gen": "generation_servers",
    "generation": "generation_servers",
    "num_nodes": "nodes",
    "gpus": "gpus_per_node",
    "num_gpus": "gpus_per_node",
    "gpu_type": "gpu",
    "model_path": "model",
}
_HOMES: tuple[tuple[type[Section], str], ...] = (
    (Document, "at the top level"),
    (KvCacheConfig, "under kv_cache_config"),
    (CpConfig, "under cp_config"),
    (HardwareSection, "under hardware"),
)
_SERVING = frozenset(
    (
        "backend",
        "cache_transceiver_config",
        "conditional_disagg_config",
        "ctx_router",
        "cuda_graph_config",
        "disable_overlap_scheduler",
        "gen_router",
        "hostname",
        "max_num_tokens",
        "max_retries",
        "moe_config",
        "perf_metrics_max_requests",
        "port",
        "print_iter_log",
        "router",
        "trust_remote_code",
        "urls",
    )
)


def repair(source: Source) -> tuple[Source, list[Diagnostic]]:
    """Report every unknown key. The result has it under the name that was probably meant, or no longer."""
    repair = _Repair(source)
    data = repair.section(source.data, (), ())
    return Source(source.path, source.text, data, repair.spans), repair.findings


class _Repair:
    """Rebuilds a document under known keys. `written` is a path in the file, `path` what it means."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.findings: list[Diagnostic] = []
        self.spans: dict[KeyPath, Place] = {(): source.spans[()]}

    def section(self, data: Mapping[str, Any], written: KeyPath, path: KeyPath) -> dict[str, Any]:
        """The mapping at `written` with known keys only."""
        section = section_class(path)
        assert section is not None
        known = section.model_fields
        names = {key: key for key in data if key in known}
        for key in data.keys() - names.keys():
            meant = _meant(key, known)
            self._report(key, (*written, key), path, meant)
            if meant is not None and meant not in names.values():
                names[key] = meant
        return {
            names[key]: self._value(value, (*written, key), (*path, names[key]))
            for key, value in data.items()
            if key in names
        }

    def _value(self, value: Any, written: KeyPath, path: KeyPath) -> Any:
        if written in self.source.spans:  # a value that a reader of another dialect put in has no place
            self.spans[path] = self.source.spans[written]
        if isinstance(value, list):
            return [self._value(item, (*written, i), (*path, i)) for i, item in enumerate(value)]
        if isinstance(value, dict) and section_class(path) is not None:
            return self.section(value, written, path)
        return value

    def _report(self, key: str, written: KeyPath, path: KeyPath, meant: str | None) -> None:
        where = f" in {path[-1]}" if path else ""
        span = self.source.key_span(written)
        self.findings.append(rules.UNKNOWN_KEY.at(span, f"unknown key `{key}`{where}", _help(key, path, meant)))


def _meant(key: str, known: Mapping[str, Any]) -> str | None:
    if key in _SERVING or _homes(key):
        return None
    short = SHORT_NAMES.get(key.lower())
    return short if short in known else closest(key, known)


def _homes(key: str) -> list[str]:
    if key in RoleSection.model_fields:
        return ["in generation_servers, context_servers or at the top level"]
    return [where for section, where in _HOMES if key in section.model_fields]


def _help(key: str, path: KeyPath, meant: str | None) -> str:
    if meant is not None:
        return f"did you mean `{meant}`?"
    if homes := _homes(key):
        return f"this key belongs {listed(homes)}"
    if key == "kv_cache_dtype":
        return "write it as `kv_cache_config: {dtype: ...}`"
    if key in _SERVING:
        return "this key configures TensorRT-LLM's server and means nothing here: remove it"
    section = section_class(path)
    assert section is not None
    return f"known keys here: {', '.join(section.model_fields)}"
