"""HX7xx: what the kernels can run."""

from __future__ import annotations

from collections.abc import Iterator

from helixc.checks.case import ModelCase
from helixc.checks.check import Finding, warning
from helixc.codegen.config import configure
from helixc.codegen.problem import exchange, problems
from helixc.plan.lower import lower
from helixc.plan.shards import head_ranges
from helixc_runtime.attention_shape import shape_of_heads


@warning("HX701")
def kernels_serve_the_model(case: ModelCase) -> Iterator[Finding]:
    """No kernel serves the model's attention.

    The decode kernels keep a tile of keys in a thread block's shared memory and load it in vectors of 8 elements, so
    the width of a head must be a multiple of 8 and small enough. Block sizes, numbers of heads and dtypes are
    specialised on: any will do. Without a kernel the deployment can be planned and launched on CPUs, but not compiled.
    """
    deployment = lower(case.spec, case.arch)
    layout = deployment.generation
    q, kv, _ = head_ranges(case.arch, layout, layout.mapping.coordinates(0))
    try:
        shape = shape_of_heads(deployment.model, q, kv, layout.exchange_space, deployment.tokens_per_block)
        for problem in (*problems(shape, layout.mapping.cp, arch=""), exchange(shape, layout.mapping.cp, arch="")):
            configure(problem)
    except ValueError as error:
        span = case.source.value_span(("model",))
        yield Finding(
            span, f"no kernel serves this model: {error}", "launch it with `--device cpu`, or change the model"
        )
