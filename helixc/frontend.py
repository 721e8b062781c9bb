"""The front end as one step: a path becomes a checked deployment, or all that is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helixc import checks
from helixc.checks.model import MODEL_UNREADABLE
from helixc.checks.trtllm import rules as trtllm_rules
from helixc.diagnostics import Diagnostic, Rule, Span, has_errors, in_file_order
from helixc.geometry import read_geometry
from helixc.ignores import apply_ignores
from helixc.inputs import Input, read_input
from helixc.spec import rules as spec_rules
from helixc.spec.document import parse_yaml
from helixc.spec.model_reference import MODEL_NOT_FOUND
from helixc.spec.parse import parse
from helixc.spec.source import Source
from helixc.spec.spec import Spec
from helixc.spec.trtllm.dialect import Dialect, is_trtllm
from helixc.spec.trtllm.reading import Purpose
from helixc.trtllm import analyse_trtllm
from helixc_runtime.manifest import ModelArch


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is known of a file. If `ok` and `is_whole`, source, spec and arch are all there.

    `text` is what printers quote: the file's text, "" if it cannot be read.
    """

    file: str
    text: str
    source: Source | None
    spec: Spec | None
    arch: ModelArch | None
    diagnostics: tuple[Diagnostic, ...]

    @property
    def ok(self) -> bool:
        return not has_errors(self.diagnostics)

    @property
    def is_whole(self) -> bool:
        """Whether there is enough to build from; some files of TensorRT-LLM are sound but only a part."""
        return self.spec is not None and self.arch is not None


def analyse(path: Path | str) -> Analysis:
    """Read, type and check the deployment file at `path`. Never raises for a user's mistake."""
    return analyse_input(read_input(str(path)))


def analyse_input(given: Input, dialect: Dialect = Dialect.AUTO) -> Analysis:
    """Type and check a text, read in `dialect`. Never raises for a user's mistake."""
    file, text = given.file, given.text
    if text is None:
        return Analysis(file, "", None, None, None, given.findings)
    source, findings = parse_yaml(file, text)
    if source is None:
        return Analysis(file, text, None, None, None, tuple(in_file_order(findings)))
    spec, arch, found = _typed(source, dialect)
    findings += _without_follow_ups(found, findings)
    findings = apply_ignores(source, findings, all_rules())
    return Analysis(file, text, source, spec, arch, tuple(in_file_order(findings)))


def _typed(source: Source, dialect: Dialect) -> tuple[Spec | None, ModelArch | None, list[Diagnostic]]:
    """The deployment, its geometry and what is wrong with them, whoever's vocabulary the file is written in."""
    if is_trtllm(source, dialect):
        analysis = analyse_trtllm(source, Purpose.LINT if dialect is Dialect.TRTLLM else Purpose.DEPLOY)
        return analysis.spec, analysis.arch, analysis.findings
    parsed = parse(source)
    findings, arch = parsed.findings, None
    if parsed.spec is not None:
        if not any(finding.code == MODEL_NOT_FOUND.code for finding in findings):
            arch, model_findings = read_geometry(source, parsed.spec)
            findings += model_findings
        findings += checks.run(source, parsed.spec, arch, sizes_known=parsed.sizes_known)
    return parsed.spec, arch, findings


def all_rules() -> tuple[Rule, ...]:
    """The rules of every code, in the order of the codes."""
    rules = (*spec_rules.RULES, *checks.rules(), *trtllm_rules(), MODEL_NOT_FOUND, MODEL_UNREADABLE)
    return tuple(sorted(rules, key=lambda rule: rule.code))


def _without_follow_ups(findings: list[Diagnostic], earlier: list[Diagnostic]) -> list[Diagnostic]:
    """A value that could not even be read is reported once."""
    reported: set[Span] = {finding.span for finding in earlier}
    return [finding for finding in findings if finding.span not in reported]
