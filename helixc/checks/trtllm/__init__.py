"""HX91x to HX95x: what TensorRT-LLM would do silently, or refuse late, with one of its files; a function a code."""

from __future__ import annotations

from helixc.checks.check import Check
from helixc.checks.trtllm import features, history, lengths, names, roles, urls, values
from helixc.diagnostics import Diagnostic, Rule
from helixc.spec.trtllm import rules as reading
from helixc.spec.trtllm.servers import TrtllmFile

CHECKS: tuple[Check[TrtllmFile], ...] = (
    features.cp_type_is_given,
    features.blocks_are_given,
    features.features_combine,
    features.reuse_is_off,
    features.model_is_served,
    history.was_once_wrong,
    urls.urls_parse,
    urls.urls_differ,
    urls.urls_are_counted,
    roles.top_level_agrees,
    roles.roles_agree,
    roles.transceivers_agree,
    roles.context_hands_over,
    lengths.buffer_holds_a_prompt,
    lengths.units_are_clear,
    lengths.benchmark_fits,
    lengths.batch_fits_the_budget,
    lengths.prompts_fit_the_budget,
    names.name_tells_the_numbers,
    values.none_is_not_null,
    values.graphs_are_for_batches,
)


def run(file: TrtllmFile) -> list[Diagnostic]:
    """Findings of every check."""
    return [finding for check in CHECKS for finding in check.run(file)]


def rules() -> tuple[Rule, ...]:
    """The rules of all findings about TensorRT-LLM's files."""
    return (*reading.RULES, *(check.rule for check in CHECKS))
