"""What one launch computes: job.json in the run directory, written by the launcher and read by every worker."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from helixc_runtime.manifest import ManifestError, read, to_json

JOB_FILE = "job.json"
GENERATED_FILE = "generated.json"

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt as token ids. `temperature` 0 is greedy; `ignore_eos` generates exactly `max_tokens` tokens."""

    index: int
    token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Job:
    """All requests of one launch. `artifact` is an absolute directory, `threads` the CPU threads of one rank.

    `checkpoint`: the weights' folder, None for the one in the plan.

    `keep_logits`: workers write their logits into the run directory for --verify. A rank that says nothing for
    `deadline_s` seconds is given up.
    """

    artifact: str
    checkpoint: str | None
    device: Device
    requests: tuple[Request, ...]
    keep_logits: bool
    deadline_s: float
    threads: int


@dataclass(frozen=True, slots=True)
class Generated:
    """The tokens the deployment generated for one request, what --verify compares with (generated.json)."""

    request: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token that the unsharded model would have chosen otherwise, found by --verify."""

    request: int
    step: int
    expected: int
    got: int


def write_job(job: Job, run_dir: Path) -> None:
    """Write `run_dir`/job.json. Raises OSError."""
    (run_dir / JOB_FILE).write_text(to_json(job), encoding="utf-8")


def read_job(run_dir: Path) -> Job:
    """Read `run_dir`/job.json. Raises OSError, or ManifestError if it is not a job."""
    return cast(Job, _read(Job, run_dir / JOB_FILE))


def write_generated(generated: tuple[Generated, ...], run_dir: Path) -> None:
    """Write `run_dir`/generated.json. Raises OSError."""
    (run_dir / GENERATED_FILE).write_text(to_json(generated), encoding="utf-8")


def read_generated(run_dir: Path) -> tuple[Generated, ...]:
    """Read `run_dir`/generated.json. Raises OSError, or ManifestError for another form."""
    return cast(tuple[Generated, ...], _read(tuple[Generated, ...], run_dir / GENERATED_FILE))


def _read(kind: object, path: Path) -> object:
    try:
        return read(kind, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ManifestError(f"{path}: {error}") from None
