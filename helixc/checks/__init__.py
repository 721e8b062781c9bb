"""All checks of a deployment, a function for each code. To add one, write it and name it here."""

from __future__ import annotations

from helixc.checks import helix, mapping, memory, model, placement
from helixc.checks.case import Case, ModelCase
from helixc.checks.check import Check
from helixc.diagnostics import Diagnostic, Rule
from helixc.spec.keys import repair
from helixc.spec.origin import Origins
from helixc.spec.source import Source
from helixc.spec.spec import Spec
from helixc_runtime.manifest import ModelArch

DEPLOYMENT_CHECKS: tuple[Check[Case], ...] = (
    mapping.partition_has_stages,
    helix.context_has_no_cp,
    helix.cp_type_is_helix,
    memory.cache_holds_a_block,
    memory.cache_holds_a_request,
    placement.hardware_suffices,
    placement.ranks_are_countable,
)
MODEL_CHECKS: tuple[Check[ModelCase], ...] = (
    mapping.moe_sizes_multiply,
    mapping.experts_divide,
    mapping.moe_sizes_need_experts,
    mapping.stages_have_layers,
    mapping.partition_has_all_layers,
    mapping.widths_have_ranks,
    mapping.vocabulary_has_ranks,
    helix.heads_divide,
    helix.kv_heads_divide,
    helix.kv_heads_are_duplicated,
    model.weights_exist,
    model.lengths_are_in_range,
)


def run(source: Source, spec: Spec, arch: ModelArch | None) -> list[Diagnostic]:
    """Findings of every check. Without a geometry, those of the checks that need none."""
    source, _ = repair(source)
    origins = Origins.of(source)
    case = Case(source, spec, origins)
    findings = [finding for check in DEPLOYMENT_CHECKS for finding in check.run(case)]
    if arch is not None:
        model_case = ModelCase(source, spec, origins, arch)
        findings += [finding for check in MODEL_CHECKS for finding in check.run(model_case)]
    return findings


def rules() -> tuple[Rule, ...]:
    """The rules of all checks."""
    return (*(check.rule for check in DEPLOYMENT_CHECKS), *(check.rule for check in MODEL_CHECKS))
