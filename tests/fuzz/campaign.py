"""One fuzzing campaign: mutated files through the whole front end, and what must hold for each of them."""

from __future__ import annotations

import random
import re
import time
import traceback
import unicodedata
from collections import Counter
from dataclasses import dataclass, field

from helixc import __version__, annotations
from helixc.build import make_plan
from helixc.diagnostics import Diagnostic, Span
from helixc.frontend import Analysis, all_rules, analyse_input
from helixc.inputs import Input
from helixc.report import as_json, as_text
from helixc.spec.source import decode
from helixc.spec.trtllm.dialect import Dialect
from tests.fuzz.mutations import Mutator
from tests.fuzz.seeds import seeds

MAX_RANKS = 64  # larger deployments are checked, not planned: the campaign is about files, not about size
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_SLOW_S = 5.0


@dataclass(slots=True)
class Outcome:
    """What came of the files. `failures` holds (name, content, what happened)."""

    files: int = 0
    plans: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, bytes, str]] = field(default_factory=list)


def run(files: int, seed: int, give_up_after: int = 10) -> Outcome:
    """Analyse `files` mutated files drawn from `seed`; stop early at `give_up_after` failures."""
    rng = random.Random(seed)
    mutator = Mutator(rng, seeds())
    outcome = Outcome()
    while outcome.files < files and len(outcome.failures) < give_up_after:
        name, raw = mutator.file()
        outcome.files += 1
        try:
            problem = examine(name, raw, rng.choice((*Dialect, Dialect.AUTO)), outcome)
        except Exception:
            problem = traceback.format_exc()
        if problem:
            outcome.failures.append((name, raw, problem))
    return outcome


def examine(name: str, raw: bytes, dialect: Dialect, outcome: Outcome) -> str:
    """What is wrong with how helixc takes one file, "" if nothing is."""
    start = time.perf_counter()
    text, findings = decode(name, raw)
    analysis = analyse_input(Input(name, text, tuple(findings)), dialect)
    outcome.codes.update({finding.code for finding in analysis.diagnostics})
    for finding in analysis.diagnostics:
        problem = _problem(finding, text)
        if problem:
            return f"{problem}: {finding}"
    _print(analysis)
    if analysis.ok and analysis.is_whole:
        assert analysis.spec and analysis.arch
        roles = (role for role in (analysis.spec.context, analysis.spec.generation) if role)
        sizes = ("num_instances", "tensor_parallel_size", "context_parallel_size", "pipeline_parallel_size")
        ranks = 0
        for role in roles:
            product = 1
            for size in sizes:
                product *= getattr(role, size)
            ranks += product
        if ranks <= MAX_RANKS:
            make_plan(analysis.spec, analysis.arch, ())
            outcome.plans += 1
    elif not analysis.diagnostics:
        return "neither a plan nor a finding"
    took = time.perf_counter() - start
    return f"took {took:.1f} s" if took > _SLOW_S else ""


def _problem(finding: Diagnostic, text: str | None) -> str:
    for text_shown in (finding.message, finding.help or ""):
        if len(text_shown.splitlines()) > 1 or any(unicodedata.category(c) == "Cc" for c in text_shown):
            return "a message is not one line of text"
    if not finding.message.strip():
        return "the message is empty"
    spans = (finding.span, *(related.span for related in finding.related))
    return next((problem for span in spans if (problem := _outside(span, text))), "")


def _outside(span: Span, text: str | None) -> str:
    """Why `span` does not lie in the file."""
    if text is None:
        return ""  # the place of the first byte that is no text is known although there is no text
    lines = _LINE_BREAK.split(text)
    start, end = (span.line, span.column), (span.end_line, span.end_column)
    for line, column in (start, end):
        if not 1 <= line <= len(lines) or not 1 <= column <= len(lines[line - 1]) + 1:
            return f"{line}:{column} is outside of the file"
    return "" if start <= end else "the span ends before it starts"


def _print(analysis: Analysis) -> None:
    """Every printer takes every finding."""
    as_text(analysis.diagnostics, {analysis.file: analysis.text}).encode("utf-8", "backslashreplace")
    as_json(analysis.diagnostics)
    annotations.as_github(analysis.diagnostics)
    annotations.as_sarif(analysis.diagnostics, all_rules(), __version__)
