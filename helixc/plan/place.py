"""Deployment -> Plan: every instance on its GPUs, every rank with its groups, shard, KV and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from helixc.plan.lower import Deployment, Layout
from helixc.plan.mapping import Mapping
from helixc.plan.parameters import parameters
from helixc.plan.shards import elements, expert_range, head_ranges, pieces
from helixc.plan.transfers import transfers
from helixc_runtime.attention_shape import MAX_PROCESSORS, MAX_SPLITS
from helixc_runtime.manifest import DTYPE_BYTES, SCHEMA, Instance, Kernel, Memory, Model, Piece, Plan, Rank

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
        templates = _templates(deployment, layout, kernels_for)
        slot = 0 if deployment.hardware.share_gpus else len(ranks)  # first GPU of the role, in placement order
        for index in range(layout.num_instances):
            first = len(ranks)
            instances.append(_instance(layout, index, first))
            for template in templates:
                local = template.rank.local_rank
                node, device = divmod(slot + index * layout.mapping.world + local, deployment.hardware.gpus_per_node)
                ranks.append(
                    replace(
                        template.rank,
                        rank=first + local,
                        instance=index,
                        node=node,
                        device=device,
                        groups=layout.mapping.groups(local, first),
                        shard=shards.setdefault(template.pieces, len(shards)),
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


def _templates(deployment: Deployment, layout: Layout, kernels_for: KernelNames) -> list[Template]:
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
            experts=expert_range(deployment.model.arch, layout, at),
            shard=0,
            memory=rank_memory(deployment.model, layout, own, layout.stages[at.pp], q, kv),
            kernels=(),
        )
        names = kernels_for(deployment.model, rank, _instance(layout, 0, 0), deployment.tokens_per_block)
        found.append(Template(replace(rank, kernels=names), own))
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
    """Decode: split partials and their LSE in float32, then what is sent and received in the exchange."""
    if layout.role == "context":
        return 0
    rows, width = layout.max_batch_size * heads, model.arch.partial_dim
    # The portable kernels' partials of every row, or Hopper's: two a multiprocessor, whatever the rows.
    splits = max(MAX_SPLITS * rows, 2 * MAX_PROCESSORS * heads) * (width + 1) * 4
    exchange = 2 * rows * (width * DTYPE_BYTES[model.dtype] + 4)
    return splits + exchange


def _instance(layout: Layout, index: int, first: int) -> Instance:
    mapping = layout.mapping
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
    )


def _reference(deployment: Deployment) -> Template:
    """The whole model on one rank, shaped as a context instance: --verify decodes by prefilling."""
    whole = replace(
        deployment.generation,
        role="context",
        mapping=Mapping(1, 1, 1, 1),
        attention_dp=False,
        stages=((0, deployment.model.arch.num_layers),),
    )
    return _templates(deployment, whole, lambda *_: ())[0]


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
