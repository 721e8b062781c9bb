"""One step, executed on symbols: which inputs each output element is the sum of, on every rank of an instance.

A symbol stands for one query head over one share of the cache, one column of an FFN, one row of a vocabulary. Ranks
compute with the slices their pieces name and communicate as the runtime does, and after each sum over the repurposed
ranks every symbol must be there exactly once. Nothing here asks how a slice came about, only what the arithmetic makes
of it. Layers whose ranks hold the same slices are alike: one of each kind is executed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest

from helixc.plan.alike import distinct, label, members
from helixc.plan.collectives import by_request
from helixc.plan.contributions import not_once
from helixc_runtime.manifest import Instance, Mla, ModelArch, Piece, Plan, Range, Rank, split

Slices = dict[str, Piece]  # what one rank computes one layer with, by the runtime's name
Meaning = tuple[str, tuple[int, ...], tuple[int, ...] | None]  # of a weight's name: tensor, shape and layers
Read = tuple[int, int | None]  # a query head, and the KV head it attends to; None: the latent, which all share


@dataclass(frozen=True, slots=True)
class Worker:
    """A rank at work on one layer, or on the embedding and logits."""

    rank: Rank
    slices: Slices

    def rows(self, name: str, dim: int = 0) -> Range:
        """The elements of `name` that the rank holds along `dim`; none where it has no such weight."""
        piece = self.slices.get(name)
        return piece.box[dim] if piece else (0, 0)


def simulate(plan: Plan) -> Iterator[str]:
    """What is wrong with the results of a step of any instance, and with the cache it starts from."""
    contexts, generations = (distinct(plan, role) for role in ("context", "generation"))
    for instance in (*contexts, *generations):
        yield from (f"{label(instance)}: {flaw}" for flaw in _instance(plan, instance))
    for source, target in product(contexts, generations):
        yield from _handoff(plan, source, target)


def _instance(plan: Plan, instance: Instance) -> Iterator[str]:
    yield from _tensors(plan, instance)
    ranks = members(plan, instance)
    yield from _pipelines(plan, ranks)
    outside = {rank.rank: Worker(rank, {p.name: p for p in _pieces(plan, rank) if p.layers is None}) for rank in ranks}
    inside = {rank.rank: _by_layer(plan, rank) for rank in ranks}
    for group in dict.fromkeys(rank.groups.ffn_tp for rank in ranks):
        team = [plan.ranks[member] for member in group]
        if not all(rank.rank in outside for rank in team):
            yield f"the sum over {group} leaves the instance"
            continue
        if team[0].layers[0] == 0:
            yield from _embedding(plan, [outside[rank.rank] for rank in team])
        if team[0].layers[1] == plan.model.arch.num_layers:
            yield from _logits(plan, [outside[rank.rank] for rank in team])
        seen = set()
        for layer in range(*team[0].layers):
            kind = tuple(inside[rank.rank].get(layer, ()) for rank in team)
            if kind not in seen:
                seen.add(kind)
                workers = [Worker(r, {p.name: p for p in own}) for r, own in zip(team, kind, strict=True)]
                yield from (f"layer {layer}: {flaw}" for flaw in _layer(plan, instance, layer, workers))


def _pieces(plan: Plan, rank: Rank) -> tuple[Piece, ...]:
    return plan.shards[rank.shard]


def _by_layer(plan: Plan, rank: Rank) -> dict[int, tuple[Piece, ...]]:
    """The pieces that each layer of a rank computes with."""
    found: dict[int, list[Piece]] = defaultdict(list)
    for piece in _pieces(plan, rank):
        for layer in piece.layers or ():
            found[layer].append(piece)
    return {layer: tuple(pieces) for layer, pieces in found.items()}


def _tensors(plan: Plan, instance: Instance) -> Iterator[str]:
    """Each rank has every weight its layers compute with, and a name means what it means to the unsharded reference."""
    stages: dict[Range, dict[str, Meaning]] = {}
    for rank in members(plan, instance):
        if rank.layers not in stages:
            stages[rank.layers] = _meanings(plan, rank.layers)
        expected = stages[rank.layers]
        found = [(piece.name, (piece.tensor, piece.shape, piece.layers)) for piece in _pieces(plan, rank)]
        for name, meaning in found:
            if meaning != expected.get(name):
                yield f"rank {rank.rank} loads {name} as {meaning}, expected {expected.get(name)}"
        if missing := expected.keys() - dict(found).keys():
            yield f"rank {rank.rank} does not load {sorted(missing)}"
        if len(dict(found)) != len(found):
            yield f"rank {rank.rank} loads a weight twice"


def _meanings(plan: Plan, layers: Range) -> dict[str, Meaning]:
    """What a rank of the stage `layers` loads, by name."""
    found: dict[str, Meaning] = {}
    for piece in plan.shards[plan.reference.shard]:
        inside = None if piece.layers is None else tuple(i for i in piece.layers if layers[0] <= i < layers[1])
        ends = layers[0] == 0 if piece.name == "embed" else layers[1] == plan.model.arch.num_layers
        if inside or (inside is None and ends):
            found[piece.name] = (piece.tensor, piece.shape, inside)
    return found


def _pipelines(plan: Plan, ranks: Sequence[Rank]) -> Iterator[str]:
    """A hidden state that follows the pipeline passes every layer once, in order."""
    for group in dict.fromkeys(rank.groups.pp for rank in ranks):
        passed = [layer for member in group for layer in range(*plan.ranks[member].layers)]
        if passed != list(range(plan.model.arch.num_layers)):
            yield f"along the pipeline {group} a token passes layers {[plan.ranks[m].layers for m in group]}"


# --- Embedding and logits ---------------------------------------------------------------------------------------


def _embedding(plan: Plan, workers: Sequence[Worker]) -> Iterator[str]:
    """Each token's row comes from one rank, and is its own."""
    terms = []
    for worker in workers:
        lo, hi = split(plan.model.arch.vocab_size, len(workers), worker.rank.ffn_tp_rank)
        if worker.rows("embed") != (lo, hi):
            yield f"rank {worker.rank.rank} looks tokens {lo}-{hi - 1} up in rows {worker.rows('embed')} of embed"
        terms.append((lo, hi))
    if fault := not_once(terms, (0, plan.model.arch.vocab_size)):
        yield f"embedding: tokens {fault}"


def _logits(plan: Plan, workers: Sequence[Worker]) -> Iterator[str]:
    """The gathered parts, in group order, are the scores of tokens 0, 1, 2, ..."""
    for index, worker in enumerate(workers):
        shown = split(plan.model.arch.vocab_size, len(workers), index)
        if worker.rows("head") != shown:
            yield f"rank {worker.rank.rank} scores tokens {worker.rows('head')} of head, which are taken for {shown}"
        if worker.rows("norm") != (0, plan.model.arch.hidden_size):
            yield f"rank {worker.rank.rank} norms with {worker.rows('norm')} of norm"


# --- Layers -----------------------------------------------------------------------------------------------------


def _layer(plan: Plan, instance: Instance, layer: int, workers: Sequence[Worker]) -> Iterator[str]:
    yield from _replicated(workers)
    arch = plan.model.arch
    # Under attention dp a request's rows are zero on all other dp ranks.
    dp_ranks = sorted({w.rank.tp_rank for w in workers}) if instance.attention_dp else [None]
    held: dict[int, list[Read]] = {w.rank.rank: _reads(arch, w) for w in workers}
    for dp_rank in dp_ranks:
        team = [worker for worker in workers if dp_rank in (None, worker.rank.tp_rank)]
        yield from _attention(plan, team, held)
    if arch.is_moe(layer):
        yield from _mixture(arch, workers)
    else:
        yield from _mlp(workers, "mlp", arch.intermediate_size)


def _replicated(workers: Sequence[Worker]) -> Iterator[str]:
    """Norms, biases of sums, routers and latent projections are whole on every rank."""
    for worker in workers:
        for name, piece in worker.slices.items():
            whole = tuple((0, size) for size in piece.shape)
            if name not in _SLICED and piece.box != whole:
                yield f"rank {worker.rank.rank} computes with {piece.box} of {name}, which nobody completes"


# What the ranks of a stage may hold parts of; of all else a part would be a part only.
_SLICED = {
    *("q", "q_bias", "q_b", "k", "k_bias", "v", "v_bias", "k_up", "v_up", "o"),
    *(f"{family}_{part}" for family in ("mlp", "shared", "expert") for part in ("gate", "up", "down")),
}


def _reads(arch: ModelArch, worker: Worker) -> list[Read]:
    """What each query of a rank attends to, by its local index: the heads of its q rows, of its k and v rows.

    A query whose slices do not fit each other is head -1.
    """
    name = "q_b" if "q_b" in worker.slices else "q"
    unit = worker.slices[name].shape[0] // arch.num_heads if name in worker.slices else 1
    heads = [row // unit if row % unit == 0 else -1 for row in range(*worker.rows(name), unit)]
    if arch.mla:
        return [(head if head == key else -1, None) for head, key in zip_longest(heads, range(*worker.rows("k_up")))]
    for weight in ("q", "k", "v"):
        if f"{weight}_bias" in worker.slices and worker.rows(f"{weight}_bias") != worker.rows(weight):
            return [(-1, None)] * len(heads)
    keys, values = ([row // arch.head_dim for row in range(*worker.rows(n), arch.head_dim)] for n in ("k", "v"))
    if not keys or keys != values or len(heads) % len(keys):
        return [(-1, None)] * len(heads)
    share = len(heads) // len(keys)  # queries that read one local KV head
    return [(head, keys[index // share]) for index, head in enumerate(heads)]


def _attention(plan: Plan, workers: Sequence[Worker], reads: dict[int, list[Read]]) -> Iterator[str]:
    """The sum of o_proj's products has every head once, each over the whole cache and against its own rows."""
    arch = plan.model.arch
    group_size = arch.num_heads // arch.num_kv_heads
    products: list[Range] = []
    for worker in workers:
        rank = worker.rank
        received, fault = _exchanged(plan, rank, reads)
        if fault:
            yield f"rank {rank.rank}: {fault}"
            continue
        for head, kv_head in received:
            if kv_head is not None and head // group_size != kv_head:
                yield f"rank {rank.rank}: head {head} attends KV head {kv_head}, not {head // group_size}"
        yield from _products(arch, worker, [head for head, _ in received])
        if arch.mla:
            multiplied = reads[rank.rank] if rank.exchange_space == "value" else received
            yield from _values(arch.mla, worker, [head for head, _ in multiplied])
        products += [(head, head + 1) for head, _ in received]
    if fault := not_once(products, (0, arch.num_heads)):
        yield f"attention: heads {fault} in the sum of o_proj over ranks {[w.rank.rank for w in workers]}"


def _exchanged(plan: Plan, rank: Rank, reads: dict[int, list[Read]]) -> tuple[list[Read], str | None]:
    """The heads `rank` holds after exchange and combine, or what is wrong with the partials it combines."""
    group = rank.groups.cp
    if rank.rank not in group:
        return [], f"exchanges over {group}, without itself"
    place = group.index(rank.rank)
    slots: list[list[Read]] = []
    shares: list[Range] = []  # of the cache, in units of every cp-th block
    for sender in group:
        own = reads.get(sender, [])
        share = len(own) // len(group)
        slots.append(own[place * share : (place + 1) * share])
        shares.append((plan.ranks[sender].cp_rank, plan.ranks[sender].cp_rank + 1))
    for sender, received in zip(group, slots, strict=True):
        if received != slots[0]:
            return [], f"combines heads {_heads(slots[0])} with heads {_heads(received)} of rank {sender}"
    if fault := not_once(shares, (0, len(group))):
        return [], f"combines the cache's shares of cp ranks {fault}"
    return slots[0], None


def _heads(reads: Sequence[Read]) -> str:
    heads = [head for head, _ in reads]
    return f"{heads[0]}-{heads[-1]}" if len(heads) > 1 else str(heads)


def _products(arch: ModelArch, worker: Worker, heads: Sequence[int]) -> Iterator[str]:
    """Each held head is multiplied with the rows of o_proj that belong to it."""
    width = arch.mla.v_head_dim if arch.mla else arch.head_dim
    first, end = worker.rows("o", 1)
    if [first + slot * width for slot in range(len(heads))] != [head * width for head in heads]:
        yield f"rank {worker.rank.rank}: heads {list(heads)} meet o_proj rows from {first} on"
    elif end - first != len(heads) * width:
        yield f"rank {worker.rank.rank}: {len(heads)} heads of {width} meet {end - first} o_proj rows"


def _values(mla: Mla, worker: Worker, heads: Sequence[int]) -> Iterator[str]:
    """Each of `heads`, of the partials before or after the exchange, is multiplied with its own rows of W_UV."""
    if list(range(*worker.rows("v_up"))) != list(heads):
        yield f"rank {worker.rank.rank}: heads {list(heads)} meet heads {worker.rows('v_up')} of W_UV"
    windows, nope = (worker.rows("k_up", 1), worker.rows("v_up", 1)), mla.qk_nope_head_dim
    if windows != ((0, nope), (nope, nope + mla.v_head_dim)):
        yield f"rank {worker.rank.rank}: W_UK and W_UV are rows {windows} of a head in kv_b_proj"


def _mlp(workers: Sequence[Worker], name: str, size: int) -> Iterator[str]:
    """Every inner column once; gate, up and down of a rank are of the same columns."""
    for worker in workers:
        yield from _columns(worker, name)
    if fault := not_once((worker.rows(f"{name}_down", 1) for worker in workers), (0, size)):
        yield f"{name}: inner columns {fault} in the sum over ranks {[w.rank.rank for w in workers]}"


def _columns(worker: Worker, name: str) -> Iterator[str]:
    parts = worker.rows(f"{name}_gate"), worker.rows(f"{name}_up"), worker.rows(f"{name}_down", 1)
    if len(set(parts)) != 1:
        yield f"rank {worker.rank.rank}: {name} multiplies columns {parts[0]} and {parts[1]} with rows {parts[2]}"


def _mixture(arch: ModelArch, workers: Sequence[Worker]) -> Iterator[str]:
    """Every expert's every inner column once. A chosen expert is looked up at its distance from the rank's first."""
    assert arch.moe is not None
    columns: dict[int, list[Range]] = defaultdict(list)
    for worker in workers:
        yield from _columns(worker, "expert")
        experts = worker.rank.experts or (0, 0)
        for name in ("expert_gate", "expert_up", "expert_down"):
            loaded = worker.slices[name].experts if name in worker.slices else None
            if loaded != experts:
                yield f"rank {worker.rank.rank} runs experts {experts} with the weights {loaded} of {name}"
        for expert in range(*experts):
            columns[expert].append(worker.rows("expert_down", 1))
    faults: dict[str, list[Range]] = defaultdict(list)  # experts with the same fault, told once
    for expert in sorted({*columns, *range(arch.moe.experts)}):
        if fault := not_once(columns[expert], (0, arch.moe.intermediate_size)):
            faults[fault].append((expert, expert + 1))
    for fault, found in faults.items():
        yield f"experts {found[0][0]}..{found[-1][0]} ({len(found)}): inner columns {fault}"
    if arch.moe.shared_intermediate_size:
        yield from _mlp(workers, "shared", arch.moe.shared_intermediate_size)


# --- Handoff ----------------------------------------------------------------------------------------------------


def _handoff(plan: Plan, source: Instance, target: Instance) -> Iterator[str]:
    """What a generation rank finds in its cache is what it would have put there itself."""
    arch = plan.model.arch
    for moved in by_request(plan, source, target):
        for t in moved:
            sender, receiver = plan.ranks[source.ranks[t.source]], plan.ranks[target.ranks[t.target]]
            if t.cp_rank != receiver.cp_rank:
                yield f"rank {receiver.rank} stores blocks of cp rank {t.cp_rank} as those of {receiver.cp_rank}"
            if not (sender.layers[0] <= t.layers[0] <= t.layers[1] <= sender.layers[1]):
                yield f"rank {sender.rank} sends layers {t.layers} and has {sender.layers}"
            if arch.mla:
                continue
            sent, expected = (_made(plan, arch, end, t.kv_heads) for end in (sender, receiver))
            if sent is None or sent != expected:
                yield f"rank {receiver.rank} stores KV heads {sent} of rank {sender.rank} as {expected}"


def _made(plan: Plan, arch: ModelArch, rank: Rank, heads: Range) -> Range | None:
    """The KV heads that `rank`'s own projection makes at the places which the plan calls `heads`."""
    rows = next((piece.box[0] for piece in _pieces(plan, rank) if piece.name == "k"), None)
    if rows is None or heads[0] < rank.kv_heads[0] or heads[1] > rank.kv_heads[1]:
        return None
    first = rows[0] // arch.head_dim + heads[0] - rank.kv_heads[0]
    return first, first + heads[1] - heads[0]
