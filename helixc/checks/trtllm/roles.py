"""HX93x: what the sections of a file must agree on."""

from __future__ import annotations

from collections.abc import Iterator

from helixc.checks.check import Finding, error, note, warning
from helixc.diagnostics import Related
from helixc.spec.trtllm.dialect import Kind
from helixc.spec.trtllm.servers import Servers, TrtllmFile, at
from helixc.spec.trtllm.vocabulary import ORCHESTRATOR, ORCHESTRATOR_OWN

_SECTIONS = ("context_servers", "generation_servers")
_TRANSCEIVER = "cache_transceiver_config"


@warning("HX931")
def top_level_agrees(file: TrtllmFile) -> Iterator[Finding]:
    """A key stands at the top level and, with another value, in a section.

    In an orchestrator's file both sections inherit the top level. Where a section has the key too, the values must be
    equal: TensorRT-LLM's orchestrator refuses the file otherwise, and does not merge mappings either. Scripts that
    start the workers one by one may let the section win, as helixc does.
    """
    if file.kind is not Kind.ORCHESTRATOR:
        return
    for servers in file.roles:
        section = at(file.source, servers.section)
        for key in section:
            if key in ORCHESTRATOR_OWN or key in _SECTIONS or key not in ORCHESTRATOR or key not in file.source.data:
                continue
            if section[key] != file.source.data[key]:
                span = file.source.value_span((*servers.section, key))
                related = (Related("the top level's value", file.source.value_span((key,))),)
                message = f"`{key}` of {servers.name} differs from the top level's: the orchestrator refuses that"
                yield Finding(span, message, "keep one of the two, or make them equal", related)


@error("HX932")
def roles_agree(file: TrtllmFile) -> Iterator[Finding]:
    """The roles disagree on something that the handoff needs to be the same.

    The generation servers go on with the context servers' KV cache: the same model, the same element type of weights
    and cache, the same layers of speculative decoding. TensorRT-LLM compares the caches' layouts when the first request
    is handed over, and fails then.
    """
    both = file.both
    if both is None:
        return
    for key in (("model",), ("dtype",), ("kv_cache_config", "dtype"), ("speculative_config", "decoding_type")):
        first, second = (_normal(servers.value(*key)) for servers in both)
        unsaid = key[0] != "speculative_config" and {first, second} & {None, "auto"}  # auto may come to the same
        if first != second and not unsaid:
            yield _disagree(*both, key, f"{_shown(second)}, but that of {both[0].name} is {_shown(first)}")


@warning("HX933")
def transceivers_agree(file: TrtllmFile) -> Iterator[Finding]:
    """The two ends of the KV transfer are configured differently.

    Both roles need the same backend and the same runtime of the cache transceiver, or they do not understand each
    other. A section without the key gets the release's default.
    """
    both = file.both
    if both is None:
        return
    for key in ("backend", "transceiver_runtime"):
        first, second = (_normal(servers.value(_TRANSCEIVER, key)) for servers in both)
        if first != second:
            yield _disagree(*both, (_TRANSCEIVER, key), f"{_shown(second)}, but {_shown(first)} on {both[0].name}")


@note("HX934")
def context_hands_over(file: TrtllmFile) -> Iterator[Finding]:
    """There is nobody to prefill.

    With `num_instances: 0` for the context servers, or without their section, prompts are prefilled elsewhere or made
    up, as in a benchmark of generation alone. Helix instances cannot prefill.
    """
    generation = file.generation
    if file.kind is Kind.WORKER or generation is None or (file.context is not None and file.context.instances):
        return
    span = file.context.span("num_instances") if file.context else generation.place
    what = "Helix instances cannot prefill" if file.helix else "the generation instances would have to prefill"
    yield Finding(span, f"there are no context instances; {what}", "add context_servers unless this is a benchmark")


def _disagree(context: Servers, generation: Servers, key: tuple[str, ...], what: str) -> Finding:
    servers = generation if generation.path(*key) else context
    other = context if servers is generation else generation
    related = (Related("the other role's value", other.span(*key)),) if other.path(*key) else ()
    message = f"{'.'.join(key)} of {generation.name} is {what}"
    return Finding(servers.span(*key), message, "make them equal", related)


def _normal(value: object) -> object:
    """Without a difference in case, and hashable."""
    return value.lower() if isinstance(value, str) else None if value is None else str(value)


def _shown(value: object) -> str:
    return "not given" if value is None else str(value)
