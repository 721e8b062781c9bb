"""A plan for people: what is deployed, what is repurposed into what, and one row a rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from helixc.diagnostics import counted
from helixc.table import aligned, byte_size
from helixc_runtime.manifest import Hop, Instance, Memory, Model, ModelArch, Plan, Range, Rank

_HEAD = (
    *("rank", "node:gpu", "pp tp cp", "layers", "q heads", "kv heads", "tp group", "cp group", "pp group"),
    *("held after exchange", "ffn tp", "ffn group", "moe tp group", "moe ep group", "experts"),
)


def to_text(plan: Plan) -> str:
    """The whole plan. Instances of one role are alike, so only the first of each is listed rank by rank."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    yield plan.name
    yield _model(plan.model)
    for role in ("context", "generation"):
        instances = [i for i in plan.instances if i.role == role]
        if instances:
            yield ""
            yield from _role(plan, instances)
    yield ""
    if plan.transfers:
        yield _handoff(plan)
    if plan.kernels:
        yield "kernels: " + ", ".join(dict.fromkeys(kernel.name for kernel in plan.kernels))


def _model(model: Model) -> str:
    arch = model.arch
    heads = f"{arch.num_heads} heads"
    if arch.mla:
        attention = f"MLA {heads}, latent {arch.mla.kv_lora_rank} + rope {arch.mla.qk_rope_head_dim}"
    else:
        attention = f"GQA {heads} over {arch.num_kv_heads} KV heads of {arch.head_dim}"
    experts = f", {arch.moe.experts} experts (top {arch.moe.top_k})" if arch.moe else ""
    weights = "random weights" if model.load_format == "dummy" else f"weights from {model.checkpoint}"
    dtype = model.dtype if model.kv_dtype == model.dtype else f"{model.dtype}, KV {model.kv_dtype}"
    return f"{model.name}: {arch.num_layers} layers, {attention}{experts}; {dtype}, {weights}"


def _role(plan: Plan, instances: Sequence[Instance]) -> Iterator[str]:
    first = instances[0]
    count = f"{len(instances)} instance{'s' if len(instances) > 1 else ''}"
    yield f"{first.role}: {count} of {len(first.ranks)} rank{'s' if len(first.ranks) > 1 else ''}"
    yield f"  attention  pp {first.pp} x tp {first.tp} x cp {first.cp}{_attention_dp(first)}"
    yield f"  ffn        the same ranks as pp {first.pp} x tp {first.tp * first.cp}{_moe(plan.model, first)}"
    if first.cp > 1:
        yield f"  KV         block j ({plan.tokens_per_block} tokens) of a request belongs to cp rank j % {first.cp}"
    yield from _transports(plan, first)
    yield f"  batch      at most {first.max_batch_size} requests of at most {first.max_seq_len:,} tokens"
    ranks = [plan.ranks[r] for r in first.ranks]
    columns = list(zip(_HEAD, *map(_row, ranks), strict=True))
    shown = [column for column in columns if set(column[1:]) != {"-"}]
    yield from aligned(zip(*shown, strict=True), indent="  ")
    yield from _memory(ranks)
    if len(instances) > 1:
        others = f"ranks {instances[1].ranks[0]} to {instances[-1].ranks[-1]}"
        yield f"  the other {len(instances) - 1} of them alike: {others}"


def _transports(plan: Plan, instance: Instance) -> Iterator[str]:
    """How a decode step's ranks exchange and sum, where there are several."""
    ways = []
    if instance.cp > 1:
        way = "one-sided" if instance.exchange == "one_sided" else "by all-to-all"
        ways.append(f"exchange {way}{_space(plan.model.arch, plan.ranks[instance.ranks[0]])}")
    if instance.tp * instance.cp > 1:
        ways.append(f"sums {_sums(instance)}")
    if ways and instance.role == "generation":
        yield f"  on GPUs    {'; '.join(ways)}"
    if instance.hop.reason:
        yield f"  HOP-B      {_hop(instance.hop)}"


def _hop(hop: Hop) -> str:
    if hop.groups == 1:
        return f"off: {hop.reason}"
    left = f"{hop.processors} multiprocessors left to the exchange"
    return f"from {counted(hop.rows, 'row')} on in {hop.groups} groups, {left}: {hop.reason}"


def _space(arch: ModelArch, rank: Rank) -> str:
    """What latent attention exchanges, and what that saves."""
    if arch.mla is None:
        return ""
    if rank.exchange_space == "value":
        return f" after W_UV, {arch.mla.v_head_dim} columns a head instead of {arch.partial_dim}"
    attended, held = (hi - lo for lo, hi in (rank.q_heads, rank.out_heads))
    return f" in latent space, W_UV read of {counted(held, 'head')} instead of {attended}"


def _sums(instance: Instance) -> str:
    if instance.reduce_rows in (0, instance.max_batch_size):
        return "one-sided" if instance.reduce_rows else "by all-reduce"
    return f"one-sided up to {counted(instance.reduce_rows, 'row')}, else by all-reduce"


def _attention_dp(instance: Instance) -> str:
    return ", data-parallel: each tp rank attends for its own requests with all heads" if instance.attention_dp else ""


def _moe(model: Model, instance: Instance) -> str:
    return f", experts as moe_tp {instance.moe_tp} x moe_ep {instance.moe_ep}" if model.arch.moe else ""


def _row(rank: Rank) -> tuple[str, ...]:
    groups = rank.groups
    return (
        str(rank.rank),
        f"{rank.node}:{rank.device}",
        f"{rank.pp_rank} {rank.tp_rank} {rank.cp_rank}",
        _span(rank.layers),
        _span(rank.q_heads),
        _span(rank.kv_heads),
        *map(_group, (groups.tp, groups.cp, groups.pp)),
        _span(rank.out_heads),
        str(rank.ffn_tp_rank),
        *map(_group, (groups.ffn_tp, groups.moe_tp, groups.moe_ep) if rank.experts else (groups.ffn_tp, (), ())),
        _span(rank.experts),
    )


def _memory(ranks: Sequence[Rank]) -> Iterator[str]:
    """One line for all ranks that need the same."""
    alike: dict[Memory, list[int]] = {}
    for rank in ranks:
        alike.setdefault(rank.memory, []).append(rank.rank)
    for memory, members in alike.items():
        yield (
            f"  memory of rank {listed(members)}: weights {byte_size(memory.weights)}, "
            f"KV {byte_size(memory.kv_per_token)} a token x {memory.kv_capacity_tokens:,} tokens, "
            f"workspace {byte_size(memory.workspace)}, total {byte_size(memory.total)}"
        )


def _span(span: Range | None) -> str:
    """A half-open range as people write it: first-last."""
    if span is None or span[0] == span[1]:
        return "-"
    return f"{span[0]}-{span[1] - 1}" if span[1] - span[0] > 1 else str(span[0])


def _group(ranks: Sequence[int]) -> str:
    """A group of one rank has nobody to talk to: "-"."""
    return listed(ranks) if len(ranks) > 1 else "-"


def listed(ranks: Sequence[int]) -> str:
    """Consecutive ranks as first-last, others listed; many of them as first,second..last."""
    if len(ranks) > 1 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]},{ranks[1]}..{ranks[-1]}"


def _handoff(plan: Plan) -> str:
    width = max(r.memory.kv_per_token for r in plan.ranks if r.role == "generation")
    return (
        f"handoff: {len(plan.transfers)} messages a prompt from a context to a generation instance; "
        f"each generation rank keeps {byte_size(width)} for every token it owns"
    )
