"""Proof of a plan, before it is written: what the runtime relies on is checked on the finished plan itself.

Every rule reads the plan's records (coordinates, groups, boxes) and never the formulas that made them, so that a slip
in a formula shows here. The last two run the plan: `collectives` every rank's communication, against deadlock, and
`step` the arithmetic on symbols. A flaw is a bug of the compiler, never of the user.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

from helixc.plan.alike import label as _label
from helixc.plan.alike import members as _members
from helixc.plan.collectives import collectives
from helixc.plan.simulate import simulate
from helixc_runtime.attention_shape import MAX_PROCESSORS
from helixc_runtime.manifest import (
    Groups,
    Instance,
    Piece,
    Plan,
    Range,
    Rank,
    global_position,
    local_length,
    local_slot,
    owner,
)


@dataclass(frozen=True, slots=True)
class Flaw:
    """One broken rule: which, and where."""

    rule: str
    message: str


class InvalidPlan(Exception):
    """The plan breaks the rules listed in `flaws`; nothing is written."""

    def __init__(self, flaws: Sequence[Flaw]) -> None:
        lines = "\n".join(f"  {line}" for line in _told(flaws))
        super().__init__(f"the compiler made a plan that is wrong ({len(flaws)} flaws); please report it\n{lines}")
        self.flaws = tuple(flaws)


def _told(flaws: Sequence[Flaw], each: int = 4) -> Iterator[str]:
    """A few flaws of every broken rule."""
    by_rule: dict[str, list[Flaw]] = defaultdict(list)
    for flaw in flaws:
        by_rule[flaw.rule].append(flaw)
    for rule, found in by_rule.items():
        yield from (f"{rule}: {flaw.message}" for flaw in found[:each])
        if len(found) > each:
            yield f"{rule}: and {len(found) - each} more"


def verify(plan: Plan) -> None:
    """Raise InvalidPlan unless every rule holds."""
    if flaws := find_flaws(plan):
        raise InvalidPlan(flaws)


def find_flaws(plan: Plan) -> list[Flaw]:
    """All broken rules of `plan`. Where its numbers point at nothing, only that: the other rules follow them."""
    if flaws := [Flaw("references", message) for message in _references(plan)]:
        return flaws
    for rule, check in RULES:
        flaws += [Flaw(rule, message) for message in check(plan)]
    return flaws


# --- Ranks and groups -------------------------------------------------------------------------------------------


def _references(plan: Plan) -> Iterator[str]:
    """Every rank, shard, element and local rank that the plan names exists."""
    count = len(plan.ranks)
    sizes = {role: min(len(i.ranks) for i in plan.instances if i.role == role) for role in {r.role for r in plan.ranks}}
    for instance in plan.instances:
        if not instance.ranks or any(not 0 <= rank < count for rank in instance.ranks):
            yield f"{_label(instance)} has ranks {instance.ranks} of {count}"
        if not 1 <= instance.tp * instance.cp <= len(instance.ranks):
            yield f"{_label(instance)} has {len(instance.ranks)} ranks in stages of tp {instance.tp} x cp {instance.cp}"
    for rank in (*plan.ranks, plan.reference):
        if not 0 <= rank.shard < len(plan.shards):
            yield f"rank {rank.rank} has shard {rank.shard} of {len(plan.shards)}"
    for rank in plan.ranks:
        for kind in (field.name for field in fields(Groups)):
            group = getattr(rank.groups, kind)
            if not group or min(group) < 0 or max(group) >= count:
                yield f"rank {rank.rank} has the {kind} group {group}"
    for number, shard in enumerate(plan.shards):
        for piece in shard:
            if len(piece.box) != len(piece.shape) or not all(map(_within, piece.box, ((0, n) for n in piece.shape))):
                yield f"shard {number} holds {piece.box} of {piece.name}, which is {piece.shape}"
    for t in plan.transfers:
        if not (0 <= t.source < sizes.get("context", 0) and 0 <= t.target < sizes.get("generation", 0)):
            yield f"a transfer goes from local rank {t.source} to {t.target}"


def _numbering(plan: Plan) -> Iterator[str]:
    """Instances in order, contexts first; ranks consecutive; world = tp * cp * pp; rank order has cp innermost."""
    if [i.role for i in plan.instances] != sorted(i.role for i in plan.instances):  # "context" < "generation"
        yield "context instances do not come first"
    if [r for i in plan.instances for r in i.ranks] != list(range(len(plan.ranks))):
        yield "the instances' ranks are not 0, 1, 2, ..."
    for instance in plan.instances:
        if len(instance.ranks) != instance.tp * instance.cp * instance.pp:
            yield f"{_label(instance)} has {len(instance.ranks)} ranks"
        if instance.moe_tp * instance.moe_ep != instance.tp * instance.cp:
            yield f"{_label(instance)}: moe_tp * moe_ep is not tp * cp"
        for local, rank in enumerate(_members(plan, instance)):
            expected = (rank.pp_rank * instance.tp + rank.tp_rank) * instance.cp + rank.cp_rank
            if not local == rank.local_rank == expected or rank.rank != instance.ranks[local]:
                yield f"rank {rank.rank} is not at local rank {expected} of {_label(instance)}"
            if rank.ffn_tp_rank != rank.tp_rank * instance.cp + rank.cp_rank:
                yield f"rank {rank.rank}: ffn_tp_rank {rank.ffn_tp_rank}"
            if rank.moe_tp_rank * instance.moe_ep + rank.moe_ep_rank != rank.ffn_tp_rank:
                yield f"rank {rank.rank}: moe ranks ({rank.moe_tp_rank}, {rank.moe_ep_rank})"


# A group is all ranks of an instance that agree on these coordinates, ordered by the last one.
_GROUPS: dict[str, tuple[tuple[str, ...], str]] = {
    "tp": (("pp_rank", "cp_rank"), "tp_rank"),
    "cp": (("pp_rank", "tp_rank"), "cp_rank"),
    "pp": (("tp_rank", "cp_rank"), "pp_rank"),
    "ffn_tp": (("pp_rank",), "ffn_tp_rank"),
    "moe_tp": (("pp_rank", "moe_ep_rank"), "moe_tp_rank"),
    "moe_ep": (("pp_rank", "moe_tp_rank"), "moe_ep_rank"),
}


def _groups(plan: Plan) -> Iterator[str]:
    """Each kind of group partitions its instance, all members name the same group, in the order of the coordinate."""
    for instance in plan.instances:
        members = _members(plan, instance)
        for kind in (field.name for field in fields(Groups)):
            same, order = _GROUPS[kind]
            expected: dict[tuple[int, ...], list[Rank]] = defaultdict(list)
            for rank in members:
                expected[tuple(getattr(rank, name) for name in same)].append(rank)
            for ranks in expected.values():
                group = tuple(r.rank for r in sorted(ranks, key=lambda r: int(getattr(r, order))))
                for rank in ranks:
                    if getattr(rank.groups, kind) != group:
                        yield f"rank {rank.rank}: {kind} group {getattr(rank.groups, kind)}, expected {group}"


def _devices(plan: Plan) -> Iterator[str]:
    """No two ranks of one role share a GPU."""
    seen: dict[tuple[str, int, int], int] = {}
    for rank in plan.ranks:
        other = seen.setdefault((rank.role, rank.node, rank.device), rank.rank)
        if other != rank.rank:
            yield f"ranks {other} and {rank.rank} are both on node {rank.node} device {rank.device}"


def _layers(plan: Plan) -> Iterator[str]:
    """The stages of every instance tile the layers in order."""
    for instance in plan.instances:
        stages = sorted({(r.pp_rank, r.layers) for r in _members(plan, instance)})
        if len(stages) != instance.pp or not _tiles([s for _, s in stages], plan.model.arch.num_layers):
            yield f"{_label(instance)}: stages {[s for _, s in stages]}"


def _transports(plan: Plan) -> Iterator[str]:
    """Ranks that write into each other's memory are several, decode, and share a host."""
    for instance in plan.instances:
        kinds = {"cp": instance.exchange == "one_sided", "ffn_tp": instance.reduce_rows > 0}
        if any(kinds.values()) and instance.role != "generation":
            yield f"{_label(instance)}: only decode steps are one-sided"
        if not 0 <= instance.reduce_rows <= instance.max_batch_size:
            yield f"{_label(instance)}: sums of {instance.reduce_rows} rows, batches of {instance.max_batch_size}"
        yield from _hop(instance)
        for rank in _members(plan, instance):
            for name in (name for name, one_sided in kinds.items() if one_sided):
                group = [plan.ranks[member] for member in getattr(rank.groups, name)]
                if len(group) == 1 or len({member.node for member in group}) > 1:
                    yield f"rank {rank.rank}: one-sided in the {name} group {[member.rank for member in group]}"


def _hop(instance: Instance) -> Iterator[str]:
    """Rows in groups are exchanged, and no group is empty: a message must be sent to be answered."""
    hop = instance.hop
    if hop.groups > 1 and (instance.role != "generation" or instance.cp == 1):
        yield f"{_label(instance)}: {hop.groups} groups of rows, and no exchange"
    if not 1 <= hop.groups <= hop.rows <= instance.max_batch_size:
        yield f"{_label(instance)}: {hop.groups} groups of {hop.rows} rows, batches of {instance.max_batch_size}"
    if not 0 <= hop.processors < MAX_PROCESSORS:
        yield f"{_label(instance)}: {hop.processors} multiprocessors left to the exchange"


# --- Heads and KV -----------------------------------------------------------------------------------------------


def _exchange(plan: Plan) -> Iterator[str]:
    """cp ranks share their query heads and split them, in cp order, into what each holds after the exchange.

    That slice must be the row shard of o_proj that the rank owns; W_UV's heads are those where it is multiplied.
    """
    arch = plan.model.arch
    v_dim = arch.mla.v_head_dim if arch.mla else arch.head_dim
    for rank in plan.ranks:
        group = [plan.ranks[r] for r in rank.groups.cp]
        if any(r.q_heads != rank.q_heads or r.kv_heads != rank.kv_heads for r in group):
            yield f"rank {rank.rank}: its cp group does not share query and KV heads"
        if any(r.exchange_space != rank.exchange_space for r in group):
            yield f"rank {rank.rank}: its cp group exchanges in spaces {[r.exchange_space for r in group]}"
        slices = [r.out_heads for r in group]
        if not _tiles(slices, rank.q_heads[1], rank.q_heads[0]) or len({hi - lo for lo, hi in slices}) != 1:
            yield f"rank {rank.rank}: head slices {slices} after the exchange do not split {rank.q_heads} evenly"
        lo, hi = rank.out_heads
        multiplied = rank.q_heads if rank.exchange_space == "value" else rank.out_heads
        for piece in plan.shards[rank.shard]:
            if piece.name == "o" and piece.box[1] != (lo * v_dim, hi * v_dim):
                yield f"rank {rank.rank}: o_proj rows {piece.box[1]}, but it holds heads {rank.out_heads}"
            if piece.name == "v_up" and piece.box[0] != multiplied:
                yield f"rank {rank.rank}: W_UV heads {piece.box[0]}, but it multiplies heads {multiplied}"


def _kv_heads(plan: Plan) -> Iterator[str]:
    """The KV heads a rank caches are those its query heads attend to."""
    arch = plan.model.arch
    group = arch.num_heads // arch.num_kv_heads
    for rank in plan.ranks:
        lo, hi = rank.q_heads
        wanted = (lo // group, (hi - 1) // group + 1)
        if rank.kv_heads != wanted:
            yield f"rank {rank.rank}: KV heads {rank.kv_heads}, its queries {rank.q_heads} attend {wanted}"


def _owners(plan: Plan) -> Iterator[str]:
    """Every position has one owner per (layer, KV head) and its own slot there, for every copy of the cache."""
    for instance in plan.instances:
        cp_ranks: dict[tuple[int, int], list[int]] = defaultdict(list)
        for rank in _members(plan, instance):
            cp_ranks[rank.pp_rank, rank.tp_rank].append(rank.cp_rank)
        for (pp, tp), found in cp_ranks.items():
            if sorted(found) != list(range(instance.cp)):
                yield f"{_label(instance)}: cp ranks {found} at pp {pp}, tp {tp}"
    for cp in sorted({instance.cp for instance in plan.instances}):
        yield from _ownership(plan.tokens_per_block, cp)


def _ownership(block: int, cp: int) -> Iterator[str]:
    """The ownership formulas agree with counting, over three cycles of blocks."""
    counts = [0] * cp
    for position in range(3 * block * cp):
        rank = owner(position, block, cp)
        if local_slot(position, block, cp) != counts[rank]:
            yield f"position {position} is not in slot {counts[rank]} of cp rank {rank} (block {block}, cp {cp})"
        if global_position(counts[rank], block, cp, rank) != position:
            yield f"slot {counts[rank]} of cp rank {rank} is not position {position} (block {block}, cp {cp})"
        counts[rank] += 1
        if [local_length(position + 1, block, cp, r) for r in range(cp)] != counts:
            yield f"local lengths of {position + 1} tokens are not {counts} (block {block}, cp {cp})"


# --- Weights ----------------------------------------------------------------------------------------------------

# Which coordinates a weight's shard depends on. Ranks that agree on them hold the same elements; the others hold
# disjoint ones (KV heads excepted, which neighbours may duplicate); together they hold every element.
_HEADS, _KV, _OUT, _FFN, _MOE = ("tp_rank",), ("kv_heads",), ("tp_rank", "cp_rank"), ("ffn_tp_rank",), ("moe_tp_rank",)
SHARDED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("q", "q_bias", "q_b", "k_up"), _HEADS),
    **dict.fromkeys(("k", "k_bias", "v", "v_bias"), _KV),
    **dict.fromkeys(("o", "v_up"), _OUT),
    **dict.fromkeys(("embed", "head", "mlp_gate", "mlp_up", "mlp_down"), _FFN),
    **dict.fromkeys(("shared_gate", "shared_up", "shared_down"), _FFN),
    **dict.fromkeys(("expert_gate", "expert_up", "expert_down"), _MOE),
}


def _weights(plan: Plan) -> Iterator[str]:
    """Every element of every weight is held by exactly the ranks that should hold it."""
    checked: set[tuple[int, ...]] = set()
    for instance in plan.instances:
        members = _members(plan, instance)
        shards = tuple(rank.shard for rank in members)
        if shards in checked:
            continue
        checked.add(shards)
        for name in sorted({p.name for rank in members for p in plan.shards[rank.shard]}):
            holders = [(r, p) for r in members for p in plan.shards[r.shard] if p.name == name]
            yield from (f"{_label(instance)}: {name}: {flaw}" for flaw in _weight(plan, name, instance, holders))
        expected = {p.name for p in plan.shards[plan.reference.shard]}
        if missing := expected - {p.name for rank in members for p in plan.shards[rank.shard]}:
            yield f"{_label(instance)}: nobody loads {sorted(missing)}"
    for piece in plan.shards[plan.reference.shard]:
        if piece.name not in ("k_up", "v_up") and any(
            box != (0, size) for box, size in zip(piece.box, piece.shape, strict=True)
        ):
            yield f"the reference rank holds only {piece.box} of {piece.name}"


def _weight(plan: Plan, name: str, instance: Instance, holders: list[tuple[Rank, Piece]]) -> Iterator[str]:
    for stage in sorted({rank.pp_rank for rank, _ in holders}):
        here = [(rank, piece) for rank, piece in holders if rank.pp_rank == stage]
        if len(here) != instance.tp * instance.cp:
            yield f"{len(here)} ranks of stage {stage} hold it"
        for rank, piece in here:
            if piece.layers is not None and not all(rank.layers[0] <= i < rank.layers[1] for i in piece.layers):
                yield f"rank {rank.rank} loads layers outside {rank.layers}"
        if here[0][1].experts is not None:
            yield from _experts(plan, here)
        axes = _axes(name, instance, here[0][0])
        shards: dict[tuple[object, ...], set[tuple[Range, ...]]] = defaultdict(set)
        for rank, piece in here:
            shards[tuple(getattr(rank, axis) for axis in axes)].add(piece.box)
        if any(len(boxes) != 1 for boxes in shards.values()):
            yield f"ranks of stage {stage} that agree on {axes} hold different elements"
        yield from _covers(here[0][1], [next(iter(boxes)) for boxes in shards.values()], name)


def _axes(name: str, instance: Instance, rank: Rank) -> tuple[str, ...]:
    axes = SHARDED_BY.get(name, ())
    if name == "v_up" and rank.exchange_space == "value":
        axes = _HEADS
    return tuple(axis for axis in axes if not (instance.attention_dp and axis == "tp_rank"))


def _covers(piece: Piece, boxes: list[tuple[Range, ...]], name: str) -> Iterator[str]:
    """The boxes are disjoint along one dim, equal along the others, and together the whole tensor."""
    whole: list[Range] = [(0, size) for size in piece.shape]
    if name in ("k_up", "v_up"):  # each is a window of the rows of kv_b_proj; both together are all of them
        whole[1] = boxes[0][1]
    for dim, size in enumerate(whole):
        ranges = sorted({box[dim] for box in boxes})
        if not _tiles(ranges, size[1], size[0]):
            yield f"dim {dim} is {ranges}, expected to cover {size}"
    if len(set(boxes)) != len(boxes):
        yield "two shards hold the same elements"


def _experts(plan: Plan, holders: list[tuple[Rank, Piece]]) -> Iterator[str]:
    ranges: dict[int, set[Range | None]] = defaultdict(set)
    for rank, piece in holders:
        ranges[rank.moe_ep_rank].add(piece.experts)
        if piece.experts != rank.experts:
            yield f"rank {rank.rank} loads experts {piece.experts}, its range is {rank.experts}"
    found = sorted(next(iter(r)) or (0, 0) for r in ranges.values())
    total = plan.model.arch.moe.experts if plan.model.arch.moe else 0
    if any(len(r) != 1 for r in ranges.values()) or not _tiles(found, total):
        yield f"experts {found} over the moe_ep ranks"


def _windows(plan: Plan) -> Iterator[str]:
    """W_UK and W_UV are disjoint row windows of kv_b_proj that together hold every row."""
    for shard in plan.shards:
        by_name = {piece.name: piece for piece in shard}
        if "k_up" in by_name:
            rows = [by_name["k_up"].box[1], by_name["v_up"].box[1]]
            if not _tiles(rows, by_name["k_up"].shape[1]):
                yield f"W_UK and W_UV take rows {rows} of kv_b_proj"


# --- Handoff ----------------------------------------------------------------------------------------------------


def _transfers(plan: Plan) -> Iterator[str]:
    """Each generation rank gets every (layer, KV head) of its cache once, from a rank that has it."""
    context = next((i for i in plan.instances if i.role == "context"), None)
    if context is None:
        return
    generation = next(i for i in plan.instances if i.role == "generation")
    sources, targets = _members(plan, context), _members(plan, generation)
    # Under attention DP the sender is the tp rank that has the request: every choice must cover everything.
    choices: Iterable[int | None] = range(context.tp) if context.attention_dp else (None,)
    for choice in choices:
        received: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for t in plan.transfers:
            source, target = sources[t.source], targets[t.target]
            if choice is not None and source.tp_rank != choice:
                continue
            if t.cp_rank != target.cp_rank:
                yield f"{t.source} -> {t.target} carries blocks of cp rank {t.cp_rank}, not {target.cp_rank}"
            if not (_within(t.layers, source.layers) and _within(t.kv_heads, source.kv_heads)):
                yield f"{t.source} -> {t.target} sends layers {t.layers} heads {t.kv_heads} that the source lacks"
            received[t.target] += [(i, h) for i in range(*t.layers) for h in range(*t.kv_heads)]
        for target in targets:
            wanted = [(i, h) for i in range(*target.layers) for h in range(*target.kv_heads)]
            if sorted(received[target.local_rank]) != wanted:
                yield f"generation local rank {target.local_rank} does not receive each (layer, KV head) once"


RULES: tuple[tuple[str, Callable[[Plan], Iterator[str]]], ...] = (
    ("numbering", _numbering),
    ("groups", _groups),
    ("devices", _devices),
    ("layers", _layers),
    ("transports", _transports),
    ("exchange", _exchange),
    ("kv-heads", _kv_heads),
    ("owners", _owners),
    ("weights", _weights),
    ("weight-windows", _windows),
    ("transfers", _transfers),
    ("collectives", collectives),
    ("step", simulate),
)


def _tiles(ranges: Sequence[Range], end: int, start: int = 0) -> bool:
    """Whether `ranges`, in order, are exactly [start, end)."""
    for lo, hi in ranges:
        if lo != start or hi < lo:
            return False
        start = hi
    return start == end


def _within(inner: Range, outer: Range) -> bool:
    return outer[0] <= inner[0] <= inner[1] <= outer[1]
