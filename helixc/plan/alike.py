"""Instances that differ in nothing but the numbers of their ranks: what is proven of one is proven of all."""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter

from helixc_runtime.manifest import Groups, Instance, Plan, Rank, Role

_groups = attrgetter(*(field.name for field in fields(Groups)))
# Where a rank runs and what it is called say nothing about what it does.
_NAMES = frozenset({"rank", "instance", "node", "device", "groups", "memory", "kernels"})
_traits = attrgetter(*(field.name for field in fields(Rank) if field.name not in _NAMES))


def distinct(plan: Plan, role: Role) -> tuple[Instance, ...]:
    """The first instance of each set of alike instances of `role`, in order."""
    found: dict[tuple[object, ...], Instance] = {}
    for instance in plan.instances:
        if instance.role == role:
            found.setdefault(_shape(plan, instance), instance)
    return tuple(found.values())


def members(plan: Plan, instance: Instance) -> list[Rank]:
    """The ranks of `instance`, in order."""
    return [plan.ranks[rank] for rank in instance.ranks]


def label(instance: Instance) -> str:
    """How messages name an instance."""
    return f"{instance.role} instance {instance.index}"


def _shape(plan: Plan, instance: Instance) -> tuple[object, ...]:
    """All that decides what an instance's ranks do, its ranks counted from its own first."""
    relative = (-instance.ranks[0]).__add__
    sizes = (instance.tp, instance.cp, instance.pp, instance.moe_tp, instance.moe_ep, instance.attention_dp)
    transports = (instance.exchange, instance.reduce_rows, instance.hop)
    ranks = members(plan, instance)
    groups = [tuple(map(relative, group)) for rank in ranks for group in _groups(rank.groups)]
    return (
        *sizes,
        *transports,
        instance.max_batch_size,
        tuple(map(relative, instance.ranks)),
        *map(_traits, ranks),
        *groups,
    )
