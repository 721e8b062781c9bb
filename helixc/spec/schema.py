"""The keys of a deployment file, strictly typed. Each description is what the documentation shows for the key."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_SIZE = 65_536

GpuName = Literal["h100", "h200", "b200", "gb200", "gb300"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
SpaceName = Literal["auto", "latent", "value"]
KvDtypeName = Literal["auto", "float32", "bfloat16", "float16", "fp8"]
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Tokens = Annotated[int, Field(ge=1, le=2**40)]

# Other names of the element types, in PyTorch and in other engines. FP8 as e5m2 is another type.
DTYPE_ALIASES = {
    **dict.fromkeys(("half", "fp16"), "float16"),
    **dict.fromkeys(("float", "fp32"), "float32"),
    **dict.fromkeys(("float8", "float8_e4m3", "float8_e4m3fn", "fp8_e4m3", "e4m3"), "fp8"),
    "bf16": "bfloat16",
}


class Section(BaseModel):
    """A mapping of known keys: nothing is converted, nothing unknown is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CpConfig(Section):
    """How the context-parallel ranks of an instance divide the KV cache."""

    cp_type: str = Field(default="HELIX", description="the kind of context parallelism; HELIX is the only one")
    tokens_per_block: Size = Field(
        default=32, description="consecutive tokens that one cp rank owns; also the KV page size"
    )
    exchange_space: SpaceName = Field(
        default="auto",
        description="latent attention's exchange: of latents, or of values, after W_UV; auto is what should be faster",
    )
    hop_groups: Size | None = Field(
        default=None,
        description="HOP-B: groups of rows, each exchanged while the next is attended; 1 is off; estimated if absent",
    )


class KvCacheConfig(Section):
    """The KV cache of one rank."""

    tokens_per_block: Size = Field(
        default=32, description="tokens of a KV page; the same as cp_config.tokens_per_block"
    )
    dtype: KvDtypeName = Field(
        default="auto",
        description="element type of the cache; auto is the model's dtype, fp8 is e4m3 with a scale for 128 columns",
    )
    max_tokens: Tokens | None = Field(
        default=None, description="KV tokens one rank holds; by default what memory allows"
    )
    free_gpu_memory_fraction: float = Field(
        default=0.9,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="part of the memory left by the weights that the cache takes",
    )


class RoleSection(Section):
    """The keys of context_servers and generation_servers; at the top level they are inherited by both."""

    num_instances: int = Field(default=1, ge=0, le=MAX_SIZE, description="model replicas of this role")
    tensor_parallel_size: Size = Field(default=1, description="tp: ranks that split the attention heads")
    pipeline_parallel_size: Size = Field(default=1, description="pp: stages that split the layers")
    context_parallel_size: Size = Field(
        default=1, description="cp: ranks that split the KV cache by tokens (generation only)"
    )
    moe_tensor_parallel_size: Size | None = Field(
        default=None, description="ranks that split each expert; derived if absent"
    )
    moe_expert_parallel_size: Size | None = Field(
        default=None, description="ep: ranks that split the experts; derived if absent"
    )
    pp_partition: list[Size] | None = Field(default=None, description="layers of every pipeline stage; even if absent")
    enable_attention_dp: bool = Field(
        default=False, description="tp ranks attend for their own requests, with whole heads"
    )
    max_batch_size: Size = Field(default=8, description="requests an instance works on at once")
    max_seq_len: Tokens | None = Field(default=None, description="prompt and generated tokens of one request together")
    cp_config: CpConfig = Field(default=CpConfig(), description="Helix: how the KV cache is divided")
    kv_cache_config: KvCacheConfig = Field(default=KvCacheConfig(), description="the KV cache of one rank")


class HardwareSection(Section):
    """The GPUs on which the instances are placed, in order."""

    nodes: Size | None = Field(default=None, description="hosts; as many as needed if absent")
    gpu: GpuName | None = Field(
        default=None, description="the kind of GPU: with it, memory and links are checked and estimates are made"
    )
    gpus_per_node: Size | None = Field(default=None, description="GPUs of one host; 8, or 4 of gb200 and gb300")
    share_gpus: bool = Field(default=False, description="context and generation instances may sit on the same GPUs")


class Document(RoleSection):
    """The top level of a deployment file."""

    model: str = Field(
        min_length=1, description="checkpoint folder, relative to the file, or a built-in geometry's name"
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto", description="auto: the checkpoint; dummy: random weights"
    )
    dtype: DtypeName = Field(
        default="auto", description="element type of weights and activations; auto is the checkpoint's"
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="seed of dummy weights")
    parallelism: str = Field(default="", description="the short form: `ctx tp2 / gen tp1 cp2`")
    hardware: HardwareSection = Field(default=HardwareSection(), description="the GPUs to place instances on")
    share_gpus: bool = Field(default=False, description="the same as hardware.share_gpus")
    context_servers: RoleSection = Field(default=RoleSection(), description="the instances that prefill")
    generation_servers: RoleSection = Field(default=RoleSection(), description="the instances that decode")


def section_class(path: tuple[str | int, ...]) -> type[Section] | None:
    """The class that describes the mapping at `path`, or None where no mapping belongs."""
    found: type[Section] = Document
    for key in path:
        nested = _NESTED.get(str(key))
        if nested is None or key not in found.model_fields:
            return None
        found = nested
    return found


_NESTED: dict[str, type[Section]] = {
    "context_servers": RoleSection,
    "generation_servers": RoleSection,
    "cp_config": CpConfig,
    "kv_cache_config": KvCacheConfig,
    "hardware": HardwareSection,
}
