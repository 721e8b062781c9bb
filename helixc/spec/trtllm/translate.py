"""A TensorRT-LLM file as a deployment file: the same values under helixc's keys, each with its place in the file."""

from __future__ import annotations

from typing import Any, get_args

from helixc.diagnostics import Diagnostic
from helixc.spec.schema import DTYPE_ALIASES, DtypeName, HardwareSection, KvDtypeName, RoleSection
from helixc.spec.settle import PLACEHOLDER
from helixc.spec.source import KeyPath, Place, Source
from helixc.spec.trtllm import rules
from helixc.spec.trtllm.dialect import Kind
from helixc.spec.trtllm.known_models import quantisation
from helixc.spec.trtllm.servers import Servers, TrtllmFile, at, truth

# Keys that TensorRT-LLM lets be null, which is to leave them out.
_OPTIONAL = frozenset(
    (
        *("max_batch_size", "max_seq_len", "moe_tensor_parallel_size", "moe_expert_parallel_size", "pp_partition"),
        *("cp_config", "kv_cache_config", "max_tokens", "free_gpu_memory_fraction"),
    )
)
_NESTED = {"cp_config": ("cp_type", "tokens_per_block"), "kv_cache_config": ("tokens_per_block", "max_tokens")}
_DERIVED = -1  # what TensorRT-LLM's MoE sizes are if they follow from the others
_DTYPES, _KV_DTYPES = get_args(DtypeName), get_args(KvDtypeName)
_FRACTIONS = ("free_gpu_memory_fraction", "kv_cache_free_gpu_memory_fraction")


def translate(file: TrtllmFile) -> tuple[Source, list[Diagnostic]]:
    """The deployment that `file` describes, under helixc's keys, and findings on what was read as something else."""
    translation = _Translation(file)
    translation.model()
    translation.hardware()
    for role, servers in (("context", file.context), ("generation", file.generation)):
        if servers is not None:
            translation.role(f"{role}_servers", servers)
    if file.kind is Kind.WORKER and file.generation is None:
        translation.data["generation_servers"] = {}  # described elsewhere; without a span, so that nothing points at it
    source = file.source
    return Source(source.path, source.text, translation.data, translation.spans), translation.findings


class _Translation:
    def __init__(self, file: TrtllmFile) -> None:
        self.file = file
        self.source = file.source
        self.data: dict[str, Any] = {}
        self.spans: dict[KeyPath, Place] = {(): file.source.spans[()]}
        self.findings: list[Diagnostic] = []

    def model(self) -> None:
        """`model`, and the type of its weights. PLACEHOLDER without a span if the file names none."""
        path = model_path(self.file)
        if path is None:
            self.data["model"] = PLACEHOLDER
            return
        self._put(("model",), at(self.source, path), path)
        name = str(at(self.source, path))
        if (short := quantisation(name)) is not None:
            span = self.source.value_span(path)
            message = f"the weights of `{name}` are {short}, for which helixc has no kernels"
            self.findings.append(rules.PRECISION.at(span, message, "helixc plans them in bfloat16"))
        for key in ("dtype", "load_format"):
            if (key,) in self.source.spans and self.file.kind is not Kind.BENCHMARK:
                self._put((key,), self._dtype((key,), _DTYPES) if key == "dtype" else self._lower((key,)), (key,))

    def hardware(self) -> None:
        """GPUs of a node, and their type where helixc takes it."""
        benchmark = self.file.kind is Kind.BENCHMARK
        places = {"gpus_per_node": ("hardware", "gpus_per_node") if benchmark else ("gpus_per_node",)}
        if benchmark and "gpu" in HardwareSection.model_fields:
            places["gpu"] = ("hardware", "gpu_type")
        found = {key: path for key, path in places.items() if path in self.source.spans}
        if found:
            self.data["hardware"] = {}
            self.spans["hardware",] = self.source.spans[next(iter(found.values()))]
        for key, path in found.items():
            value = at(self.source, path)
            self._put(("hardware", key), value.lower() if key == "gpu" and isinstance(value, str) else value, path)

    def role(self, name: str, servers: Servers) -> None:
        """The section of one role."""
        self.data[name] = {}
        if servers.section:
            self.spans[name,] = self.source.spans[servers.section]
        for key in RoleSection.model_fields:
            path = servers.path(key)
            if path is None or (key in _OPTIONAL and at(self.source, path) in (None, _DERIVED)):
                continue
            value = at(self.source, path)
            if key in _NESTED and isinstance(value, dict):
                self._config((name, key), path, value)
            elif key == "enable_attention_dp" and truth(value) is not None:
                self._put((name, key), truth(value), path)
            else:
                self._put((name, key), value, path)
        self._fraction(name, servers)

    def _config(self, target: KeyPath, path: KeyPath, value: dict[str, Any]) -> None:
        """cp_config or kv_cache_config."""
        self._put(target, {}, path)
        for key in value:
            if key in (*_NESTED[str(target[-1])], "free_gpu_memory_fraction") and value[key] is not None:
                self._put((*target, key), value[key], (*path, key))
            elif key == "dtype" and target[-1] == "kv_cache_config":
                self._put((*target, key), self._dtype((*path, key), _KV_DTYPES), (*path, key))

    def _fraction(self, name: str, servers: Servers) -> None:
        """free_gpu_memory_fraction beside the other keys: kv_cache_config's own wins."""
        config = self.data[name].get("kv_cache_config", {})
        path = next((found for key in _FRACTIONS if (found := servers.path(key)) is not None), None)
        if path is None or not isinstance(config, dict) or "free_gpu_memory_fraction" in config:
            return
        if "kv_cache_config" not in self.data[name]:
            self._put((name, "kv_cache_config"), {}, path)
        self._put((name, "kv_cache_config", "free_gpu_memory_fraction"), at(self.source, path), path)

    def _dtype(self, path: KeyPath, supported: tuple[str, ...]) -> Any:
        """The dtype at `path` by helixc's name; auto, with a finding, for one without kernels."""
        written = at(self.source, path)
        if not isinstance(written, str):
            return written
        name = written.lower().removeprefix("torch.")
        name = DTYPE_ALIASES.get(name, name)
        if name in supported:
            return name
        if quantisation(name) is None and name != "fp8_ds_mla":
            return written
        message = f"{'.'.join(map(str, path))} {written}: helixc has no kernels for this type"
        help = "helixc plans with the model's own dtype (`dtype: auto`)"
        self.findings.append(rules.PRECISION.at(self.source.value_span(path), message, help))
        return "auto"

    def _lower(self, path: KeyPath) -> Any:
        value = at(self.source, path)
        return value.lower() if isinstance(value, str) else value

    def _put(self, target: KeyPath, value: Any, path: KeyPath) -> None:
        parent = self.data
        for key in target[:-1]:
            parent = parent[str(key)]
        parent[str(target[-1])] = value
        for place in self.source.spans:
            if place[: len(path)] == path and not (isinstance(value, dict) and len(place) > len(path)):
                self.spans[(*target, *place[len(path) :])] = self.source.spans[place]


def model_path(file: TrtllmFile) -> KeyPath | None:
    """Where the file names its model, None if it does not. Text in angle brackets is a placeholder."""
    if file.kind is Kind.BENCHMARK:
        places: list[KeyPath] = [
            ("metadata", "model_dir_name"),
            ("metadata", "model_name"),
            ("environment", "model_path"),
        ]
    else:
        places = [("model",), *((*servers.section, "model") for servers in file.roles)]
    named = (path for path in places if path in file.source.spans and at(file.source, path) is not None)
    return next((path for path in named if not str(at(file.source, path)).startswith("<")), None)
