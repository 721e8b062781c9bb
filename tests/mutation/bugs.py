"""Layout bugs, planted one at a time into a finished plan: those the field has shipped, and those one letter away.

Four plans are damaged. "mla": latent attention, experts, two stages, two generation instances of 8 ranks after 4
context ranks. "gqa": 8 KV heads re-split from tp 4 to tp 2, ranks 4 to 7 generate. "dp": attention data parallelism.
"value": latent attention that exchanges values, ranks 2 to 5 generate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from helixc_runtime.manifest import Groups, Piece, Plan, Rank
from tests.deployments import plan_of, role
from tests.mutation.planting import (
    Mutation,
    boxed,
    cut,
    first_transfer,
    groups_by,
    on_groups,
    on_instances,
    on_pieces,
    on_rank,
    on_ranks,
    on_ranks_at,
    on_transfers,
    shifted,
)


@dataclass(frozen=True)
class Bug:
    """`rule`: the one of verify's rules that must name it, whatever else does."""

    what: str
    rule: str
    plant: Mutation
    plan: str = "mla"


def build(name: str) -> Plan:
    """The plan that bugs are planted into."""
    if name == "gqa":
        return plan_of("llama-3.1-8b", role(tp=4), role(tp=2, cp=2))
    if name == "dp":
        return plan_of("qwen3-235b-a22b", role(tp=2, dp=True), role(tp=2, cp=2, ep=2, dp=True))
    if name == "value":
        return plan_of("deepseek-v3-lite", role(tp=2), role(tp=2, cp=2, exchange_space="value"))
    return plan_of("deepseek-v3-lite", role(tp=2, pp=2), role(n=2, tp=2, cp=2, pp=2, ep=2, exchange_space="latent"))


def tp_innermost(_: Plan, rank: Rank) -> Rank:
    """As the first Helix implementation numbered them."""
    return replace(rank, tp_rank=rank.local_rank % 4 % 2, cp_rank=rank.local_rank % 4 // 2)


def swapped_stages(plan: Plan, rank: Rank) -> Rank:
    other = plan.ranks[rank.groups.pp[1 - rank.pp_rank]]
    return replace(rank, layers=other.layers)


def without_cp(plan: Plan, rank: Rank) -> Groups:
    """Groups of the attention mapping where the repurposed one is meant: the sum misses half the ranks."""
    return replace(rank.groups, ffn_tp=rank.groups.tp)


def crossed_pipelines(plan: Plan, rank: Rank) -> Rank:
    """Stage 1 believes to follow the neighbour's stage 0."""
    return replace(rank, groups=replace(rank.groups, pp=(rank.groups.pp[0] ^ 1, rank.rank)))


def expert_part_by_ep(rank: Rank, piece: Piece) -> Piece:
    return cut(piece, 1 if piece.name == "expert_down" else 0, 2, rank.moe_ep_rank)


def other_tensor(rank: Rank, piece: Piece) -> Piece:
    return replace(piece, tensor=piece.tensor.replace("gate_proj", "up_proj"))


def next_layers(rank: Rank, piece: Piece) -> Piece:
    assert piece.layers is not None
    return replace(piece, layers=tuple(layer + 1 for layer in piece.layers))


FFN = ("mlp_gate", "mlp_up", "mlp_down", "shared_gate", "shared_up", "shared_down")


def ffn_dim(piece: Piece) -> int:
    return 1 if piece.name.endswith("down") else 0


ORDER = (
    Bug("tp innermost in the rank order", "numbering", on_ranks(tp_innermost)),
    Bug("a rank calls itself by its neighbour's local rank", "numbering", on_rank(5, local_rank=0)),
    Bug("generation instances before the context instance", "numbering", on_instances(lambda i: (i[1], i[2], i[0]))),
    Bug(
        "an instance whose world leaves cp out",
        "references",
        on_instances(lambda i: (i[0], replace(i[1], ranks=i[1].ranks[:4]), i[2])),
    ),
    Bug(
        "a prefill that is one-sided",
        "transports",
        on_instances(lambda i: (replace(i[0], exchange="one_sided"), *i[1:])),
    ),
    Bug(
        "more rows summed one-sidedly than a batch has",
        "transports",
        on_instances(lambda i: (i[0], replace(i[1], reduce_rows=i[1].max_batch_size + 1), i[2])),
    ),
    Bug("ranks of two hosts that write into each other's memory", "transports", on_rank(5, node=1, device=0)),
    Bug(
        "two ranks of an instance in the wrong order",
        "numbering",
        on_instances(lambda i: (i[0], replace(i[1], ranks=(5, 4, *i[1].ranks[2:])), i[2])),
    ),
    Bug(
        "moe_tp * moe_ep is half the ranks", "numbering", on_instances(lambda i: (i[0], replace(i[1], moe_ep=1), i[2]))
    ),
    Bug("the FFN's rank read from the attention mapping", "numbering", on_rank(6, ffn_tp_rank=1)),
    Bug(
        "expert ranks read from the attention mapping",
        "numbering",
        on_ranks(lambda _, r: replace(r, moe_tp_rank=r.cp_rank, moe_ep_rank=r.tp_rank)),
    ),
    Bug("pipeline stages in reverse", "collectives", on_ranks(swapped_stages)),
    Bug("a layer that two stages run", "layers", on_rank(4, layers=(0, 15))),
    Bug("a layer that no stage runs", "layers", on_ranks_at(lambda _, r: replace(r, layers=(0, 13)), 4, 5, 6, 7)),
    Bug("a stage that takes itself for the last", "collectives", on_rank(4, layers=(0, 27))),
    Bug("two ranks on one GPU", "devices", on_rank(5, device=4)),
)

GROUPS = (
    Bug("a cp group across tp ranks", "groups", on_groups(4, cp=(4, 6))),
    Bug("the exchange runs over the tp group", "step", groups_by(lambda _, r: replace(r.groups, cp=r.groups.tp))),
    Bug(
        "tp and cp groups change places",
        "groups",
        groups_by(lambda _, r: replace(r.groups, cp=r.groups.tp, tp=r.groups.cp)),
    ),
    Bug("a group in reverse order", "groups", on_groups(5, tp=(7, 5))),
    Bug("one member sees its cp group in reverse", "collectives", on_groups(5, cp=(5, 4))),
    Bug(
        "all members see their cp group in reverse",
        "step",
        groups_by(lambda _, r: replace(r.groups, cp=r.groups.cp[::-1])),
    ),
    Bug("one rank sums over the attention's tp group", "collectives", on_groups(4, ffn_tp=(4, 6))),
    Bug("every rank sums over the attention's tp group", "step", groups_by(without_cp)),
    Bug("a rank that left its FFN group", "collectives", on_groups(7, ffn_tp=(7,))),
    Bug("an expert group of the other half", "groups", on_groups(9, moe_ep=(8, 10))),
    Bug(
        "moe_tp and moe_ep groups change places",
        "groups",
        groups_by(lambda _, r: replace(r.groups, moe_tp=r.groups.moe_ep, moe_ep=r.groups.moe_tp)),
    ),
    Bug("a pipeline into the other instance", "collectives", on_groups(4, pp=(4, 16))),
    Bug("a pipeline in reverse order", "collectives", on_groups(4, pp=(8, 4))),
    Bug("two pipelines crossed at the receiver", "collectives", on_ranks_at(crossed_pipelines, 8, 9)),
    Bug(
        "groups of the first instance in the second",
        "groups",
        lambda plan: on_ranks(lambda p, r: replace(r, groups=p.ranks[r.rank - 8].groups if r.instance else r.groups))(
            plan
        ),
    ),
    Bug(
        "an exchange across data-parallel ranks, which hold other rows",
        "collectives",
        groups_by(lambda _, r: replace(r.groups, cp=r.groups.tp)),
        "dp",
    ),
    Bug("a group member that does not exist", "references", on_groups(4, pp=(4, 99))),
)

HEADS = (
    Bug("a rank keeps its neighbour's heads", "exchange", on_rank(5, out_heads=(0, 4))),
    Bug(
        "o_proj rows of the tp-innermost order",
        "step",
        on_pieces("o")(lambda r, p: cut(p, 1, 4, r.cp_rank * 2 + r.tp_rank)),
    ),
    Bug("o_proj rows by the attention's tp rank", "step", on_pieces("o")(lambda r, p: cut(p, 1, 2, r.tp_rank))),
    Bug(
        "o_proj rows off by one head",
        "exchange",
        on_pieces("o")(lambda r, p: shifted(p, 1, 128 if r.ffn_tp_rank < 3 else 0)),
    ),
    Bug("W_UV of the heads before the exchange", "step", on_pieces("v_up")(lambda r, p: boxed(p, 0, r.q_heads))),
    Bug(
        "values by W_UV of the heads after the exchange",
        "step",
        on_pieces("v_up")(lambda r, p: boxed(p, 0, r.out_heads)),
        "value",
    ),
    Bug("values by the first tp rank's W_UV", "weights", on_pieces("v_up")(lambda r, p: boxed(p, 0, (0, 8))), "value"),
    Bug("values from one rank and latents from the other", "exchange", on_rank(3, exchange_space="latent"), "value"),
    Bug("W_UK of the heads after the exchange", "step", on_pieces("k_up")(lambda r, p: boxed(p, 0, r.out_heads))),
    Bug("W_UK takes the rows of W_UV", "weight-windows", on_pieces("k_up")(lambda r, p: boxed(p, 1, (128, 256)))),
    Bug("W_UV starts one row late", "step", on_pieces("v_up")(lambda r, p: boxed(p, 1, (129, 256)))),
    Bug("queries sharded over cp as well", "step", on_pieces("q")(lambda r, p: cut(p, 0, 4, r.ffn_tp_rank))),
    Bug(
        "the last query row is missing",
        "weights",
        on_pieces("q")(lambda r, p: boxed(p, 0, (p.box[0][0], p.box[0][1] - 1))),
    ),
    Bug("the latent projection is sharded", "step", on_pieces("kv_a")(lambda r, p: cut(p, 0, 2, r.cp_rank))),
    Bug("KV heads of the next tp rank", "kv-heads", on_rank(4, kv_heads=(4, 8)), "gqa"),
    Bug("keys of the next tp rank", "step", on_pieces("k")(lambda r, p: cut(p, 0, 2, 1 - r.tp_rank)), "gqa"),
    Bug("values of the next tp rank", "step", on_pieces("v")(lambda r, p: cut(p, 0, 2, 1 - r.tp_rank)), "gqa"),
    Bug(
        "KV heads sharded over tp * cp", "weights", on_pieces("k", "v")(lambda r, p: cut(p, 0, 4, r.ffn_tp_rank)), "gqa"
    ),
    Bug("dp ranks that split heads", "step", on_pieces("q")(lambda r, p: cut(p, 0, 2, r.tp_rank)), "dp"),
    Bug("o_proj rows by tp * cp under dp", "step", on_pieces("o")(lambda r, p: cut(p, 1, 4, r.ffn_tp_rank)), "dp"),
)

OWNERS = (
    Bug("two ranks of a group own the same blocks", "owners", on_rank(5, cp_rank=0)),
    Bug("the two owners change places", "numbering", on_ranks(lambda _, r: replace(r, cp_rank=1 - r.cp_rank))),
    Bug("a message with the next owner's blocks", "transfers", first_transfer(cp_rank=1)),
    Bug(
        "all messages with the next owner's blocks",
        "step",
        on_transfers(lambda found: tuple(replace(t, cp_rank=1 - t.cp_rank) for t in found)),
    ),
)

SHARDS = (
    Bug(
        "FFN shards by the attention's tp rank",
        "step",
        on_pieces(*FFN)(lambda r, p: cut(p, ffn_dim(p), 4, r.tp_rank)),
    ),
    Bug(
        "FFN replicated and still summed",
        "step",
        on_pieces("mlp_gate", "mlp_up", "mlp_down")(lambda r, p: cut(p, ffn_dim(p), 1, 0)),
    ),
    Bug(
        "gate and up of other columns than down",
        "step",
        on_pieces("mlp_down")(lambda r, p: cut(p, 1, 4, 3 - r.ffn_tp_rank)),
    ),
    Bug(
        "the shared expert on every rank",
        "weights",
        on_pieces("shared_gate", "shared_up", "shared_down")(lambda r, p: cut(p, ffn_dim(p), 1, 0)),
    ),
    Bug(
        "the same experts on every rank",
        "weights",
        on_pieces("expert_gate", "expert_up", "expert_down")(lambda r, p: replace(p, experts=(0, 32))),
    ),
    Bug("a rank that runs experts it did not load", "step", on_rank(5, experts=(0, 32))),
    Bug(
        "experts' columns by moe_ep rank",
        "step",
        on_pieces("expert_gate", "expert_up", "expert_down")(expert_part_by_ep),
    ),
    Bug("a sharded router", "step", on_pieces("router")(lambda r, p: cut(p, 0, 4, r.ffn_tp_rank))),
    Bug("a sharded norm", "weights", on_pieces("post_norm")(lambda r, p: cut(p, 0, 4, r.ffn_tp_rank))),
    Bug("a missing norm", "weights", on_pieces("input_norm")(lambda r, p: None)),
    Bug("embedding rows by the attention's tp rank", "step", on_pieces("embed")(lambda r, p: cut(p, 0, 4, r.tp_rank))),
    Bug("LM-head rows in reverse", "step", on_pieces("head")(lambda r, p: cut(p, 0, 4, 3 - r.ffn_tp_rank))),
    Bug("gate reads the tensor of up", "step", on_pieces("mlp_gate", "shared_gate")(other_tensor)),
    Bug("weights of the layers after", "weights", on_pieces("q")(next_layers)),
    Bug("a shard that does not exist", "references", on_rank(4, shard=999)),
)

SENDS = (
    Bug("a message that is never sent", "transfers", on_transfers(lambda found: found[1:])),
    Bug("a message sent twice", "transfers", on_transfers(lambda found: (found[0], *found))),
    Bug("a message to the neighbour", "transfers", first_transfer(target=1)),
    Bug(
        "two targets change places",
        "step",
        on_transfers(lambda f: (replace(f[0], target=f[1].target), replace(f[1], target=f[0].target), *f[2:])),
    ),
    Bug("a message from the other stage", "transfers", first_transfer(source=3)),
    Bug("one layer too few is sent", "transfers", first_transfer(layers=(0, 13))),
    Bug("layers of the next stage are sent", "step", first_transfer(layers=(14, 27))),
    Bug("KV heads of another sender", "step", first_transfer(source=2), "gqa"),
    Bug(
        "two senders change places",
        "step",
        on_transfers(lambda f: (replace(f[0], source=f[1].source), replace(f[1], source=f[0].source), *f[2:])),
        "gqa",
    ),
    Bug("a message to nobody", "references", first_transfer(target=64)),
    Bug("only one dp rank hands over", "transfers", on_transfers(lambda f: tuple(t for t in f if t.source == 0)), "dp"),
)

BUGS = (*ORDER, *GROUPS, *HEADS, *OWNERS, *SHARDS, *SENDS)
