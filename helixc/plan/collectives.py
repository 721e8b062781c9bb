"""The order in which every rank communicates, read off the plan, and the proof that nobody waits forever.

The orders here are those of helixc_runtime (engine.py, models/decoder.py, handoff.py), operation for operation; a test
records what the runtime does and compares. A launch is made of phases, each of which ends by itself:

- prefill of one prompt by a context instance, up to its first token;
- admission to a generation instance, while requests wait, and the handoff of each prompt's KV to it;
- one decode step of a generation instance, up to the chosen tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import product

from helixc.plan.alike import distinct, label, members
from helixc.plan.rendezvous import Op, Program, flaws
from helixc_runtime.manifest import DTYPE_BYTES, PAGE_BYTES, REPLY_BYTES, Instance, Plan, Rank, Transfer, split

TOKEN_ID_BYTES = 8


def collectives(plan: Plan) -> Iterator[str]:
    """Every group's members agree on the order of what they issue, and every message has both its ends."""
    contexts, generations = (distinct(plan, role) for role in ("context", "generation"))
    for instance in contexts:
        programs = {rank.rank: prefill(plan, instance, rank) for rank in members(plan, instance)}
        yield from (f"{label(instance)}, prefill: {flaw}" for flaw in flaws(programs))
    for source, target in product(contexts, generations):
        for moved in by_request(plan, source, target):
            yield from (f"handoff: {flaw}" for flaw in flaws(handoff(plan, source, target, moved)))
    for instance in generations:
        admitted = {rank.rank: admission(instance) for rank in members(plan, instance)}
        yield from (f"{label(instance)}, admission: {flaw}" for flaw in flaws(admitted))
        yield from (f"{label(instance)}, decode: {flaw}" for flaw in _strangers(plan, instance))
        for groups in sorted({1, instance.hop.groups}):
            programs = {rank.rank: decode_step(plan, instance, rank, groups) for rank in members(plan, instance)}
            yield from (f"{label(instance)}, decode: {flaw}" for flaw in flaws(programs))


def prefill(plan: Plan, instance: Instance, rank: Rank) -> Program:
    """What a context rank issues for one prompt. Sizes are a token's; the logits are those of one token."""
    return [*_stage(plan, rank, exchanges=0), *_logits(plan, rank), *_token(instance, 1)]


def admission(instance: Instance) -> Program:
    """What a generation rank issues to learn which requests start; once more when the last has ended."""
    return list(_control(instance, instance.ranks[0], 2 * instance.max_batch_size + 1, "admission"))


def decode_step(plan: Plan, instance: Instance, rank: Rank, groups: int = 1, *, greedy: bool = False) -> Program:
    """What a generation rank issues in one step; under attention dp also for the rows of others, as empty ones.

    `groups` of rows are exchanged one after another; the sizes are those of one token.
    Only in several stages are the tokens told: the ranks of one stage gather the same logits, and choose the same. A
    `greedy` step, without a row to draw for, gathers no more than each rank's largest, and which token that is of.
    """
    return [
        *_stage(plan, rank, exchanges=groups),
        *(_largest(plan, rank) if greedy else _logits(plan, rank)),
        *(_token(instance, instance.max_batch_size) if instance.pp > 1 else ()),
    ]


def handoff(plan: Plan, source: Instance, target: Instance, moved: Iterable[Transfer]) -> Mapping[int, Program]:
    """What every rank of both instances issues for one prompt's KV.

    `moved`: the transfers of that prompt, one of `by_request`. Sizes of KV are those of one token that is owned.
    Between peers it is no message: the receiver tells its pages, the sender writes into them and replies.
    """
    programs: dict[int, list[Op]] = {rank: [] for rank in (*source.ranks, *target.ranks)}

    def message(source: int, target: int, size: int, what: str) -> None:
        programs[source].append(Op("post", (source, target), size, what))
        programs[target].append(Op("take", (source, target), size, what))

    ends = {t: (source.ranks[t.source], target.ranks[t.target]) for t in moved}
    peers = {t: pair for t, pair in ends.items() if plan.shares(*(plan.ranks[rank] for rank in pair))}
    pages = PAGE_BYTES * plan.most_pages(target)
    for t, (sender, receiver) in peers.items():  # all are told before the receiver waits for anything
        programs[receiver].append(Op("post", (receiver, sender), pages, f"pages for {_kv(t)}"))
    for t in (t for t in ends if t not in peers):
        message(*ends[t], plan.token_bytes(t), _kv(t))
    for t, (sender, receiver) in peers.items():
        programs[sender].append(Op("take", (receiver, sender), pages, f"pages for {_kv(t)}"))
        message(sender, receiver, REPLY_BYTES, f"written: {_kv(t)}")
    return programs


def _kv(t: Transfer) -> str:
    return f"KV of layers {t.layers}, heads {t.kv_heads}, blocks of cp rank {t.cp_rank}"


def by_request(plan: Plan, source: Instance, target: Instance) -> list[tuple[Transfer, ...]]:
    """The transfers of one prompt, for every choice of the data-parallel ranks that attend for it at both ends."""
    found: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for t in plan.transfers:
        sender, receiver = plan.ranks[source.ranks[t.source]], plan.ranks[target.ranks[t.target]]
        choice = (sender.tp_rank * source.attention_dp, receiver.tp_rank * target.attention_dp)
        found[choice].append(t)
    return [tuple(moved) for moved in found.values()]


def traffic(plan: Plan, program: Program) -> dict[str, int]:
    """Bytes a token that one rank puts into each kind of operation on the way of the model's data."""
    total: dict[str, int] = defaultdict(int)
    for op in program:
        if op.kind not in ("broadcast", "recv", "take"):
            total[op.kind] += op.size
    return dict(total)


# --- The phases, piece by piece ---------------------------------------------------------------------------------


def _stage(plan: Plan, rank: Rank, *, exchanges: int) -> Iterator[Op]:
    """Decoder._stage: embedding or the previous stage's output, this rank's layers, the next stage."""
    hidden = plan.model.arch.hidden_size * DTYPE_BYTES[plan.model.dtype]
    first, end = rank.layers
    if first == 0:
        yield from _group("all_reduce", rank.groups.ffn_tp, hidden, "embedding")
    else:
        yield Op("recv", (_neighbour(rank, -1), rank.rank), hidden, f"input of layer {first}")
    for layer in range(first, end):
        for _ in range(exchanges):
            yield from _group("exchange", rank.groups.cp, _partials(plan, rank), f"layer {layer} partials")
        yield from _group("all_reduce", rank.groups.ffn_tp, hidden, f"layer {layer} o_proj")
        yield from _group("all_reduce", rank.groups.ffn_tp, hidden, f"layer {layer} FFN")
    if end != plan.model.arch.num_layers:
        yield Op("send", (rank.rank, _neighbour(rank, 1)), hidden, f"input of layer {end}")


def _neighbour(rank: Rank, step: int) -> int:
    """The rank of the stage before or after; the rank itself, which no message allows, where there is none."""
    stage = rank.pp_rank + step
    return rank.groups.pp[stage] if 0 <= stage < len(rank.groups.pp) else rank.rank


def _partials(plan: Plan, rank: Rank) -> int:
    """Bytes of one token's partials and their LSE: what the rank keeps included."""
    heads, width = rank.q_heads[1] - rank.q_heads[0], plan.model.arch.exchanged_dim(rank.exchange_space)
    return heads * (width * DTYPE_BYTES[plan.model.dtype] + DTYPE_BYTES["float32"])


def _logits(plan: Plan, rank: Rank) -> Iterator[Op]:
    if rank.layers[1] == plan.model.arch.num_layers:
        parts = len(rank.groups.ffn_tp)
        widest = max(hi - lo for lo, hi in (split(plan.model.arch.vocab_size, parts, i) for i in range(parts)))
        yield from _group("all_gather", rank.groups.ffn_tp, widest * DTYPE_BYTES[plan.model.dtype], "logits")


def _largest(plan: Plan, rank: Rank) -> Iterator[Op]:
    """A logit and a token, in float64."""
    if rank.layers[1] == plan.model.arch.num_layers:
        yield from _group("all_gather", rank.groups.ffn_tp, 16, "largest logits")


def _token(instance: Instance, count: int) -> Iterator[Op]:
    """Session.broadcast of what the sampler, the first rank of the last stage, has chosen."""
    yield from _control(instance, instance.ranks[-instance.tp * instance.cp], count, "tokens")


def _control(instance: Instance, source: int, count: int, what: str) -> Iterator[Op]:
    if len(instance.ranks) > 1:
        yield Op("broadcast", instance.ranks, (count + 1) * TOKEN_ID_BYTES, what, source)


def _group(kind: str, ranks: tuple[int, ...], size: int, what: str) -> Iterator[Op]:
    """A collective; a group of one has nobody to talk to."""
    if len(ranks) > 1:
        yield Op(kind, ranks, size, what)  # type: ignore[arg-type]


def _strangers(plan: Plan, instance: Instance) -> Iterator[str]:
    """Under attention dp the ranks of a cp group share a data-parallel rank, and with it their rows' KV."""
    for rank in members(plan, instance) if instance.attention_dp else ():
        for member in rank.groups.cp:
            if plan.ranks[member].tp_rank != rank.tp_rank:
                yield f"rank {rank.rank} exchanges with rank {member}, which holds the KV of other rows"
