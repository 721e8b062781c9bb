"""Deployment -> Plan: every instance on its GPUs, every rank with its groups, shard, KV and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from helixc.hardware import ONE_SHOT_BYTES
from helixc.plan.lower import Deployment, Layout
from helixc.plan.mapping import Mapping
from helixc.plan.parameters import parameters
from helixc.plan.shards import elements, expert_range, head_ranges, pieces
from helixc.plan.transfers import transfers
from helixc_runtime.attention_shape import MAX_PROCESSORS, MAX_SPLITS, PIECE_COLUMNS
from helixc_runtime.manifest import DTYPE_BYTES, SCHEMA, Handoff, Instance, Kernel, Memory, Model, Piece, Plan, Rank
from helixc_runtime.switches import read_switches

KernelNames = Callable[[Model, Rank, Instance, int], tuple[str, ...]]  # the last is tokens a block


@dataclass(frozen=True, slots=True)
class Template:
    """A rank as far as its local rank decides it: the same in all instances of a role."""

    rank: Rank
    pieces: tuple[Piece, ...]


def place(deployment: Deployment, kernels_for: KernelNames) -> Plan:
    """The whole plan, kernels not yet compiled. `kernels_for` names the kernels of a rank."""
    layouts = [layout for layout in (deployment.context, deployment.generation) if layout]
    shards: dict[tuple[Piece, ...], int] = {}
    ranks: list[Rank] = []
    instances: list[Instance] = []
    for layout in layouts:
        templates = _templates(deployment, layout)
        names: dict[tuple[object, ...], tuple[str, ...]] = {}
        slot = 0 if deployment.hardware.share_gpus else len(ranks)  # first GPU of the role, in placement order
        for index in range(layout.num_instances):
            first = len(ranks)
            start = slot + index * layout.mapping.world
            instance = _instance(deployment, layout, index, first, start)
            instances.append(instance)
            for template in templates:
                local = template.rank.local_rank
                node, device = divmod(start + local, deployment.hardware.gpus_per_node)
                key = (local, instance.exchange, instance.reduce_rows, instance.handoff)
                if key not in names:
                    names[key] = kernels_for(deployment.model, template.rank, instance, deployment.tokens_per_block)
                ranks.append(
                    replace(
                        template.rank,
                        rank=first + local,
                        instance=index,
                        node=node,
                        device=device,
                        groups=layout.mapping.groups(local, first),
                        shard=shards.setdefault(template.pieces, len(shards)),
                        kernels=names[key],
                    )
                )
    reference = _reference(deployment)
    arch = deployment.model.arch
    return Plan(
        schema=SCHEMA,
        name="_".join(_name(layout) for layout in layouts),
        model=deployment.model,
        tokens_per_block=deployment.tokens_per_block,
        instances=tuple(instances),
        ranks=tuple(ranks),
        transfers=transfers(arch, deployment.context, deployment.generation) if deployment.context else (),
        reference=replace(reference.rank, shard=shards.setdefault(reference.pieces, len(shards))),
        shards=tuple(shards),
        kernels=(),
    )


def with_kernels(plan: Plan, kernels: tuple[Kernel, ...]) -> Plan:
    """The plan with its kernels filled in."""
    return replace(plan, kernels=kernels)


def _templates(deployment: Deployment, layout: Layout) -> list[Template]:
    weights = parameters(deployment.model.arch)
    found = []
    for local in range(layout.mapping.world):
        at = layout.mapping.coordinates(local)
        own = pieces(weights, deployment.model.arch, layout, at)
        q, kv, out = head_ranges(deployment.model.arch, layout, at)
        rank = Rank(
            rank=local,
            role=layout.role,
            instance=0,
            local_rank=local,
            node=0,
            device=0,
            pp_rank=at.pp,
            tp_rank=at.tp,
            cp_rank=at.cp,
            ffn_tp_rank=at.ffn_tp,
            moe_tp_rank=at.moe_tp,
            moe_ep_rank=at.moe_ep,
            groups=layout.mapping.groups(local, 0),
            layers=layout.stages[at.pp],
            q_heads=q,
            kv_heads=kv,
            out_heads=out,
            exchange_space=layout.exchange_space,
            experts=expert_range(deployment.model.arch, layout, at),
            shard=0,
            memory=rank_memory(deployment.model, layout, own, layout.stages[at.pp], q, kv),
            kernels=(),
        )
        found.append(Template(rank, own))
    return found


def rank_memory(
    model: Model,
    layout: Layout,
    own: tuple[Piece, ...],
    layers: tuple[int, int],
    q: tuple[int, int],
    kv: tuple[int, int],
) -> Memory:
    """What a rank with these pieces, layers and heads needs."""
    weights = elements(own) * DTYPE_BYTES[model.dtype]
    # A context instance keeps the KV of the prompt it is prefilling, unpaged; it is converted when it is sent.
    context = layout.role == "context"
    kv_bytes = model.arch.kv_bytes(model.dtype) if context else model.kv_bytes
    per_token = (layers[1] - layers[0]) * (kv[1] - kv[0]) * kv_bytes
    workspace = _workspace(model, layout, q[1] - q[0])
    capacity = layout.max_seq_len if context else layout.kv_capacity
    return Memory(weights, per_token, capacity, workspace, weights + per_token * capacity + workspace)


def _workspace(model: Model, layout: Layout, heads: int) -> int:
    """Decode: split partials and their LSE in float32, then what is sent and received in the exchange, or its inboxes
    in two halves, partials that are not sent themselves, and the reduction's inboxes.
    """
    if layout.role == "context":
        return 0
    rows, width, size = layout.max_batch_size * heads, model.arch.partial_dim, DTYPE_BYTES[model.dtype]
    exchanged = model.arch.exchanged_dim(layout.exchange_space)
    # The portable kernels' partials of every row, or Hopper's: two a multiprocessor and group, whatever the rows.
    splits = max(MAX_SPLITS * rows, layout.hop.groups * 2 * MAX_PROCESSORS * heads) * (width + 1) * 4
    # What merges as it sends, of latent attention, gives every piece of a head an LSE.
    pieces = width // PIECE_COLUMNS if model.arch.mla and exchanged == width else 1
    exchange = 2 * rows * (exchanged * size + 4 * pieces)
    kept = rows * width * size if exchanged != width else 0
    inboxes = 2 * layout.mapping.ffn_tp * _one_shot_rows(model, layout) * model.arch.hidden_size
    return splits + exchange + kept + inboxes * size


def _one_shot_rows(model: Model, layout: Layout) -> int:
    """The largest batch whose sum over the repurposed ranks is best made by everyone sending everything."""
    others = layout.mapping.ffn_tp - 1
    row = others * model.arch.hidden_size * DTYPE_BYTES[model.dtype]
    return min(layout.max_batch_size, ONE_SHOT_BYTES // row) if others else 0


def _instance(deployment: Deployment, layout: Layout, index: int, first: int, start: int) -> Instance:
    """Instance `index` of a layout, its ranks from `first` on the GPUs from `start`."""
    mapping = layout.mapping
    one_sided = layout.role == "generation" and not read_switches().collectives

    def share_hosts(size: int) -> bool:
        """Whether each group of `size` consecutive ranks, more than one, sits on one host."""
        per_node, ends = deployment.hardware.gpus_per_node, range(start, start + mapping.world, size)
        return one_sided and size > 1 and all(end // per_node == (end + size - 1) // per_node for end in ends)

    return Instance(
        role=layout.role,
        index=index,
        ranks=tuple(range(first, first + mapping.world)),
        tp=mapping.tp,
        cp=mapping.cp,
        pp=mapping.pp,
        moe_tp=mapping.moe_tp,
        moe_ep=mapping.moe_ep,
        attention_dp=layout.attention_dp,
        max_batch_size=layout.max_batch_size,
        max_seq_len=layout.max_seq_len,
        free_gpu_memory_fraction=layout.free_gpu_memory_fraction,
        exchange="one_sided" if share_hosts(mapping.cp) else "collective",
        reduce_rows=_one_shot_rows(deployment.model, layout) if share_hosts(mapping.ffn_tp) else 0,
        hop=layout.hop,
        handoff=_handoff(deployment, layout, start),
    )


def _handoff(deployment: Deployment, layout: Layout, start: int) -> Handoff:
    """Peer where a context instance on the GPUs from `start` shares a host with a generation rank."""
    if layout.role == "generation" or read_switches().host_handoff:
        return "host"
    per_node, generation = deployment.hardware.gpus_per_node, deployment.generation
    first = 0 if deployment.hardware.share_gpus else layout.num_instances * layout.mapping.world
    last = first + generation.num_instances * generation.mapping.world - 1
    own_end = start + layout.mapping.world - 1
    meet = start // per_node <= last // per_node and first // per_node <= own_end // per_node
    return "peer" if meet else "host"


def _reference(deployment: Deployment) -> Template:
    """The whole model on one rank, shaped as a context instance: --verify decodes by prefilling."""
    whole = replace(
        deployment.generation,
        role="context",
        mapping=Mapping(1, 1, 1, 1),
        attention_dp=False,
        stages=((0, deployment.model.arch.num_layers),),
    )
    return _templates(deployment, whole)[0]


def _name(layout: Layout) -> str:
    """E.g. ctxtp2, gentp1cp2, gen4xtp8cp8ep8: always tp, the other sizes where they are not 1."""
    mapping = layout.mapping
    sizes = [("pp", mapping.pp), ("cp", mapping.cp), ("ep", mapping.moe_ep)]
    return "".join(_name_parts(layout, sizes))


def _name_parts(layout: Layout, sizes: list[tuple[str, int]]) -> Iterator[str]:
    yield "ctx" if layout.role == "context" else "gen"
    if layout.num_instances > 1:
        yield f"{layout.num_instances}x"
    yield f"tp{layout.mapping.tp}"
    yield from (f"{key}{size}" for key, size in sizes if size > 1)
    if layout.attention_dp:
        yield "dp"
