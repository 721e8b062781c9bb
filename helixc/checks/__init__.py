"""All checks of a deployment, a function for each code. To add one, write it and name it here."""

from __future__ import annotations

from helixc.checks import helix, kernels, mapping, memory, model, naming, placement
from helixc.checks.case import Case, ModelCase
from helixc.checks.check import Check
from helixc.diagnostics import Diagnostic, Rule, has_errors
from helixc.spec.keys import repair
from helixc.spec.origin import Origins
from helixc.spec.source import Source
from helixc.spec.spec import Spec
from helixc_runtime.manifest import ModelArch

DEPLOYMENT_CHECKS: tuple[Check[Case], ...] = (
    mapping.partition_has_stages,
    helix.context_has_no_cp,
    helix.cp_type_is_helix,
    helix.shards_have_blocks,
    helix.groups_have_rows,
    memory.cache_holds_a_block,
    memory.cache_holds_a_request,
    model.generation_holds_what_was_prefilled,
    model.roles_cache_alike,
    naming.name_tells_the_sizes,
    placement.hardware_suffices,
    placement.ranks_are_countable,
    placement.cp_groups_stay_together,
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
    helix.helix_pays,
    helix.latents_exist,
    memory.max_tokens_counts_one_rank,
    model.weights_exist,
    model.lengths_are_in_range,
)


LAYOUT_CHECKS: tuple[Check[ModelCase], ...] = (  # these lower the spec, which needs one without errors
    memory.memory_suffices,
    kernels.kernels_serve_the_model,
)
INDEPENDENT_OF_SIZES = frozenset(
    check.rule.code
    for check in (
        helix.context_has_no_cp,
        helix.cp_type_is_helix,
        helix.latents_exist,
        model.weights_exist,
        model.lengths_are_in_range,
        model.generation_holds_what_was_prefilled,
        model.roles_cache_alike,
    )
)


def run(source: Source, spec: Spec, arch: ModelArch | None, *, sizes_known: bool = True) -> list[Diagnostic]:
    """Findings of every check. Without a geometry, those of the checks that need none.

    Unless all `sizes_known`, the spec has defaults where the file has something unreadable; then only those checks run
    whose findings do not follow from that.
    """
    source, _ = repair(source)
    origins = Origins.of(source)
    case = Case(source, spec, origins)
    findings = [finding for check in DEPLOYMENT_CHECKS for finding in check.run(case)]
    if arch is not None:
        model_case = ModelCase(source, spec, origins, arch)
        findings += [finding for check in MODEL_CHECKS for finding in check.run(model_case)]
        if sizes_known and not has_errors(findings):
            findings += [finding for check in LAYOUT_CHECKS for finding in check.run(model_case)]
    return [finding for finding in findings if sizes_known or finding.code in INDEPENDENT_OF_SIZES]


def rules() -> tuple[Rule, ...]:
    """The rules of all checks."""
    return (
        *(check.rule for check in DEPLOYMENT_CHECKS),
        *(check.rule for check in MODEL_CHECKS),
        *(check.rule for check in LAYOUT_CHECKS),
    )
