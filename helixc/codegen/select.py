"""Which kernels a plan needs: a set for every distinct attention shape of its generation ranks, and the handoff's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from helixc.codegen.problem import (
    KernelSpec,
    absorb,
    argmax,
    batch,
    embed,
    exchange,
    ffn,
    handoff,
    merge_exchange,
    merges_as_it_sends,
    norm,
    problems,
    reduce,
)
from helixc_runtime.attention_shape import LATENT_NORM_EPS, AttentionShape, attention_shape
from helixc_runtime.ffn_shape import FfnShape, ffn_shape
from helixc_runtime.manifest import Instance, Model, Plan, Rank


def select(plan: Plan, arches: tuple[str, ...]) -> tuple[KernelSpec, ...]:
    """Every distinct kernel of the plan for each architecture, in the order of the ranks that first need it."""
    instances = {(instance.role, instance.index): instance for instance in plan.instances}
    needs = dict.fromkeys(
        _needs(plan.model, rank, instances[rank.role, rank.instance], plan.tokens_per_block)
        for rank in plan.ranks
        if rank.role == "generation"
    )
    peers = any(instance.handoff == "peer" for instance in plan.instances)
    specs = dict.fromkeys(
        spec
        for arch in arches
        for spec in (
            *(spec for need in needs for spec in _specs(plan.model, *need, arch)),
            *([handoff(plan.model, plan.tokens_per_block, arch)] if peers else ()),
        )
    )
    assert len({(spec.name, spec.arch) for spec in specs}) == len(specs), "two problems share a name"
    return tuple(specs)


def names_for(arches: tuple[str, ...], model: Model, rank: Rank, instance: Instance, block: int) -> tuple[str, ...]:
    """Names of the kernels `rank` of `instance` runs on any of `arches`; context ranks prefill in torch."""
    if instance.role == "context":
        peers = arches if instance.handoff == "peer" else ()
        return tuple(dict.fromkeys(handoff(model, block, arch).name for arch in peers))
    needs = _needs(model, rank, instance, block)
    return tuple(dict.fromkeys(spec.name for arch in arches for spec in _specs(model, *needs, arch)))


@dataclass(frozen=True, slots=True)
class _Traits:
    """What the choice needs to know of an instance."""

    cp: int
    ffn_tp: int
    one_sided_exchange: bool
    one_sided_reduction: bool
    rows: int


_Needs = tuple[AttentionShape, FfnShape, _Traits]


def _needs(model: Model, rank: Rank, instance: Instance, block: int) -> _Needs:
    return attention_shape(model, rank, block), ffn_shape(model, rank, instance), _traits(instance)


def _traits(instance: Instance) -> _Traits:
    one_sided = instance.exchange == "one_sided", instance.reduce_rows > 0
    return _Traits(instance.cp, instance.tp * instance.cp, *one_sided, instance.max_batch_size)


def _specs(model: Model, shape: AttentionShape, own_ffn: FfnShape, traits: _Traits, arch: str) -> Iterator[KernelSpec]:
    """The kernels of one rank. Those of the fallbacks are there too: a sum of many rows is collective anyway."""
    yield from problems(shape, traits.cp, arch)
    yield batch(shape, model.arch.rope.attention_factor, arch)
    yield embed(model.arch.hidden_size, model.dtype, arch)
    if traits.one_sided_exchange:
        yield (merge_exchange if merges_as_it_sends(shape, arch) else exchange)(shape, traits.cp, arch)
    for members in (1, traits.ffn_tp) if traits.one_sided_reduction else (1,):
        yield reduce(members, model.arch.hidden_size, model.arch.norm_eps, model.dtype, arch)
    if traits.one_sided_reduction or traits.ffn_tp == 1:
        yield argmax(traits.ffn_tp, model.dtype, arch)
    if mla := model.arch.mla:
        yield from absorb(shape, mla.qk_nope_head_dim, traits.rows * shape.query_tokens, arch)
        if mla.q_lora_rank:
            yield norm(mla.q_lora_rank, LATENT_NORM_EPS, model.dtype, arch)
    yield from ffn(own_ffn, traits.rows, arch)
