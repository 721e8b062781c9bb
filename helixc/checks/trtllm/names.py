"""HX95x: the file's name against its content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from helixc.checks.check import Finding, warning
from helixc.diagnostics import Related, Span
from helixc.spec.file_name import PARALLEL_SIZES, Claim, claims
from helixc.spec.trtllm.dialect import Kind
from helixc.spec.trtllm.servers import Servers, TrtllmFile, at, truth


@warning("HX951")
def name_tells_the_numbers(file: TrtllmFile) -> Iterator[Finding]:
    """The file's name claims other numbers than the file has.

    Names such as `1k1k_ctx1_gen1_dep16_bs64_eplb288_mtp3` are what people and scripts go by: lengths, instances, batch
    size, slots of the expert load balancer and draft tokens (HX209 is about tp, pp, cp and ep). A table of results made
    from such names would be wrong. Rename the file, or correct the numbers.
    """
    if file.kind is Kind.WORKER:
        return
    kind = ("metadata", "benchmark_type")
    if kind in file.source.spans:
        for claim in claims(str(at(file.source, kind))):
            found = _content(file, claim)
            if found is not None and found[0] != claim.value:
                message = f"metadata.benchmark_type is {claim.token}, but {found[2]} is {found[0]}"
                related = (Related("benchmark_type is given here", file.source.value_span(kind)),)
                yield Finding(found[1], message, "make them fit", related)
    for claim in claims(PurePath(file.source.path).stem):
        found = None if claim.key in PARALLEL_SIZES else _content(file, claim)  # HX209 compares those
        if found is not None and found[0] != claim.value:
            value, span, key = found
            whose = f" of {claim.role} servers" if claim.role else ""
            message = f"the file's name says `{claim.token}`, but {key}{whose} is {_shown(value)}"
            yield Finding(span, message, "correct the value, or rename the file")


def _content(file: TrtllmFile, claim: Claim) -> tuple[int | bool, Span, str] | None:
    """(value, where, key) of what a claim is about; None where the file does not say."""
    if claim.role is None:
        path = ("benchmark", claim.key)
        value = at(file.source, path) if path in file.source.spans else None
        return (value, file.source.value_span(path), claim.key) if isinstance(value, int) else None
    servers = file.context if claim.role == "context" else file.generation
    if servers is None:
        return None
    if claim.key in ("mtp", "eplb"):
        return _speculation(servers, claim.key) if file.kind is Kind.BENCHMARK else None
    if claim.key == "num_instances":
        return servers.instances, servers.span(claim.key), claim.key
    if claim.key == "enable_attention_dp":
        return truth(servers.value(claim.key)) or False, servers.span(claim.key), claim.key
    value = servers.count(claim.key)
    return None if value is None else (value, servers.span(claim.key), claim.key)


def _speculation(servers: Servers, name: str) -> tuple[int, Span, str]:
    """Draft tokens of a step, or slots of the expert load balancer; 0 where the file has none."""
    if name == "mtp":
        for draft in ("max_draft_len", "num_nextn_predict_layers"):
            if (count := servers.count("speculative_config", draft)) is not None:
                return count, servers.span("speculative_config", draft), draft
        return 0, servers.span("speculative_config"), "speculative_config.max_draft_len"
    slots = ("moe_config", "load_balancer", "num_slots")
    return servers.count(*slots) or 0, servers.span(*slots), "moe_config.load_balancer.num_slots"


def _shown(value: int | bool) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
