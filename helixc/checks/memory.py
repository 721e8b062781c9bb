"""HX5xx: the KV cache against what it has to hold, and every rank against its GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from helixc.checks.case import CP, TP, Case, ModelCase, Side
from helixc.checks.check import Finding, error, warning
from helixc.diagnostics import Related, divisors
from helixc.hardware import GPUS, Gpu
from helixc.plan.footprint import Footprint, footprints, largest, resized
from helixc.plan.lower import Deployment, lower
from helixc.table import aligned, byte_size
from helixc_runtime.manifest import local_length

_MAX_TOKENS = ("kv_cache_config", "max_tokens")


@error("HX501")
def cache_holds_a_block(case: Case) -> Iterator[Finding]:
    """max_tokens is less than one block.

    The KV cache is allocated in whole blocks of tokens_per_block tokens.
    """
    for side in case.sides:
        tokens, block = side.spec.max_tokens, side.spec.tokens_per_block
        if tokens is not None and tokens < block:
            message = f"max_tokens {tokens} of {side.name} does not hold one block of {block} tokens"
            yield Finding(side.at(*_MAX_TOKENS), message, f"use {block} or more, or a smaller tokens_per_block")


@warning("HX502")
def cache_holds_a_request(case: Case) -> Iterator[Finding]:
    """A request of max_seq_len tokens does not fit into the KV cache.

    max_tokens counts the tokens that one rank holds. Of a request with n tokens a cp rank holds about n / cp, in whole
    blocks; the first rank holds the most.
    """
    for side in case.sides:
        tokens, length = side.spec.max_tokens, side.spec.max_seq_len
        if tokens is None or length is None:
            continue
        share = local_length(length, side.spec.tokens_per_block, side.cp, 0)
        if side.spec.tokens_per_block <= tokens < share:
            message = (
                f"a request of max_seq_len {length} needs {share} tokens a rank of {side.name}, max_tokens is {tokens}"
            )
            yield Finding(side.at(*_MAX_TOKENS), message, f"use {share} or more, or a shorter max_seq_len")


@error("HX503")
def memory_suffices(case: ModelCase) -> Iterator[Finding]:
    """A rank needs more memory than its GPU has.

    A rank holds its shard of the weights, the KV cache and the workspace of the exchange. The cache has room for its
    share of max_batch_size requests of max_seq_len tokens, or for max_tokens if that is less, and it may take
    free_gpu_memory_fraction of what weights and workspace leave. The finding lists what takes what in the stage that
    needs most, and says the largest batch and the longest request that would fit. Nothing is checked without
    `hardware: {gpu: ...}`. Activations of a prefill are not counted.
    """
    gpu = GPUS.get(case.spec.hardware.gpu or "")
    if gpu is None:
        return
    deployment = lower(case.spec, case.arch)
    layouts = {"context": deployment.context, "generation": deployment.generation}
    stages: list[tuple[Side, list[Footprint]]] = []
    for side in case.sides:
        layout = layouts[side.role]
        assert layout is not None
        stages.append((side, list(footprints(deployment, layout))))
    worst = [(side, max(found, key=lambda f: f.memory.total)) for side, found in stages]
    too_large = [_too_large(case, side, found, deployment, gpu) for side, found in worst if _missing(found, gpu)]
    yield from too_large
    if case.spec.hardware.share_gpus and len(stages) == 2 and not too_large:
        yield from _shared(stages, gpu)


def _room(footprint: Footprint, gpu: Gpu) -> int:
    """Bytes that the KV cache may take."""
    left = gpu.memory - footprint.memory.weights - footprint.memory.workspace
    return int(left * footprint.layout.free_gpu_memory_fraction)


def _missing(footprint: Footprint, gpu: Gpu) -> bool:
    return footprint.kv > _room(footprint, gpu)


def _too_large(case: ModelCase, side: Side, footprint: Footprint, deployment: Deployment, gpu: Gpu) -> Finding:
    stage = f" of stage {footprint.stage}" if footprint.layout.mapping.pp > 1 else ""
    need, have = byte_size(footprint.memory.total), byte_size(gpu.memory)
    message = f"a rank{stage} of {side.name} needs {need}, {gpu.name} has {have}"
    room = _room(footprint, gpu)
    if room <= 0:
        span, ways = side.at(TP), []
    else:
        message += "" if footprint.memory.total > gpu.memory else f", of which the KV cache may take {byte_size(room)}"
        span = side.given(*_MAX_TOKENS) or side.first_given("max_seq_len", "max_batch_size")
        ways = _what_fits(side, footprint, deployment, gpu)
    key = CP if side.role == "generation" else TP
    if enough := _enough(case, side, gpu, key):
        ways.append(f"{key} {enough}")
    help = f"what would fit: {', or '.join(ways)}" if ways else "use more pipeline stages, or a GPU with more memory"
    related = [Related("the GPU", side.origins.source.value_span(("hardware", "gpu")))]
    return Finding(span, message, help, tuple(related), _table(footprint, gpu))


def _what_fits(side: Side, footprint: Footprint, deployment: Deployment, gpu: Gpu) -> list[str]:
    """The largest batch and the longest request for which the same ranks have room, or the largest max_tokens."""
    if side.spec.max_tokens is not None:
        block = deployment.tokens_per_block
        most = _room(footprint, gpu) // footprint.memory.kv_per_token // block * block
        return [f"max_tokens {most}"] if most else []
    batch, length = footprint.layout.max_batch_size, footprint.layout.max_seq_len

    def fits(batch: int, length: int) -> bool:
        return not _missing(resized(footprint, deployment, batch, length), gpu)

    ways = []
    if side.role == "generation" and (most := largest(lambda n: fits(n, length), batch)):
        ways.append(f"max_batch_size {most} at this length")
    if longest := largest(lambda n: fits(batch, n), length):
        ways.append(f"max_seq_len {longest} for {batch} requests" if batch > 1 else f"max_seq_len {longest}")
    return ways


def _enough(case: ModelCase, side: Side, gpu: Gpu, key: str) -> int | None:
    """The smallest larger size of `key` with which this role fits, None if there is none that the model allows."""
    whole = case.arch.num_heads if key == CP or case.arch.mla else case.arch.num_kv_heads
    now, other = (side.cp, side.tp) if key == CP else (side.tp, 1)
    split = 1 if side.spec.enable_attention_dp else other
    for size in divisors(whole // split):
        ranks = size * other
        if size <= now or ranks % (side.spec.moe_expert_parallel_size or 1):
            continue
        role = replace(side.spec, moe_tensor_parallel_size=None)
        if side.role == "generation":
            role = replace(role, context_parallel_size=size)
            deployment = lower(replace(case.spec, generation=role), case.arch)
        else:
            role = replace(role, tensor_parallel_size=size)
            deployment = lower(replace(case.spec, context=role), case.arch)
        layout = deployment.context if side.role == "context" else deployment.generation
        assert layout is not None
        if not any(_missing(footprint, gpu) for footprint in footprints(deployment, layout)):
            return size
    return None


def _table(footprint: Footprint, gpu: Gpu) -> tuple[str, ...]:
    memory, layout = footprint.memory, footprint.layout
    tokens = f"{memory.kv_capacity_tokens:,} tokens x {byte_size(memory.kv_per_token)}"
    fraction, left = layout.free_gpu_memory_fraction, byte_size(max(0, _room(footprint, gpu)))
    room = f"may take {fraction:.0%} of what the others leave: {left}"
    sizes = ("weights", memory.weights), ("workspace", memory.workspace), ("KV cache", footprint.kv)
    rows = [(name, byte_size(size)) for name, size in (*sizes, ("total", memory.total), (gpu.name, gpu.memory))]
    width = max(len(name) for name, _ in rows)
    lines = aligned((name.ljust(width), size) for name, size in rows)
    lines[2] += f"  {tokens}; {room}"
    return tuple(lines)


def _shared(stages: list[tuple[Side, list[Footprint]]], gpu: Gpu) -> Iterator[Finding]:
    """Both roles on one GPU: the k-th context rank and the k-th generation rank."""
    (context, firsts), (generation, seconds) = stages
    meet = {
        (k // context.ffn_ranks % context.pp, k // generation.ffn_ranks % generation.pp)
        for k in range(min(context.ranks, generation.ranks))
    }
    first, second = max(
        ((firsts[i], seconds[j]) for i, j in sorted(meet)), key=lambda pair: pair[0].memory.total + pair[1].memory.total
    )
    if first.memory.total + second.memory.total > gpu.memory:
        message = (
            f"a rank of {context.name} ({byte_size(first.memory.total)}) and one of {generation.name} "
            f"({byte_size(second.memory.total)}) share one {gpu.name} of {byte_size(gpu.memory)}"
        )
        source = context.origins.source
        path = next(p for p in (("hardware", "share_gpus"), ("share_gpus",)) if p in source.spans)
        help = "leave out share_gpus, or make the two smaller"
        yield Finding(source.value_span(path), message, help, (), _table(second, gpu))


@warning("HX504")
def max_tokens_counts_one_rank(case: ModelCase) -> Iterator[Finding]:
    """max_tokens looks like the number for all cp ranks together.

    max_tokens counts the tokens of one rank, and each of the cp ranks holds about 1 / cp of every request. A max_tokens
    of max_batch_size * max_seq_len is what the whole cp group holds; a rank never needs it, and none allocates it.
    """
    for side in case.sides:
        spec = side.spec
        length = spec.max_seq_len or case.arch.max_position
        if side.cp > 1 and spec.max_tokens == spec.max_batch_size * length:
            share = spec.max_batch_size * local_length(length, spec.tokens_per_block, side.cp, 0)
            message = f"max_tokens {spec.max_tokens} is all that {side.name} hold together; a rank needs {share}"
            help = f"write {share}, or leave max_tokens out: it counts the tokens of one rank"
            yield Finding(
                side.at(*_MAX_TOKENS), message, help, side.related("cp is given here", CP, side.at(*_MAX_TOKENS))
            )
