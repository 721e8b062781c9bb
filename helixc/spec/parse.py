"""Source -> Spec: the schema, the short form, inheritance, defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from helixc.diagnostics import Diagnostic
from helixc.hardware import DEFAULT_GPUS_PER_NODE, GPUS
from helixc.spec import rules
from helixc.spec.agreement import block_size, contradictions, share_gpus
from helixc.spec.keys import repair
from helixc.spec.model_reference import resolve_model
from helixc.spec.origin import Origins, section_name
from helixc.spec.schema import Document, HardwareSection, RoleSection
from helixc.spec.settle import settle
from helixc.spec.short_form import parse_short_form
from helixc.spec.source import Source
from helixc.spec.spec import Hardware, RoleSpec, Spec
from helixc_runtime.manifest import Role

_NESTED = ("cp_config", "kv_cache_config")


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a file says, and every finding made while it was read.

    The spec is there in spite of errors that let the rest be checked: a misspelt key, a number in quotes, an unknown
    model (then Spec.model is the text as written), a contradiction (then one of the two values). So look for errors
    first. It is None if the generation instances are not described.
    """

    spec: Spec | None
    sizes_known: bool  # False if a value could not be read, so that the spec has a default in its place
    findings: list[Diagnostic]


def parse(source: Source) -> Parsed:
    """The deployment in `source`, and every finding."""
    source, findings = repair(source)
    settled, violations, incomplete = settle(source)
    short, misread = parse_short_form(settled)
    origins = Origins(settled, short)
    missing = [] if misread or _tries_to_describe(source) else _no_generation(settled, origins)
    missing += _no_instances(origins)
    block, blocks = block_size(origins)
    shared, sharing = share_gpus(settled)
    model, unknown_model = resolve_model(settled)
    findings += [*violations, *misread, *contradictions(origins), *missing, *blocks, *sharing, *unknown_model]
    readable = origins.describes("generation") and not missing
    spec = _spec(origins, model, block, shared) if readable else None
    return Parsed(spec, not (incomplete or misread), findings)


def _tries_to_describe(source: Source) -> bool:
    """Whether the generation instances have a section, or might have a part in a short form that is no text."""
    return section_name("generation") in source.data or not isinstance(source.data.get("parallelism", ""), str)


def _no_generation(source: Source, origins: Origins) -> list[Diagnostic]:
    if origins.describes("generation"):
        return []
    message = "the generation instances are not described"
    if "parallelism" in source.data:
        help = "add ` / gen tp1 cp2` to `parallelism`, or a section `generation_servers`"
        return [rules.MISSING_KEY.at(source.value_span(("parallelism",)), message, help)]
    help = "add `parallelism: ctx tp1 / gen tp1 cp2`, or a section `generation_servers`"
    return [rules.MISSING_KEY.at(source.value_span(("generation_servers",)), message, help)]


def _no_instances(origins: Origins) -> list[Diagnostic]:
    if not origins.describes("generation") or _values(origins, "generation").get("num_instances") != 0:
        return []
    span = origins.span("generation", "num_instances")
    return [rules.OUT_OF_RANGE.at(span, "`generation_servers` needs at least one instance", "write 1 or more")]


def _values(origins: Origins, role: Role) -> dict[str, Any]:
    """What the file gives to a role: the section over the short form over the top level."""
    top = {key: value for key, value in origins.source.data.items() if key in RoleSection.model_fields}
    own = dict(origins.section(role) or {})
    for key in _NESTED:
        if key in top and key in own:
            own[key] = top[key] | own[key]
    short = {key: given.value for key, given in origins.short.roles.get(role, {}).items()}
    return top | short | own


def _spec(origins: Origins, model: str, block: int, shared: bool) -> Spec:
    document = Document.model_validate(origins.source.data)
    generation = _role(origins, "generation", block)
    assert generation is not None
    return Spec(
        model=model,
        load_format=document.load_format,
        seed=document.seed,
        dtype=document.dtype,
        context=_role(origins, "context", block),
        generation=generation,
        hardware=_hardware(document.hardware, shared),
    )


def _hardware(section: HardwareSection, shared: bool) -> Hardware:
    gpu = GPUS.get(section.gpu or "")
    per_node = section.gpus_per_node or (gpu.gpus_per_node if gpu else DEFAULT_GPUS_PER_NODE)
    return Hardware(section.nodes, per_node, shared, section.gpu)


def _role(origins: Origins, role: Role, block: int) -> RoleSpec | None:
    if not origins.describes(role):
        return None
    section = RoleSection.model_validate(_values(origins, role))
    if section.num_instances == 0:
        return None
    cache = section.kv_cache_config
    return RoleSpec(
        num_instances=section.num_instances,
        tensor_parallel_size=section.tensor_parallel_size,
        pipeline_parallel_size=section.pipeline_parallel_size,
        context_parallel_size=section.context_parallel_size,
        moe_tensor_parallel_size=section.moe_tensor_parallel_size,
        moe_expert_parallel_size=section.moe_expert_parallel_size,
        pp_partition=None if section.pp_partition is None else tuple(section.pp_partition),
        enable_attention_dp=section.enable_attention_dp,
        max_batch_size=section.max_batch_size,
        max_seq_len=section.max_seq_len,
        tokens_per_block=block,
        kv_dtype=cache.dtype,
        max_tokens=cache.max_tokens,
        free_gpu_memory_fraction=cache.free_gpu_memory_fraction,
        exchange_space=section.cp_config.exchange_space,
        hop_groups=section.cp_config.hop_groups,
    )
