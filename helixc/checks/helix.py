"""HX3xx: what Helix asks of attention: heads that divide twice, and context parallelism where decoding happens."""

from __future__ import annotations

import math
from collections.abc import Iterator

from helixc.checks.case import CP, TP, Case, ModelCase, Side
from helixc.checks.check import Finding, error, warning
from helixc.diagnostics import counted, divisors, listed
from helixc.hardware import GPUS, NETWORK_LATENCY, NVLINK_LATENCY, Gpu
from helixc.plan.exchange_space import exchange_space
from helixc.plan.lower import kv_dtype
from helixc.spec.agreement import value_at
from helixc.spec.source import KeyPath
from helixc.table import byte_size
from helixc_runtime.manifest import ModelArch


@error("HX301")
def heads_divide(case: ModelCase) -> Iterator[Finding]:
    """The query heads do not divide over tp * cp.

    Before the exchange a rank attends with num_heads / tp heads. The exchange gives each of the cp ranks an equal part
    of them, num_heads / (tp * cp), which is also its row shard of o_proj. So num_heads must be a multiple of tp * cp.
    Under enable_attention_dp the tp ranks keep whole heads and only cp counts.
    """
    heads = case.arch.num_heads
    for side in case.sides:
        tp = 1 if side.spec.enable_attention_dp else side.tp
        if heads % (tp * side.cp) == 0:
            continue
        span = side.first_given(CP, TP) if side.cp > 1 else side.at(TP)
        message = f"{heads} query heads do not divide over {side.grid} = {side.ffn_ranks} ranks of {side.name}"
        if tp < side.tp:
            message = f"{heads} query heads do not divide over cp {side.cp} of {side.name}"
        yield Finding(span, message, _sizes_that_divide(heads, tp, side), side.related("tp is given here", TP, span))


def _sizes_that_divide(heads: int, tp: int, side: Side) -> str:
    if side.cp == 1 or heads % tp != 0:
        return f"choose tp * cp among {listed(divisors(heads))}"
    return f"with tp {tp}, choose cp among {listed(divisors(heads // tp))}"


@error("HX302")
def context_has_no_cp(case: Case) -> Iterator[Finding]:
    """Context instances are given context parallelism.

    A context instance computes a whole prompt and knows nothing of Helix; its KV cache is dealt out to the cp ranks of
    a generation instance at the handoff. Split prefill by tp and pp, or use more context instances.
    """
    for side in case.sides:
        cp = side.spec.context_parallel_size
        if side.role == "context" and cp > 1:
            help = "context instances have cp 1; give context_parallel_size to generation_servers only"
            if (CP,) in case.source.spans and case.origins.path("context", CP) == (CP,):
                help = f"move `{CP}: {cp}` into generation_servers: at the top level it holds for both"
            yield Finding(side.at(CP), f"context_servers cannot have context_parallel_size {cp}", help)


@error("HX303")
def cp_type_is_helix(case: Case) -> Iterator[Finding]:
    """cp_type names a kind of context parallelism other than Helix.

    TensorRT-LLM also knows ULYSSES, STAR and RING, which split the queries of a prefill. Here cp_type is HELIX, which
    splits the KV cache of decoding; it may be left out.
    """
    paths: list[KeyPath] = [
        (*section, "cp_config", "cp_type") for section in ((), ("context_servers",), ("generation_servers",))
    ]
    for path in paths:
        if path in case.source.spans and str(value_at(case.source, path)).upper() != "HELIX":
            message = f"cp_type {value_at(case.source, path)} is not supported"
            yield Finding(case.source.value_span(path), message, "write HELIX, or remove the key")


@error("HX304")
def kv_heads_divide(case: ModelCase) -> Iterator[Finding]:
    """The KV heads do not divide over tp.

    With fewer tp ranks than KV heads every rank holds num_kv_heads / tp whole heads; with more, every head is held by
    tp / num_kv_heads ranks. Both must be whole numbers. Instead of a larger tp, use cp: it splits the KV cache without
    splitting heads. MLA has one latent head that every tp rank holds, and enable_attention_dp does not split heads.
    """
    kv_heads = case.arch.num_kv_heads
    for side in _sides_that_split_heads(case):
        if kv_heads % side.tp != 0 and side.tp % kv_heads != 0:
            message = f"{kv_heads} KV heads do not divide over tp {side.tp} of {side.name}"
            yield Finding(side.at(TP), message, f"choose tp among {listed(divisors(kv_heads))}{_or_cp(side)}")


@warning("HX305")
def kv_heads_are_duplicated(case: ModelCase) -> Iterator[Finding]:
    """tp exceeds the number of KV heads, so the KV cache is held several times.

    Every rank holds at least one KV head. With tp = 2 * num_kv_heads each token's K/V is stored and read twice. This is
    what Helix avoids: keep tp at or below num_kv_heads and grow cp instead.
    """
    kv_heads = case.arch.num_kv_heads
    for side in _sides_that_split_heads(case):
        if side.tp > kv_heads and side.tp % kv_heads == 0:
            copies = side.tp // kv_heads
            token = case.arch.num_layers * kv_heads * _cached(side, case.arch)
            message = (
                f"tp {side.tp} of {side.name} holds each of the {kv_heads} KV heads {copies} times: "
                f"{byte_size(copies * token)} a token instead of {byte_size(token)}"
            )
            yield Finding(side.at(TP), message, f"use tp {kv_heads} or less{_or_cp(side)}")


def _sides_that_split_heads(case: ModelCase) -> Iterator[Side]:
    return (s for s in case.sides if case.arch.mla is None and not s.spec.enable_attention_dp)


def _or_cp(side: Side) -> str:
    return ", and split the KV cache by context_parallel_size" if side.role == "generation" else ""


@warning("HX306")
def shards_have_blocks(case: Case) -> Iterator[Finding]:
    """Even the longest request gives a cp rank one block or none.

    Tokens are dealt out in blocks of tokens_per_block. A request of max_seq_len tokens has ceil(max_seq_len /
    tokens_per_block) blocks; where that is no more than cp, each rank attends over a single block or over nothing,
    and the exchange costs more than it saves.
    """
    for side in case.sides:
        length, block = side.spec.max_seq_len, side.spec.tokens_per_block
        if side.cp == 1 or length is None or (blocks := -(-length // block)) > side.cp:
            continue
        idle = f", {side.cp - blocks} of them with none" if blocks < side.cp else ""
        message = f"max_seq_len {length} is {counted(blocks, 'block')} of {block} tokens for {side.cp} cp ranks{idle}"
        fitting = [c for c in divisors(side.cp) if c < blocks]
        help = f"use a context_parallel_size of {max(fitting, default=1)} or less, or a smaller tokens_per_block"
        yield Finding(side.at(CP), message, help, side.related("the longest request", "max_seq_len", side.at(CP)))


@warning("HX307")
def helix_pays(case: ModelCase) -> Iterator[Finding]:
    """Requests are too short for context parallelism to pay.

    With cp ranks each reads 1 / cp of the KV cache, which saves time in proportion to the length; the exchange of the
    partials costs the same at any length. The estimate compares the two for one layer of one decode step at
    max_batch_size, with the peak figures of `hardware: {gpu: ...}` and an assumed latency of the exchange
    (docs/hardware.md). Below the length where they are equal, the same ranks are better used as tp or as instances.
    """
    gpu = GPUS.get(case.spec.hardware.gpu or "")
    if gpu is None:
        return
    for side in case.sides:
        length = side.spec.max_seq_len
        if side.cp == 1 or length is None:
            continue
        saved, cost = _saved_a_token(side, case.arch, gpu), _exchange_time(case, side, gpu)
        if length * saved < cost:
            message = (
                f"at max_seq_len {length:,}, cp {side.cp} saves {length * saved * 1e6:.1f} us of KV reading a layer "
                f"and costs {cost * 1e6:.1f} us of exchange"
            )
            help = f"by this estimate cp pays from {math.ceil(cost / saved):,} tokens on; use fewer cp ranks, or none"
            related = side.related("the longest request", "max_seq_len", side.at(CP))
            yield Finding(side.at(CP), message, help, related)


@error("HX308")
def latents_exist(case: ModelCase) -> Iterator[Finding]:
    """exchange_space is latent for a model without latent attention.

    The partials of multi-head latent attention (DeepSeek) can be exchanged as latents, before W_UV, or as values,
    after it. All other attention has values only. The key may be left out: helixc then chooses by an estimate
    (docs/helix.md).
    """
    key = "cp_config", "exchange_space"
    for side in case.sides:
        if side.role == "generation" and case.arch.mla is None and side.spec.exchange_space == "latent":
            message = f"{case.arch.architecture} has no latents to exchange"
            yield Finding(side.at(*key), message, "write value, or remove the key")


@error("HX309")
def groups_have_rows(case: Case) -> Iterator[Finding]:
    """hop_groups asks for groups that there cannot be.

    HOP-B attends the rows of a decode step in groups, and exchanges the partials of one while it attends the next. So
    there must be an exchange, which only cp ranks have, and no group may be without rows: an instance has at most
    max_batch_size. The key may be left out: helixc then chooses by an estimate (docs/helix.md). 1 is off.
    """
    key = "cp_config", "hop_groups"
    for side in case.sides:
        groups, rows = side.spec.hop_groups or 1, side.spec.max_batch_size
        if side.role == "context" or groups == 1:
            continue
        if side.cp == 1:
            yield Finding(
                side.at(*key), f"{side.name} has cp 1, and no exchange for hop_groups {groups}", "remove the key"
            )
        elif groups > rows:
            message = f"hop_groups {groups} is more than max_batch_size {rows} of {side.name}"
            related = side.related("the most rows are given here", "max_batch_size", side.at(*key))
            yield Finding(side.at(*key), message, f"write {rows} or less, or remove the key", related)


def _saved_a_token(side: Side, arch: ModelArch, gpu: Gpu) -> float:
    """Seconds a layer that cp saves for every token of length, at max_batch_size on one rank."""
    tp = 1 if side.spec.enable_attention_dp else side.tp
    kv_heads = max(1, arch.num_kv_heads // tp)
    read = side.spec.max_batch_size * kv_heads * _cached(side, arch)
    return read * (1 - 1 / side.cp) / gpu.bandwidth


def _exchange_time(case: ModelCase, side: Side, gpu: Gpu) -> float:
    """Seconds a layer that a rank takes to send partials and their LSE to the other ranks of its cp group."""
    tp = 1 if side.spec.enable_attention_dp else side.tp
    width = case.arch.exchanged_dim(exchange_space(side.spec, case.arch, case.spec.hardware))
    partials = side.spec.max_batch_size * case.arch.num_heads / tp * (width * 2 + 4)
    inside = side.cp <= gpu.domain
    latency, link = (NVLINK_LATENCY, gpu.nvlink) if inside else (NETWORK_LATENCY, gpu.network)
    return latency + partials * (1 - 1 / side.cp) / link


def _cached(side: Side, arch: ModelArch) -> int:
    """Bytes cached per token, layer and KV head; what is auto is taken for a 16-bit type."""
    return arch.kv_bytes(kv_dtype(side.spec, "bfloat16"))
