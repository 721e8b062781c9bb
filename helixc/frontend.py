"""The front end as one step: a path becomes a checked deployment, or all that is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helixc import checks
from helixc.checks.model import MODEL_UNREADABLE
from helixc.diagnostics import Diagnostic, Rule, Span, has_errors, in_file_order
from helixc.model import ModelError, read_model
from helixc.spec import rules as spec_rules
from helixc.spec.document import parse_yaml
from helixc.spec.model_reference import MODEL_NOT_FOUND
from helixc.spec.parse import parse
from helixc.spec.source import Source, read_text
from helixc.spec.spec import Spec
from helixc_runtime.manifest import ModelArch


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is known of a file. If `ok`, source, spec and arch are all there.

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


def analyse(path: Path | str) -> Analysis:
    """Read, type and check the deployment file at `path`. Never raises for a user's mistake."""
    text, findings = read_text(path)
    if text is None:
        return Analysis(str(path), "", None, None, None, tuple(findings))
    source, findings = parse_yaml(str(path), text)
    if source is None:
        return Analysis(str(path), text, None, None, None, tuple(in_file_order(findings)))
    spec, parse_findings = parse(source)
    findings += _without_follow_ups(parse_findings, findings)
    arch: ModelArch | None = None
    if spec is not None:
        if not any(finding.code == MODEL_NOT_FOUND.code for finding in findings):
            arch, model_findings = _read_model(source, spec)
            findings += model_findings
        findings += checks.run(source, spec, arch)
    return Analysis(str(path), text, source, spec, arch, tuple(in_file_order(findings)))


def all_rules() -> tuple[Rule, ...]:
    """The rules of every code, in the order of the codes."""
    rules = (*spec_rules.RULES, *checks.rules(), MODEL_NOT_FOUND, MODEL_UNREADABLE)
    return tuple(sorted(rules, key=lambda rule: rule.code))


def _without_follow_ups(findings: list[Diagnostic], earlier: list[Diagnostic]) -> list[Diagnostic]:
    """A value that could not even be read is reported once."""
    reported: set[Span] = {finding.span for finding in earlier}
    return [finding for finding in findings if finding.span not in reported]


def _read_model(source: Source, spec: Spec) -> tuple[ModelArch | None, list[Diagnostic]]:
    try:
        return read_model(spec.model), []
    except ModelError as error:
        return None, [MODEL_UNREADABLE.at(source.value_span(("model",)), str(error), error.help)]
