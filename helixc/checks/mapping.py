"""HX2xx: sizes that must fit each other and the model's layers, experts and widths."""

from __future__ import annotations

from collections.abc import Iterator

from helixc.checks.case import CP, MOE_EP, MOE_TP, PP, TP, Case, ModelCase, Side
from helixc.checks.check import Finding, error, warning
from helixc.diagnostics import counted, divisors, listed


@error("HX201")
def moe_sizes_multiply(case: ModelCase) -> Iterator[Finding]:
    """moe_tensor_parallel_size * moe_expert_parallel_size is not tp * cp.

    For MoE layers the tp * cp ranks of a stage are repurposed into moe_tp * moe_ep ranks, all of them. If one of the
    two sizes is given, the other follows; if none is, moe_tp is tp * cp.
    """
    if case.arch.moe is None:
        return
    for side in case.sides:
        tp, ep, ranks = side.spec.moe_tensor_parallel_size, side.spec.moe_expert_parallel_size, side.ffn_ranks
        if (tp or 1) * (ep or 1) == ranks or (not (tp and ep) and ranks % (tp or ep or 1) == 0):
            continue
        span = side.first_given(MOE_EP, MOE_TP)
        if tp and ep:
            message = f"moe_tp {tp} x moe_ep {ep} is {tp * ep}, but {side.name} has {side.grid} = {ranks} ranks a stage"
            help = "give one of the two sizes; the other follows"
        else:
            size = f"moe_ep {ep}" if ep else f"moe_tp {tp}"
            message = f"{size} does not divide the {side.grid} = {ranks} ranks a stage of {side.name}"
            help = f"choose among {listed(divisors(ranks))}"
        yield Finding(span, message, help, side.related("moe_tp is given here", MOE_TP, span))


@error("HX202")
def experts_divide(case: ModelCase) -> Iterator[Finding]:
    """The experts do not divide over the expert-parallel ranks.

    Every rank of an expert-parallel group holds the same number of experts.
    """
    if case.arch.moe is None:
        return
    for side in case.sides:
        tp, ep = _moe_sizes(side)
        derived = side.spec.moe_expert_parallel_size is None
        if derived and tp * ep != side.ffn_ranks:
            continue  # HX201 reports it
        if case.arch.moe.experts % ep != 0:
            message = f"{case.arch.moe.experts} experts do not divide over moe_ep {ep} of {side.name}"
            choices = [d for d in divisors(case.arch.moe.experts) if side.ffn_ranks % d == 0]
            yield Finding(side.first_given(MOE_EP, MOE_TP), message, f"choose moe_ep among {listed(choices)}")


@warning("HX203")
def moe_sizes_need_experts(case: ModelCase) -> Iterator[Finding]:
    """MoE sizes are given for a model without experts.

    They have no effect: a dense model's FFN is split over all tp * cp ranks.
    """
    if case.arch.moe is not None:
        return
    for side in case.sides:
        for key, size in ((MOE_TP, side.spec.moe_tensor_parallel_size), (MOE_EP, side.spec.moe_expert_parallel_size)):
            if (size or 1) > 1:
                message = f"{key} {size} has no effect: {case.arch.architecture} has no experts"
                yield Finding(side.at(key), message, "remove it")


@error("HX204")
def stages_have_layers(case: ModelCase) -> Iterator[Finding]:
    """There are more pipeline stages than layers.

    Every stage runs at least one layer, so pipeline_parallel_size is at most the model's number of layers.
    """
    for side in case.sides:
        if side.pp > case.arch.num_layers:
            message = f"pp {side.pp} of {side.name} exceeds the model's {case.arch.num_layers} layers"
            yield Finding(side.at(PP), message, f"use pp {case.arch.num_layers} or less")


@error("HX205")
def partition_has_stages(case: Case) -> Iterator[Finding]:
    """pp_partition does not list one number of layers for every pipeline stage.

    Its length is pipeline_parallel_size: the first number is the first stage's layers, and so on.
    """
    for side in case.sides:
        parts = side.spec.pp_partition
        if parts is not None and len(parts) != side.pp:
            span = side.at("pp_partition")
            message = f"pp_partition of {side.name} lists {counted(len(parts), 'stage')}, but pp is {side.pp}"
            help = f"list {counted(side.pp, 'number')}, or set pipeline_parallel_size to {len(parts)}"
            yield Finding(span, message, help, side.related("pp is given here", PP, span))


@error("HX206")
def partition_has_all_layers(case: ModelCase) -> Iterator[Finding]:
    """The numbers of pp_partition do not add up to the model's layers.

    Every layer belongs to exactly one stage. Without pp_partition the layers are split evenly, and the first stages
    get one more where they do not divide.
    """
    for side in case.sides:
        parts, layers = side.spec.pp_partition, case.arch.num_layers
        if parts is not None and len(parts) == side.pp and sum(parts) != layers:
            message = f"pp_partition of {side.name} adds up to {sum(parts)}, but the model has {layers} layers"
            each, more = divmod(layers, side.pp)
            even = ", ".join(str(each + (stage < more)) for stage in range(side.pp))
            yield Finding(side.at("pp_partition"), message, f"an even split is [{even}]; it is the default")


@error("HX207")
def widths_have_ranks(case: ModelCase) -> Iterator[Finding]:
    """An FFN is narrower than the number of ranks that split it.

    Dense FFNs and shared experts are split over tp * cp ranks, each routed expert over moe_tp ranks. Every rank holds
    at least one column.
    """
    arch, moe = case.arch, case.arch.moe
    for side in case.sides:
        widths = [("the shared experts", moe.shared_intermediate_size, side.ffn_ranks)] if moe else []
        if moe is None or len(moe.layers) < arch.num_layers:
            widths.append(("the dense FFN", arch.intermediate_size, side.ffn_ranks))
        if moe is not None:
            widths.append(("an expert", moe.intermediate_size, _moe_sizes(side)[0]))
        for what, width, ranks in widths:
            if 0 < width < ranks:
                message = f"{what} is {width} wide, but {ranks} ranks of {side.name} split it"
                yield Finding(side.first_given(CP, TP), message, f"keep tp * cp at or below {width}")


@error("HX208")
def vocabulary_has_ranks(case: ModelCase) -> Iterator[Finding]:
    """The vocabulary is smaller than the number of ranks that split it.

    The embedding and the LM head are split over tp * cp ranks.
    """
    for side in case.sides:
        if case.arch.vocab_size < side.ffn_ranks:
            message = f"{side.ffn_ranks} ranks of {side.name} split a vocabulary of {case.arch.vocab_size}"
            yield Finding(side.first_given(CP, TP), message, f"keep tp * cp at or below {case.arch.vocab_size}")


def _moe_sizes(side: Side) -> tuple[int, int]:
    """(moe_tp, moe_ep) with the missing one derived; HX201 reports sizes that do not multiply."""
    tp, ep = side.spec.moe_tensor_parallel_size, side.spec.moe_expert_parallel_size
    if tp is None:
        return side.ffn_ranks // (ep or 1), ep or 1
    return tp, ep or max(side.ffn_ranks // tp, 1)
