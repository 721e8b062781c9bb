"""HX209: what a file's name says of its sizes."""

from __future__ import annotations

from collections.abc import Iterator

from helixc.checks.case import CP, MOE_EP, PP, TP, Case, Side
from helixc.checks.check import Finding, warning
from helixc.spec.file_name import claimed_sizes


@warning("HX209")
def name_tells_the_sizes(case: Case) -> Iterator[Finding]:
    """The file's name claims other sizes than its content.

    A name such as ctxtp2_gentp1cp2.yaml is read as the sizes of the deployment, and by people it is trusted. A size
    that the name leaves out claims nothing.
    """
    claims = claimed_sizes(case.source.path)
    for side in case.sides:
        sizes = _sizes(side)
        for key, claimed in claims.get(side.role, {}).items():
            found = sizes[key]
            if found is not None and found != claimed:
                short = _SHORT[key]
                message = f"the file's name says {short} {claimed} of {side.name}, but {short} is {found}"
                yield Finding(side.at(key), message, "rename the file, or correct the size")


_SHORT = {TP: "tp", CP: "cp", PP: "pp", MOE_EP: "ep"}


def _sizes(side: Side) -> dict[str, int | None]:
    return {TP: side.tp, CP: side.cp, PP: side.pp, MOE_EP: side.spec.moe_expert_parallel_size}
