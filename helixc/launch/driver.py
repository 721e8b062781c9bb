"""`helixc launch` on an artifact: choose the device, read the prompts, start the processes, report."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helixc.launch import launch_plan
from helixc.launch.failures import Interrupted, LaunchFailure
from helixc.launch.host import choose_device, find_gpus, this_host
from helixc.launch.launch_plan import LaunchPlan, plan_launch, threads_per_rank
from helixc.launch.metrics import summarize
from helixc.launch.options import LaunchError, LaunchOptions
from helixc.launch.progress import Progress
from helixc.launch.prompts import Prompt, read_prompts
from helixc.launch.record import Record
from helixc.launch.report import table, verdict_text, verified
from helixc.launch.requests import make_requests
from helixc.launch.stream import LiveText, NoText, Output, TextPerRequest
from helixc.launch.supervise import supervise
from helixc.launch.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from helixc_runtime.artifact import Artifact, ArtifactError, load
from helixc_runtime.events import Event
from helixc_runtime.job import Generated, Job, write_generated, write_job
from helixc_runtime.manifest import Plan, to_json

_REFUSED = 2


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything decided before the first process starts."""

    plan: Plan
    prompts: tuple[Prompt, ...]
    tokenizer: Tokenizer | None
    launch_plan: LaunchPlan


def launch(artifact_dir: Path, options: LaunchOptions) -> int:
    """Run the artifact in `artifact_dir`; returns the exit code.

    0: every request finished (and --verify passed). 1: a process or the verification failed. 2: nothing was started
    because of the artifact, the options or the prompts. 128 + N: stopped by signal N.
    """
    _accept_any_text()
    try:
        checkpoint = str(options.checkpoint.resolve()) if options.checkpoint else None
        prepared = prepare(load(artifact_dir, checkpoint), options)
        if options.dry_run:
            text = to_json(prepared.launch_plan) if options.format == "json" else None
            sys.stdout.write(text or launch_plan.to_text(prepared.launch_plan))
            return 0
        _make_run_dir(prepared.launch_plan)
    except ArtifactError as error:
        return _refuse(str(error))
    except LaunchError as error:
        return _refuse(*error.messages)
    return run(prepared, options)


def prepare(artifact: Artifact, options: LaunchOptions) -> Launch:
    """Decide everything, start nothing. Raises LaunchError."""
    plan = artifact.plan
    _check_weights(plan)
    prompts = read_prompts(options)
    tokenizer = _tokenizer(plan, prompts)
    requests = make_requests(plan, prompts, tokenizer, options)
    choice = choose_device(options.device, plan, find_gpus())
    if options.device is None:
        print(f"device: {choice.device} ({choice.reason})", file=sys.stderr)
    host = this_host()
    job = Job(
        artifact=str(artifact.directory.resolve()),
        checkpoint=plan.model.checkpoint,
        device=choice.device,
        requests=requests,
        keep_logits=options.verify,
        deadline_s=options.deadline_s,
        threads=threads_per_rank(host.cores, len(plan.ranks)),
    )
    run_dir = options.run_dir or Path(".helixc", "runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    return Launch(plan, prompts, tokenizer, plan_launch(plan, job, run_dir.resolve(), host))


def run(prepared: Launch, options: LaunchOptions) -> int:
    """Start the processes of `prepared` and report on stdout; returns the exit code."""
    started = prepared.launch_plan
    try:
        return _run(prepared, options)
    except LaunchFailure as failure:
        print("\n".join(["error: " + str(failure), *_notes(failure)]), file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, Interrupted) else 2
        name = str(stop) or "SIGINT"
        print("\n".join([f"stopped by {name}; logs: {started.run_dir}/logs", *_notes(stop)]), file=sys.stderr)
        return 128 + number
    except BrokenPipeError:  # `helixc launch | head`; the interpreter's last flush must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(prepared: Launch, options: LaunchOptions) -> int:
    started, record = prepared.launch_plan, Record(len(prepared.prompts))
    print(f"{started.deployment}: {len(started.processes)} ranks; logs: {started.run_dir}/logs", file=sys.stderr)
    _generate(prepared, record, options)
    if unfinished := record.unfinished:
        raise LaunchFailure(f"every rank ended well, yet nobody finished request {unfinished[0]}")
    if started.reference:
        _verify(started, record)
    texts = [prepared.tokenizer.decode(r.tokens) if prepared.tokenizer else None for r in record.requests]
    summary = summarize(prepared.plan, started.job.requests, record, texts)
    if options.format == "json":
        sys.stdout.write(to_json(summary))
    else:
        sys.stdout.write("\n" + table(summary, record))
    if record.verdict:
        stream = sys.stderr if options.format == "json" else sys.stdout
        stream.write(verdict_text(record.verdict, prepared.plan))
    sys.stdout.flush()
    return 0 if record.verdict is None or verified(record.verdict, prepared.plan) else 1


def _generate(prepared: Launch, record: Record, options: LaunchOptions) -> None:
    started = prepared.launch_plan
    progress = Progress(sys.stderr, len(started.processes), len(prepared.prompts))
    output = _output(prepared, record, progress, options)

    def on_event(event: Event) -> None:
        record.observe(event)
        progress.update(event)
        output.update(event)

    try:
        supervise(started.processes, started.job.deadline_s, on_event)
    finally:
        progress.clear()


def _verify(started: LaunchPlan, record: Record) -> None:
    assert started.reference is not None
    print("verifying against one unsharded process", file=sys.stderr)
    generated = tuple(Generated(i, tuple(r.tokens)) for i, r in enumerate(record.requests))
    write_generated(generated, Path(started.run_dir))
    supervise([started.reference], started.job.deadline_s, record.observe)
    if record.verdict is None:
        raise LaunchFailure(f"the reference process gave no verdict\n  log: {started.reference.log}")


def _output(prepared: Launch, record: Record, progress: Progress, options: LaunchOptions) -> Output:
    if options.format == "json":
        return NoText()
    if len(prepared.prompts) == 1 and prepared.tokenizer:
        return LiveText(prepared.tokenizer, sys.stdout, progress)
    return TextPerRequest(prepared.prompts, record, prepared.tokenizer, sys.stdout, progress)


def _tokenizer(plan: Plan, prompts: Sequence[Prompt]) -> Tokenizer | None:
    """The checkpoint's tokenizer; token ids alone need none. Raises LaunchError."""
    try:
        return load_tokenizer(plan.model.checkpoint)
    except TokenizerError as error:
        if needs := next((p for p in prompts if p.text is not None), None):
            raise LaunchError(f"{needs.source}: {error}") from None
        return None


def _check_weights(plan: Plan) -> None:
    """Raises LaunchError before anything is started if there is nothing to load."""
    model = plan.model
    if model.load_format == "dummy":
        return
    if model.checkpoint is None:
        way_out = "set `load_format: dummy` for random weights, or `model:` to a checkpoint folder"
        raise LaunchError(f"{model.name} is a built-in geometry, which has no weights: {way_out}")
    if not Path(model.checkpoint).is_dir():
        way_out = "say with --checkpoint DIR where it is on this machine"
        raise LaunchError(f"the checkpoint folder {model.checkpoint} does not exist: {way_out}")


def _make_run_dir(started: LaunchPlan) -> None:
    run_dir = Path(started.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(run_dir.iterdir()):
            raise LaunchError(f"--run-dir {run_dir} is not empty; a run needs a directory of its own")
        (run_dir / "logs").mkdir()
        write_job(started.job, run_dir)
    except OSError as error:
        raise LaunchError(f"cannot write the run directory {run_dir}: {error.strerror}") from None


def _accept_any_text() -> None:
    """A model may generate what the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _refuse(*messages: str) -> int:
    for message in messages:
        print(f"error: {message}", file=sys.stderr)
    return _REFUSED


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
