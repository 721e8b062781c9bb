"""Every key of a TensorRT-LLM file against its vocabulary: used, of no use to helixc, renamed, or unknown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from helixc.diagnostics import Diagnostic, closest, listed
from helixc.spec import rules as schema_rules
from helixc.spec.keys import SHORT_NAMES
from helixc.spec.schema import RoleSection
from helixc.spec.source import KeyPath, Source
from helixc.spec.trtllm import rules
from helixc.spec.trtllm.dialect import Kind
from helixc.spec.trtllm.vocabulary import (
    ANY,
    BENCHMARK,
    CP_CONFIG,
    KV_CACHE,
    ORCHESTRATOR,
    RENAMED,
    SERVERS,
    TRANSCEIVER,
    WORKER,
    Keys,
)

_TABLES: dict[Kind, Keys] = {
    Kind.ORCHESTRATOR: ORCHESTRATOR,
    Kind.WORKER: WORKER,
    Kind.BENCHMARK: BENCHMARK,
}
_HOMES: tuple[tuple[Keys, str], ...] = (
    (SERVERS, "in context_servers or generation_servers"),
    (KV_CACHE, "under kv_cache_config"),
    (CP_CONFIG, "under cp_config"),
    (TRANSCEIVER, "under cache_transceiver_config"),
    (ORCHESTRATOR, "at the top level of an orchestrator's file"),
)
# What has an equivalent in a deployment file or is checked: everything else is noted as unused.
_READ = frozenset(
    (
        *RoleSection.model_fields,
        *("model", "dtype", "load_format", "hostname", "port", "urls", "gpus_per_node", "num_ctx_servers"),
        *("num_gen_servers", "gpu_type", "context_servers", "generation_servers", "worker_config", "hardware", "gen"),
        *("ctx", "free_gpu_memory_fraction", "kv_cache_free_gpu_memory_fraction", "max_num_tokens", "max_input_len"),
        *("max_beam_width", "enable_chunked_prefill", "cp_type", "tokens_per_block", "max_tokens"),
        *("enable_block_reuse", "cache_transceiver_config", "max_tokens_in_buffer", "benchmark", "metadata"),
    )
)


def unknown_keys(source: Source, kind: Kind) -> Iterator[Diagnostic]:
    """An error for every key that nobody knows, a warning for every key that was renamed."""
    for path, keys in _walk(source.data, _TABLES[kind], ()):
        name = str(path[-1])
        span = source.key_span(path)
        if name not in keys:
            where = f" in {path[-2]}" if len(path) > 1 else ""
            yield schema_rules.UNKNOWN_KEY.at(span, f"unknown key `{name}`{where}", _help(name, keys))
        elif name in RENAMED:
            yield rules.RENAMED_KEY.at(span, f"`{name}` is a key of an older TensorRT-LLM", RENAMED[name])


def unused_keys(source: Source, kind: Kind) -> Iterator[Diagnostic]:
    """A note for every known key that has no effect on helixc. A mapping that is unused as a whole is one note."""
    unused: set[KeyPath] = set()
    for path, keys in _walk(source.data, _TABLES[kind], ()):
        is_unused = path[-1] in keys and path[-1] not in RENAMED and path[-1] not in _READ
        if not is_unused or any(path[:n] in unused for n in range(1, len(path))):
            continue
        unused.add(path)
        message = f"`{path[-1]}` is for TensorRT-LLM; helixc has no use for it"
        yield rules.UNUSED_KEY.at(source.key_span(path), message, "it may stay: it has no effect here")


def _walk(data: Mapping[str, Any], keys: Keys, path: KeyPath) -> Iterator[tuple[KeyPath, Keys]]:
    """(path, the keys known beside it) of every key, down to mappings whose inside is not looked at."""
    for key, value in data.items():
        yield (*path, key), keys
        inner = keys.get(key, ANY)
        if isinstance(value, dict) and inner:
            yield from _walk(value, inner, (*path, key))


def _help(key: str, keys: Keys) -> str:
    short = SHORT_NAMES.get(key.lower())
    meant = short if short in keys else closest(key, keys)
    homes = [where for table, where in _HOMES if key in table]
    if homes:
        return f"this key belongs {listed(homes)}"
    return (
        f"did you mean `{meant}`?" if meant else "neither TensorRT-LLM's documentation nor helixc knows it: remove it"
    )
