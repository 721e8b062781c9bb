"""HX6xx: ranks against GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from helixc.checks.case import Case
from helixc.checks.check import Finding, error
from helixc.diagnostics import counted

MAX_RANKS = 65_536


@error("HX601")
def hardware_suffices(case: Case) -> Iterator[Finding]:
    """The instances need more GPUs than the hardware has.

    Every rank of every instance sits on its own GPU: num_instances * tp * cp * pp, context and generation added up.
    With share_gpus a context and a generation rank may sit on the same GPU, and the larger side counts.
    """
    hardware = case.spec.hardware
    if hardware.nodes is None:
        return
    have = hardware.nodes * hardware.gpus_per_node
    sides = {side.role: side.ranks for side in case.sides}
    need = max(sides.values()) if hardware.share_gpus else sum(sides.values())
    if need > have:
        parts = " and ".join(f"{ranks} for {role}" for role, ranks in sides.items())
        nodes = counted(hardware.nodes, "node")
        message = f"{counted(need, 'GPU')} needed ({parts}), but {nodes} of {hardware.gpus_per_node} have {have}"
        help = f"use {counted(-(-need // hardware.gpus_per_node), 'node')} or smaller sizes"
        if not hardware.share_gpus and len(sides) == 2 and max(sides.values()) <= have:
            help += ", or `share_gpus: true` to let both roles use the same GPUs"
        yield Finding(case.source.value_span(("hardware", "nodes")), message, help)


@error("HX602")
def ranks_are_countable(case: Case) -> Iterator[Finding]:
    """The deployment has more ranks than a plan may hold.

    A plan lists every rank; more than 65,536 of them are taken for a slip of the pen.
    """
    for side in case.sides:
        if side.ranks > MAX_RANKS:
            message = f"{side.name} has {side.ranks:,} ranks"
            span = side.first_given("num_instances", "tensor_parallel_size")
            yield Finding(span, message, f"a plan holds at most {MAX_RANKS:,} ranks")
