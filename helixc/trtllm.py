"""The front end for TensorRT-LLM's files: read them as deployments, and check them for either engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

from helixc import checks
from helixc.checks import trtllm as lints
from helixc.diagnostics import Diagnostic
from helixc.geometry import read_geometry
from helixc.spec.model_reference import MODEL_NOT_FOUND
from helixc.spec.parse import parse
from helixc.spec.rules import MISSING_KEY
from helixc.spec.settle import PLACEHOLDER
from helixc.spec.source import Source
from helixc.spec.spec import Spec
from helixc.spec.trtllm.dialect import Kind
from helixc.spec.trtllm.reading import Purpose, read
from helixc.spec.trtllm.servers import TrtllmFile
from helixc_runtime.manifest import ModelArch

# What is about helixc's own memory, placement, weights and kernels says nothing to users of another engine.
_FOR_BOTH = ("HX0", "HX1", "HX2", "HX3", "HX404", "HX405", "HX9")
_SAID_OTHERWISE = frozenset(("HX403", "HX406"))  # by HX904 and HX932
_OF_THEIR_ENGINE = frozenset(("HX914", "HX915", "HX916"))  # not so with helixc
_EXPERTS = "HX202"


@dataclass(frozen=True, slots=True)
class TrtllmAnalysis:
    """`spec` and `arch` are None where the file does not say enough, which for one worker's file is no mistake."""

    spec: Spec | None
    arch: ModelArch | None
    findings: list[Diagnostic]


def analyse_trtllm(source: Source, purpose: Purpose) -> TrtllmAnalysis:
    """Type and check `source`, a file of TensorRT-LLM. Never raises for a user's mistake."""
    reading = read(source, purpose)
    parsed = parse(reading.source)
    read_on = (f for f in parsed.findings if f.code != MODEL_NOT_FOUND.code)
    findings = [*reading.findings, *(_in_their_words(f, reading.file) for f in read_on)]
    arch: ModelArch | None = None
    if parsed.spec is not None:
        if reading.is_whole and parsed.spec.model != PLACEHOLDER:
            arch, unreadable = read_geometry(reading.source, parsed.spec)
            findings += unreadable
        findings += checks.run(reading.source, parsed.spec, arch, sizes_known=parsed.sizes_known)
    findings += lints.run(reading.file)
    findings = [f for f in findings if f.code not in _SAID_OTHERWISE]
    if purpose is Purpose.DEPLOY:
        findings = [f for f in findings if f.code not in _OF_THEIR_ENGINE]
    else:
        balanced = _has_slots_for_all(reading.file)
        findings = [f for f in findings if f.code.startswith(_FOR_BOTH) and not (balanced and f.code == _EXPERTS)]
    return TrtllmAnalysis(parsed.spec, arch, findings)


def _in_their_words(finding: Diagnostic, file: TrtllmFile) -> Diagnostic:
    """The advice to describe the generation instances, which is not about our short form here."""
    if finding.code != MISSING_KEY.code or file.generation is not None:
        return finding
    sections = {
        Kind.ORCHESTRATOR: "add a section `generation_servers`: somebody has to decode",
        Kind.BENCHMARK: "describe both roles in `worker_config: {ctx: ..., gen: ...}`: helixc serves them apart",
    }
    return replace(finding, help=sections.get(file.kind, finding.help), span=file.start)


def _has_slots_for_all(file: TrtllmFile) -> bool:
    """Whether an expert load balancer deals out slots, not experts, and these divide."""
    slots = {
        s.count("moe_config", "load_balancer", "num_slots"): s.size("moe_expert_parallel_size") for s in file.roles
    }
    return any(number is not None and number % ranks == 0 for number, ranks in slots.items())
