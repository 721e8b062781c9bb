"""The rules of findings made while a TensorRT-LLM file is read as a deployment: HX90x."""

from __future__ import annotations

from inspect import cleandoc

from helixc.diagnostics import Rule, Severity


def _rule(code: str, severity: Severity, title: str, explanation: str) -> Rule:
    return Rule(code, severity, title, cleandoc(explanation))


UNUSED_KEY = _rule(
    "HX901",
    Severity.NOTE,
    "A key of TensorRT-LLM that helixc has no use for",
    """The file is read as it is. This key configures something of TensorRT-LLM that helixc does not have or decides
    itself; it has no effect on the plan. `helixc check --dialect trtllm` leaves these notes out.""",
)
ONE_WORKER = _rule(
    "HX902",
    Severity.NOTE,
    "The file describes one worker",
    """Files for `--extra_llm_api_options` hold the options of one worker. The model, the other role and often the sizes
    are given elsewhere, so what spans both roles is not checked, and the file alone cannot be compiled.""",
)
NO_GEOMETRY = _rule(
    "HX903",
    Severity.NOTE,
    "The model's geometry is not known, so the checks that need it were skipped",
    """The model is neither a folder here nor a model whose geometry helixc has built in. Heads, experts, layers and
    widths were not compared with the sizes, and the file cannot be compiled. Put the checkpoint's folder (its
    config.json is enough for checking) at that path relative to the file.""",
)
BUILT_IN = _rule(
    "HX904",
    Severity.NOTE,
    "The model was recognised by its name",
    """There is no folder of this name here, so the built-in geometry of the model it names was used for the checks. The
    file can be planned and compiled, not launched: that needs the weights.""",
)
PRECISION = _rule(
    "HX905",
    Severity.WARNING,
    "helixc computes in a wider type than the file asks for",
    """helixc has kernels for weights in bfloat16, float16 and float32, and for a KV cache in these and in fp8 (e4m3).
    Where a TensorRT-LLM file asks for fp8 weights, for fp4 or for e5m2, the deployment is planned in the model's own
    dtype, which takes two to four times the memory.""",
)
RENAMED_KEY = _rule(
    "HX906",
    Severity.WARNING,
    "A key of an older TensorRT-LLM",
    """Releases of TensorRT-LLM have renamed and moved keys. A current release refuses the old name, and an older one
    the new name: make the file fit the release you run.""",
)

RULES = (UNUSED_KEY, ONE_WORKER, NO_GEOMETRY, BUILT_IN, PRECISION, RENAMED_KEY)
