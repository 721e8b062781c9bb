"""`--verify`: the same prompts in one unsharded process, compared logit by logit with what the deployment computed.

The whole model runs on one rank, in one pass over prompt and generated tokens, with dense causal attention: no paging,
no absorption, no exchange. Its arithmetic is float32 on the deployment's weights. A deployment in a shorter dtype, or
with a KV cache in one, must be as near to that as rounding allows, and how much rounding does to this model is
measured, not guessed: one unsharded process in the same dtype, which rounds its K and V as the cache does, is compared
too, and the deployment may be three times as far off.

`python -m helixc_runtime.reference RUN_DIR`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from helixc_runtime.artifact import load
from helixc_runtime.comm import TorchComm
from helixc_runtime.engine import load_decoder, logits_file
from helixc_runtime.events import Emitter
from helixc_runtime.job import Difference, Job, Request, read_generated, read_job
from helixc_runtime.models.attention import Keep, unchanged
from helixc_runtime.models.decoder import Decoder
from helixc_runtime.models.rotary import Rotary
from helixc_runtime.quantize import rounded
from helixc_runtime.sampling import could_sample, sample
from helixc_runtime.worker import supervised

FLOAT32_TOLERANCE = 1e-4  # of the largest logit: sums in another order
ROUNDING_FACTOR = 3.0  # of what one unsharded process in the deployment's dtypes is off: sums over ranks round again


def main() -> NoReturn:
    """Verify the job in the run directory named on the command line."""
    run_dir = Path(sys.argv[1])
    supervised(lambda emit: verify(read_job(run_dir), run_dir, emit), rank=0)


def verify(job: Job, run_dir: Path, emit: Emitter) -> None:
    """Compare every request and emit one `verify` event."""
    plan = load(Path(job.artifact), job.checkpoint).plan
    torch.set_num_threads(max(job.threads, 1) * len(plan.ranks) if job.device == "cpu" else 1)
    device = torch.device(job.device, plan.reference.device) if job.device == "cuda" else torch.device("cpu")
    generated = {g.request: g.token_ids for g in read_generated(run_dir)}
    with torch.inference_mode():
        decoder = load_decoder(plan, plan.reference, TorchComm(plan.reference, {}), device, emit)
        cached = partial(rounded, kv_dtype=plan.model.kv_dtype)
        own = _all_logits(decoder, cached, job, generated, emit) if plan.model.rounds else None
        decoder.weights.to_float32()
        exact = _all_logits(replace(decoder, dtype=torch.float32), unchanged, job, generated, emit)
    kept = {request.index: kept_logits(run_dir, request) for request in job.requests}
    tolerance = ROUNDING_FACTOR * _farthest(own, exact) if own else FLOAT32_TOLERANCE * _largest(exact)
    margin = 0.0 if own else tolerance  # in a shorter dtype other tokens are news, not a failure
    found = (_first_difference(r, generated[r.index], exact[r.index], margin) for r in job.requests)
    first = next(filter(None, found), None)
    emit.emit(
        "verify",
        max_abs_logit_diff=_farthest(kept, exact),
        tolerance=tolerance,
        first_difference=asdict(first) if first else None,
    )


def _all_logits(
    decoder: Decoder, keep: Keep, job: Job, generated: Mapping[int, tuple[int, ...]], emit: Emitter
) -> dict[int, Tensor]:
    rotary, found = decoder.rotary(), {}
    for done, request in enumerate(job.requests):
        emit.emit("stage", stage="verify", done=done, total=len(job.requests))
        found[request.index] = unsharded(decoder, rotary, keep, request, generated[request.index])
    return found


def _farthest(logits: Mapping[int, Tensor], exact: Mapping[int, Tensor]) -> float:
    """Largest absolute difference; NaN if either side holds one, which must not pass for a small difference."""
    return float(torch.stack([(logits[i] - exact[i]).abs().max() for i in exact]).max())


def _largest(logits: Mapping[int, Tensor]) -> float:
    return max(float(x.abs().max()) for x in logits.values())


def _first_difference(request: Request, generated: tuple[int, ...], exact: Tensor, margin: float) -> Difference | None:
    for step, got in enumerate(generated):
        position = len(request.token_ids) + step
        if not could_sample(exact[step], request, position, got, margin):
            expected = sample(exact[step], request, position)
            return Difference(request.index, step, expected, got)
    return None


def unsharded(decoder: Decoder, rotary: Rotary, keep: Keep, request: Request, generated: tuple[int, ...]) -> Tensor:
    """Logits [tokens, vocab] of every generated token, each given all tokens before it, in one pass.

    All of them attend to what `keep` makes of the KV: a deployment's prompt, which attends to itself before it is
    cached, is a little nearer to the exact.
    """
    tokens = torch.tensor(request.token_ids + generated[:-1], device=decoder.device)
    hidden, _ = decoder.prefill(tokens, rotary, attends=True, keep=keep)
    return decoder.logits(hidden[len(request.token_ids) - 1 :]).cpu()


def kept_logits(run_dir: Path, request: Request) -> Tensor:
    """Logits [tokens, vocab] that the deployment kept: the context instance's, then the generation instance's."""
    files = [logits_file(run_dir, request.index, part) for part in ("first", "rest")]
    return torch.cat([load_file(file)["logits"] for file in files if file.is_file()])


if __name__ == "__main__":
    main()
