"""HX4xx: what the model can do and where its weights come from."""

from __future__ import annotations

import os
from collections.abc import Iterator

from helixc.checks.case import ModelCase
from helixc.checks.check import Finding, warning
from helixc.diagnostics import Rule, Severity

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
