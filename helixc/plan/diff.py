"""What it takes to get from one plan to another: weights to load, KV that changes place, groups, memory, traffic.

A GPU keeps what is on it: ranks of the two plans are the same if they have the same role and run on the same GPU,
whatever their numbers, and weights count as there if any rank of the GPU had them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import gcd, lcm

from helixc.plan.collectives import decode_step, prefill, traffic
from helixc.plan.overlap import missing_elements
from helixc_runtime.manifest import DTYPE_BYTES, Groups, Instance, Piece, Plan, Rank, Role, owner

Gpu = tuple[int, int]  # node, device
_KINDS = tuple(field.name for field in fields(Groups))


@dataclass(frozen=True, slots=True)
class Change:
    """One quantity before and after."""

    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a role's instances."""

    instances: int
    ranks: int  # of one instance
    tp: int
    cp: int
    pp: int
    moe_tp: int
    moe_ep: int
    attention_dp: bool


@dataclass(frozen=True, slots=True)
class RoleChange:
    """A role in both plans; None: it has no instances there.

    `memory`: bytes of the fullest rank, by what takes them. `traffic`: bytes a token that the busiest rank puts into
    each kind of operation; a decoded token for generation, a prompt's token for context.
    """

    role: Role
    before: Layout | None
    after: Layout | None
    memory: dict[str, Change]
    traffic: dict[str, Change]

    @property
    def alike(self) -> bool:
        """Whether shape, memory and traffic stay."""
        changes = (*self.memory.values(), *self.traffic.values())
        return self.before == self.after and all(change.before == change.after for change in changes)


@dataclass(frozen=True, slots=True)
class RankChange:
    """A rank of the plan after. `was`: its number before, None if its GPU had no rank of this role.

    `load`: bytes of its `weights` that are not on its GPU yet. `groups`: the kinds whose GPUs are others than before.
    """

    rank: int
    was: int | None
    role: Role
    node: int
    device: int
    weights: int
    load: int
    groups: tuple[str, ...]

    @property
    def alike(self) -> bool:
        """Whether the rank stays as it is."""
        return self.was == self.rank and not self.load and not self.groups


@dataclass(frozen=True, slots=True)
class KvChange:
    """Bytes of a cached token in one generation instance, averaged over positions, all its ranks together.

    `moved`: of `after`, what is not yet on the GPU that shall have it.
    """

    before: float
    after: float
    moved: float


@dataclass(frozen=True, slots=True)
class Diff:
    """From plan `before` to plan `after`, by name. `same_model`: without it nothing loaded is of use.

    `freed`: ranks of the plan before whose GPU has no rank of their role any more. `handoff`: bytes that one token of
    a prompt sends from prefill to decode.
    """

    before: str
    after: str
    same_model: bool
    roles: tuple[RoleChange, ...]
    ranks: tuple[RankChange, ...]
    freed: tuple[int, ...]
    kv: KvChange
    handoff: Change

    @property
    def alike(self) -> bool:
        """Whether nothing at all would change."""
        parts: tuple[RoleChange | RankChange, ...] = (*self.roles, *self.ranks)
        return self.same_model and not self.freed and self.kv.moved == 0 and all(part.alike for part in parts)


def compare(before: Plan, after: Plan) -> Diff:
    """Everything that differs."""
    same = _same_model(before, after)
    roles: tuple[Role, ...] = ("context", "generation")
    present = tuple(role for role in roles if any(i.role == role for i in (*before.instances, *after.instances)))
    now = _by_gpu(after)
    return Diff(
        before=before.name,
        after=after.name,
        same_model=same,
        roles=tuple(_role(before, after, role) for role in present),
        ranks=tuple(_ranks(before, after, same)),
        freed=tuple(rank.rank for key, rank in _by_gpu(before).items() if key not in now),
        kv=_kv(before, after, same),
        handoff=Change(_handoff(before), _handoff(after)),
    )


def _same_model(before: Plan, after: Plan) -> bool:
    """Whether the same elements of the same dtype come from the same place."""
    a, b = before.model, after.model
    source = (a.checkpoint or a.name, a.load_format, a.dtype) == (b.checkpoint or b.name, b.load_format, b.dtype)
    return source and a.arch == b.arch and (a.load_format != "dummy" or a.seed == b.seed)


def _by_gpu(plan: Plan) -> dict[tuple[Role, Gpu], Rank]:
    return {(rank.role, (rank.node, rank.device)): rank for rank in plan.ranks}


# --- Roles ------------------------------------------------------------------------------------------------------


def _role(before: Plan, after: Plan, role: Role) -> RoleChange:
    sides = (before, after)
    memory, moved = (_pairs(*(measure(plan, role) for plan in sides)) for measure in (_memory, _traffic))
    return RoleChange(role, _layout(before, role), _layout(after, role), memory, moved)


def _pairs(before: dict[str, int], after: dict[str, int]) -> dict[str, Change]:
    return {name: Change(before.get(name, 0), after.get(name, 0)) for name in {**before, **after}}


def _layout(plan: Plan, role: Role) -> Layout | None:
    found = [i for i in plan.instances if i.role == role]
    if not found:
        return None
    i = found[0]
    return Layout(len(found), len(i.ranks), i.tp, i.cp, i.pp, i.moe_tp, i.moe_ep, i.attention_dp)


def _memory(plan: Plan, role: Role) -> dict[str, int]:
    found = [rank.memory for rank in plan.ranks if rank.role == role]
    if not found:
        return {}
    fullest = max(found, key=lambda memory: memory.total)
    kv = fullest.kv_per_token * fullest.kv_capacity_tokens
    return {"weights": fullest.weights, "kv": kv, "workspace": fullest.workspace, "total": fullest.total}


def _traffic(plan: Plan, role: Role) -> dict[str, int]:
    """Instances of one role are alike, so the first stands for all."""
    instance = next((i for i in plan.instances if i.role == role), None)
    if instance is None:
        return {}
    busiest: dict[str, int] = {}
    for number in instance.ranks:
        rank = plan.ranks[number]
        program = (decode_step if role == "generation" else prefill)(plan, instance, rank)
        for kind, size in traffic(plan, program).items():
            busiest[kind] = max(busiest.get(kind, 0), size)
    return busiest


# --- Ranks ------------------------------------------------------------------------------------------------------


def _ranks(before: Plan, after: Plan, same_model: bool) -> Iterator[RankChange]:
    then = _by_gpu(before)
    there, here = ([(rank.node, rank.device) for rank in plan.ranks] for plan in (before, after))
    on_gpu: dict[Gpu, list[int]] = defaultdict(list)
    for rank in before.ranks if same_model else ():
        on_gpu[rank.node, rank.device].append(rank.shard)
    known: dict[tuple[tuple[int, ...], int], int] = {}
    width = DTYPE_BYTES[after.model.dtype]
    for rank in after.ranks:
        was = then.get((rank.role, (rank.node, rank.device)))
        key = (tuple(on_gpu[rank.node, rank.device]), rank.shard)
        if key not in known:
            held: list[Piece] = [piece for shard in key[0] for piece in before.shards[shard]]
            known[key] = missing_elements(after.shards[rank.shard], held) * width
        yield RankChange(
            rank=rank.rank,
            was=was.rank if was else None,
            role=rank.role,
            node=rank.node,
            device=rank.device,
            weights=rank.memory.weights,
            load=known[key],
            groups=tuple(kind for kind in _KINDS if _group(here, rank, kind) != _group(there, was, kind)),
        )


def _group(places: list[Gpu], rank: Rank | None, kind: str) -> list[Gpu]:
    """The GPUs of a rank's group, its own alone where there was no rank."""
    members = getattr(rank.groups, kind) if rank else ()
    return [places[member] for member in members] if len(members) > 1 else []


# --- KV ---------------------------------------------------------------------------------------------------------


def _kv(before: Plan, after: Plan, same_model: bool) -> KvChange:
    """Of a request that stays with instance 0 and, under attention dp, with the first dp rank."""
    sides = before, after
    instances = [next(i for i in plan.instances if i.role == "generation") for plan in sides]
    ranks = [_holders(plan, i) for plan, i in zip(sides, instances, strict=True)]
    stored = [sum(r.memory.kv_per_token for r in found) / i.cp for found, i in zip(ranks, instances, strict=True)]
    kept = 0.0
    if same_model and before.model.kv_dtype == after.model.kv_dtype:
        shared = _shared_positions(before.tokens_per_block, instances[0].cp, after.tokens_per_block, instances[1].cp)
        then = {(r.node, r.device): r for r in ranks[0]}
        for rank in ranks[1]:
            if was := then.get((rank.node, rank.device)):
                common = _common(was.layers, rank.layers) * _common(was.kv_heads, rank.kv_heads)
                kept += common * after.model.kv_bytes * shared[was.cp_rank, rank.cp_rank]
    return KvChange(stored[0], stored[1], stored[1] - kept)


def _holders(plan: Plan, instance: Instance) -> list[Rank]:
    found = [plan.ranks[rank] for rank in instance.ranks]
    return [rank for rank in found if rank.tp_rank == 0] if instance.attention_dp else found


def _shared_positions(block_a: int, cp_a: int, block_b: int, cp_b: int) -> dict[tuple[int, int], float]:
    """The share of positions that rank i owned before and rank j owns after, by (i, j)."""
    step = gcd(block_a, block_b)  # neither rule changes owners inside such a run
    period = lcm(block_a * cp_a, block_b * cp_b)
    found: dict[tuple[int, int], float] = defaultdict(float)
    for position in range(0, period, step):
        found[owner(position, block_a, cp_a), owner(position, block_b, cp_b)] += step / period
    return found


def _common(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))


def _handoff(plan: Plan) -> int:
    """Bytes of one prompt token, averaged over positions; the first dp rank's where there are several."""
    source = next((i for i in plan.instances if i.role == "context"), None)
    if source is None:
        return 0
    target = next(i for i in plan.instances if i.role == "generation")
    moved = [
        t
        for t in plan.transfers
        if not (source.attention_dp and plan.ranks[source.ranks[t.source]].tp_rank)
        and not (target.attention_dp and plan.ranks[target.ranks[t.target]].tp_rank)
    ]
    return sum(map(plan.token_bytes, moved)) // target.cp
