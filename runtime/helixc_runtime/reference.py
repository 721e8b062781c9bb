"""`--verify`: the same prompts in one unsharded process, compared logit by logit with what the deployment computed.

The whole model runs on one rank, in one pass over prompt and generated tokens, with dense causal attention: no paging,
no absorption, no exchange. `python -m helixc_runtime.reference RUN_DIR`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from helixc_runtime.artifact import load
from helixc_runtime.comm import TorchComm
from helixc_runtime.engine import load_decoder, logits_file
from helixc_runtime.events import Emitter
from helixc_runtime.job import Job, Request, read_generated, read_job
from helixc_runtime.manifest import Plan
from helixc_runtime.models.decoder import Decoder
from helixc_runtime.models.rotary import Rotary
from helixc_runtime.sampling import sample
from helixc_runtime.worker import supervised

# Largest difference allowed, relative to the largest reference logit. Rounding only: a layout mistake is far above.
RELATIVE_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token that the unsharded model would have chosen otherwise."""

    request: int
    step: int
    expected: int
    got: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one request: both logits [tokens, vocab] float32, and the tokens."""

    request: Request
    generated: tuple[int, ...]
    logits: Tensor
    reference: Tensor

    @property
    def largest_difference(self) -> float:
        """NaN if either side holds one: a NaN must not pass for a small difference."""
        return float((self.logits - self.reference).abs().max())

    def first_difference(self) -> Difference | None:
        for step, got in enumerate(self.generated):
            expected = sample(self.reference[step], self.request, len(self.request.token_ids) + step)
            if expected != got:
                return Difference(self.request.index, step, expected, got)
        return None


def main() -> NoReturn:
    """Verify the job in the run directory named on the command line."""
    run_dir = Path(sys.argv[1])
    supervised(lambda emit: verify(read_job(run_dir), run_dir, emit), rank=0)


def verify(job: Job, run_dir: Path, emit: Emitter) -> None:
    """Compare every request and emit one `verify` event."""
    plan = load(Path(job.artifact), job.checkpoint).plan
    torch.set_num_threads(max(job.threads, 1) * len(plan.ranks) if job.device == "cpu" else 1)
    largest, scale, first = 0.0, 1.0, None
    with torch.inference_mode():
        for comparison in compare(job, plan, run_dir, emit):
            # max() would drop a NaN on one side
            largest = torch.tensor([largest, comparison.largest_difference]).max().item()
            scale = max(scale, float(comparison.reference.abs().max()))
            first = first or comparison.first_difference()
    emit.emit(
        "verify",
        max_abs_logit_diff=largest,
        tolerance=RELATIVE_TOLERANCE[plan.model.dtype] * scale,
        first_difference=asdict(first) if first else None,
    )


def compare(job: Job, plan: Plan, run_dir: Path, emit: Emitter) -> Iterator[Comparison]:
    """One comparison a request, in order."""
    device = torch.device(job.device, plan.reference.device) if job.device == "cuda" else torch.device("cpu")
    decoder = load_decoder(plan, plan.reference, TorchComm(plan.reference, {}), device, emit)
    rotary, generated = decoder.rotary(), {g.request: g.token_ids for g in read_generated(run_dir)}
    for done, request in enumerate(job.requests):
        emit.emit("stage", stage="verify", done=done, total=len(job.requests))
        tokens = generated[request.index]
        yield Comparison(request, tokens, kept_logits(run_dir, request), unsharded(decoder, rotary, request, tokens))


def unsharded(decoder: Decoder, rotary: Rotary, request: Request, generated: tuple[int, ...]) -> Tensor:
    """Logits [tokens, vocab] of every generated token, each given all tokens before it, in one pass."""
    tokens = torch.tensor(request.token_ids + generated[:-1], device=decoder.device)
    hidden, _ = decoder.prefill(tokens, rotary, attends=True)
    return decoder.logits(hidden[len(request.token_ids) - 1 :]).cpu()


def kept_logits(run_dir: Path, request: Request) -> Tensor:
    """Logits [tokens, vocab] that the deployment kept: the context instance's, then the generation instance's."""
    files = [logits_file(run_dir, request.index, part) for part in ("first", "rest")]
    return torch.cat([load_file(file)["logits"] for file in files if file.is_file()])


if __name__ == "__main__":
    main()
