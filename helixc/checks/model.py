"""HX4xx: what the model can do and where its weights come from."""

from __future__ import annotations

import os
from collections.abc import Iterator

from helixc.checks.case import Case, ModelCase, Side
from helixc.checks.check import Finding, error, warning
from helixc.diagnostics import Related, Rule, Severity

MODEL_UNREADABLE = Rule(
    "HX402",
    Severity.ERROR,
    "The model's geometry cannot be read",
    """The folder's config.json is missing, damaged, or describes a model that helixc does not support. Supported are
DeepseekV3ForCausalLM, DeepseekV2ForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM and Qwen3MoeForCausalLM.""",
)


@warning("HX403")
def weights_exist(case: ModelCase) -> Iterator[Finding]:
    """A built-in geometry has no weights to load.

    With load_format auto such a deployment can be checked, planned and compiled, but not launched. `load_format: dummy`
    launches it with random weights.
    """
    if case.spec.load_format == "auto" and not os.path.isabs(case.spec.model):
        message = f"{case.spec.model} is a built-in geometry, which has no weights: this can be planned, not launched"
        help = "write `load_format: dummy` for random weights, or give a checkpoint folder"
        yield Finding(case.source.value_span(("model",)), message, help)


@warning("HX404")
def lengths_are_in_range(case: ModelCase) -> Iterator[Finding]:
    """max_seq_len exceeds the model's longest position.

    Positions beyond max_position_embeddings were not seen in training; the answers usually degrade there.
    """
    limit = case.arch.max_position
    for side in case.sides:
        length = side.spec.max_seq_len
        if length is not None and length > limit:
            message = f"max_seq_len {length} of {side.name} exceeds the model's {limit} positions"
            yield Finding(side.at("max_seq_len"), message, f"use {limit} or less")


@warning("HX405")
def generation_holds_what_was_prefilled(case: Case) -> Iterator[Finding]:
    """Context instances accept longer requests than generation instances hold.

    max_seq_len of a generation instance counts the prompt and every generated token. A prompt that a context instance
    accepts and a generation instance cannot hold is refused only when it arrives.
    """
    sides = {side.role: side for side in case.sides}
    if "context" not in sides:
        return
    context, generation = sides["context"], sides["generation"]
    prompt, whole = context.spec.max_seq_len, generation.spec.max_seq_len
    if prompt is not None and whole is not None and prompt > whole:
        span = context.at("max_seq_len")
        message = f"max_seq_len is {prompt} for context_servers and {whole} for generation_servers"
        help = f"use {whole} or less for context_servers; given once at the top level it holds for both"
        yield Finding(span, message, help, generation.related("what is handed over must fit here", "max_seq_len", span))


@error("HX406")
def roles_cache_alike(case: Case) -> Iterator[Finding]:
    """The two roles keep the KV cache in different types.

    Keys and values are handed from context to generation instances as they are stored, so kv_cache_config.dtype is the
    same for both. Give it once, at the top level.
    """
    sides = {side.role: side for side in case.sides}
    if "context" not in sides:
        return
    context, generation = sides["context"], sides["generation"]
    ours, theirs = _kv_dtype(context, case), _kv_dtype(generation, case)
    if context.spec.kv_dtype != "auto" and ours != theirs:
        span = context.at(*_KV_DTYPE)
        shown = "the model's dtype" if theirs == "auto" else theirs
        message = f"the KV cache is {ours} in context_servers and {shown} in generation_servers"
        other = generation.given(*_KV_DTYPE)
        related = (Related("the other type", other),) if other and other != span else ()
        yield Finding(span, message, "give `kv_cache_config: {dtype: ...}` once, at the top level", related)


_KV_DTYPE = ("kv_cache_config", "dtype")


def _kv_dtype(side: Side, case: Case) -> str:
    return case.spec.dtype if side.spec.kv_dtype == "auto" else side.spec.kv_dtype
