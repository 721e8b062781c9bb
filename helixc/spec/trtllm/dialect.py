"""Which vocabulary a file is written in, and which of TensorRT-LLM's three kinds of file it is."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from helixc.spec.schema import CpConfig, Document, KvCacheConfig
from helixc.spec.source import Source
from helixc.spec.trtllm.vocabulary import BENCHMARK, ORCHESTRATOR, Keys


class Dialect(StrEnum):
    """What `--dialect` takes. AUTO: by the keys of the file."""

    AUTO = "auto"
    HELIXC = "helixc"
    TRTLLM = "trtllm"


class Kind(StrEnum):
    """ORCHESTRATOR describes both roles, WORKER the options of one, BENCHMARK is a slurm job around both."""

    ORCHESTRATOR = "orchestrator"
    WORKER = "worker"
    BENCHMARK = "benchmark"


_ROLE_SECTIONS = ("context_servers", "generation_servers")
_OURS_ONLY = ("parallelism", "share_gpus", "seed", "load_format")
_KNOWN_HERE: Mapping[str, frozenset[str]] = {
    "kv_cache_config": frozenset(KvCacheConfig.model_fields),
    "cp_config": frozenset(CpConfig.model_fields),
}


def is_trtllm(source: Source, dialect: Dialect) -> bool:
    """Whether `source` is to be read as TensorRT-LLM's.

    AUTO takes a file for TensorRT-LLM's if it has a key that only TensorRT-LLM knows and none that only helixc knows.
    """
    if dialect is not Dialect.AUTO:
        return dialect is Dialect.TRTLLM
    data = source.data
    if kind_of(source) is Kind.BENCHMARK:
        return True
    if any(key in data for key in _OURS_ONLY) or isinstance(data.get("hardware"), dict):
        return False
    return _has_foreign_key(data, ORCHESTRATOR)


def kind_of(source: Source) -> Kind:
    """The kind of a file, by the sections it has."""
    data = source.data
    if any(key in data for key in _ROLE_SECTIONS):
        return Kind.ORCHESTRATOR
    worker = data.get("worker_config")
    if "slurm" in data or (isinstance(worker, dict) and worker.keys() & BENCHMARK["worker_config"].keys()):
        return Kind.BENCHMARK
    return Kind.WORKER


def _has_foreign_key(data: Mapping[str, Any], keys: Keys) -> bool:
    """Whether a key that TensorRT-LLM knows and helixc does not stands at the top or in a section both have."""
    for key, value in data.items():
        if key in keys and key not in Document.model_fields:
            return True
        if not isinstance(value, dict) or key not in keys:
            continue
        if key in _ROLE_SECTIONS and _has_foreign_key(value, keys[key]):
            return True
        if key in _KNOWN_HERE and any(k in keys[key] and k not in _KNOWN_HERE[key] for k in value):
            return True
    return False
