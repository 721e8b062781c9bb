"""Sizes that a file's name claims: `..._ctxtp2_gentp1cp2_...`, `..._1k1k_ctx1_gen1_dep16_bs64_eplb0_mtp3_...`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

from helixc_runtime.manifest import Role

_ROLES: dict[str, Role] = {"ctx": "context", "gen": "generation"}
# A role with its sizes: `ctxtp2ep2pp2`, `gen1_dep16_bs64`, `2ctx`.
_ROLE = re.compile(
    r"(?<![a-z0-9])(?:(?P<before>\d+)x?)?(?P<role>ctx|gen)(?P<count>\d+)?"
    r"(?P<sizes>(?:_?(?:moe_?tp|tp|cp|pp|ep|dep|tep|bs)\d+)*)(?![a-z0-9])"
)
_SIZE = re.compile(r"(moe_?tp|tp|cp|pp|dep|tep|ep|bs)(\d+)")
_LENGTHS = re.compile(r"(?<![a-z0-9])(\d{1,4})k(\d{1,4})k(?![a-z0-9])")
_SPECULATION = re.compile(r"(?<![a-z0-9])(mtp|eplb)(\d+)(?![a-z0-9])")
_KEYS = {
    "tp": "tensor_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_parallel_size",
    "ep": "moe_expert_parallel_size",
    "bs": "max_batch_size",
    "moetp": "moe_tensor_parallel_size",
    "moe_tp": "moe_tensor_parallel_size",
}

PARALLEL_SIZES = frozenset(
    ("tensor_parallel_size", "context_parallel_size", "pipeline_parallel_size", "moe_expert_parallel_size")
)


@dataclass(frozen=True, slots=True)
class Claim:
    """What `token` of a name says: `key` of a role is `value`. The role is None for what is about the whole."""

    role: Role | None
    key: str
    value: int | bool
    token: str


def claims(stem: str) -> list[Claim]:
    """What the name of a file (without folder and ending) claims. Of two claims about one key the last counts."""
    lower = stem.lower()
    found = {(claim.role, claim.key): claim for claim in _all(lower)}
    return list(found.values())


def claimed_sizes(path: str) -> dict[Role, dict[str, int]]:
    """The parallel sizes that the name of the file at `path` claims, by role and key."""
    found: dict[Role, dict[str, int]] = {}
    for claim in claims(PurePath(path).stem):
        if claim.role is not None and claim.key in PARALLEL_SIZES:
            found.setdefault(claim.role, {})[claim.key] = int(claim.value)
    return found


def _all(name: str) -> Iterator[Claim]:
    for match in _ROLE.finditer(name):
        role = _ROLES[match["role"]]
        count = match["count"] or match["before"]
        if count:
            yield Claim(
                role, "num_instances", int(count), (match["before"] or "") + match["role"] + (match["count"] or "")
            )
        for size in _SIZE.finditer(match["sizes"]):
            yield from _of_size(role, size[1], int(size[2]), f"{match['role']} {size[0]}")
    for match in _LENGTHS.finditer(name):
        yield Claim(None, "input_length", int(match[1]) * 1024, match[0])
        yield Claim(None, "output_length", int(match[2]) * 1024, match[0])
    for match in _SPECULATION.finditer(name):
        yield Claim("generation", match[1], int(match[2]), match[0])


def _of_size(role: Role, name: str, size: int, token: str) -> Iterator[Claim]:
    """`dep16` is tp16 with attention data parallelism and its experts over all ranks, `tep16` the same without."""
    if name not in ("dep", "tep"):
        yield Claim(role, _KEYS[name], size, token)
        return
    yield Claim(role, "tensor_parallel_size", size, token)
    yield Claim(role, "moe_expert_parallel_size", size, token)
    yield Claim(role, "enable_attention_dp", name == "dep", token)
