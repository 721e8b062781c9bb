"""Which kernels a plan needs: one set for every distinct attention shape of its generation ranks."""

from __future__ import annotations

from helixc.codegen.problem import KernelSpec, problems
from helixc_runtime.attention_shape import attention_shape
from helixc_runtime.manifest import Instance, Model, Plan, Rank


def select(plan: Plan, arches: tuple[str, ...]) -> tuple[KernelSpec, ...]:
    """Every distinct kernel of the plan for each architecture, in the order of the ranks that first need it."""
    cp = {(instance.role, instance.index): instance.cp for instance in plan.instances}
    shapes = dict.fromkeys(
        (attention_shape(plan.model, rank, plan.tokens_per_block), cp[rank.role, rank.instance])
        for rank in plan.ranks
        if rank.role == "generation"
    )
    specs = dict.fromkeys(spec for arch in arches for shape, size in shapes for spec in problems(shape, size, arch))
    assert len({(spec.name, spec.arch) for spec in specs}) == len(specs), "two problems share a name"
    return tuple(specs)


def names_for(arches: tuple[str, ...], model: Model, rank: Rank, instance: Instance, block: int) -> tuple[str, ...]:
    """Names of the kernels `rank` of `instance` runs on any of `arches`; context ranks prefill in torch, with none."""
    if instance.role == "context":
        return ()
    shape = attention_shape(model, rank, block)
    return tuple(dict.fromkeys(spec.name for arch in arches for spec in problems(shape, instance.cp, arch)))
