"""HX6xx: ranks against GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from helixc.checks.case import CP, Case
from helixc.checks.check import Finding, error, warning
from helixc.diagnostics import counted
from helixc.hardware import GPUS

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


@warning("HX603")
def cp_groups_stay_together(case: Case) -> Iterator[Finding]:
    """A cp group crosses the border of an NVLink domain.

    Every layer of every decode step waits for the exchange in the cp group. Between GPUs of one NVLink domain it takes
    microseconds; over the network it takes several times as long. Ranks are placed in order, context instances first,
    and a cp group is cp consecutive ranks. The domain is that of `hardware: {gpu: ...}` (8 GPUs, or the 72 of a gb200
    or gb300 rack), otherwise a host with `hardware: {gpus_per_node: ...}`; without either nothing is checked.
    """
    hardware = case.spec.hardware
    if any(hardware_suffices.find(case)):
        return  # HX601: there is no placement yet
    gpu = GPUS.get(hardware.gpu or "")
    if gpu is None and ("hardware", "gpus_per_node") not in case.source.spans:
        return
    spans_hosts = gpu is not None and gpu.domain > gpu.gpus_per_node
    domain = gpu.domain if gpu and spans_hosts else hardware.gpus_per_node
    first = 0
    for side in case.sides:
        if hardware.share_gpus:
            first = 0
        groups = range(first, first + side.ranks, side.cp)
        torn = [rank for rank in groups if rank // domain != (rank + side.cp - 1) // domain]
        if side.cp > 1 and torn and side.ranks <= MAX_RANKS:
            what = f"NVLink domains of {domain} GPUs" if gpu else f"hosts of {domain} GPUs"
            more = f" ({len(torn) - 1} more do)" if len(torn) > 1 else ""
            message = f"the cp group on GPUs {torn[0]} to {torn[0] + side.cp - 1} of {side.name} crosses {what}{more}"
            yield Finding(side.first_given(CP), message, _together(side.cp, domain, first))
        first += side.ranks


def _together(cp: int, domain: int, first: int) -> str:
    if cp > domain:
        return f"use a context_parallel_size of {domain} or less, and more tp or pp"
    if first % domain:
        return f"{first} GPUs are taken before: make that a multiple of {domain}, or cp a divisor of both"
    return f"choose a context_parallel_size that divides {domain}"
