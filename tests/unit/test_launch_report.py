"""From events to numbers, text and exit code; and whole launches with workers that only pretend to compute."""

from __future__ import annotations

import io
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from helixc.launch.driver import Launch, run
from helixc.launch.failures import first_cause, reported
from helixc.launch.launch_plan import Host, Process, plan_launch, runtime_pythonpath
from helixc.launch.metrics import percentile, summarize
from helixc.launch.options import LaunchOptions
from helixc.launch.progress import Progress
from helixc.launch.prompts import Prompt
from helixc.launch.record import Record, Verdict
from helixc.launch.report import milliseconds, table, verdict_text, verified
from helixc.launch.stream import printable
from helixc_runtime.comm import PeerTimeout
from helixc_runtime.events import Event, parse
from helixc_runtime.job import Difference, Job, Request
from helixc_runtime.manifest import to_json
from tests.unit.launch_deployment import deployment


def test_percentiles_are_numpys() -> None:
    for size in (1, 2, 7, 100):
        values = [random.random() for _ in range(size)]
        for percent in (0, 50, 99, 100):
            found = percentile(values, percent)
            assert found is not None and math.isclose(found, numpy.percentile(values, percent))
    assert percentile([], 50) is None


def stage(rank: int, time: float, name: str, done: int = 1, total: int = 1) -> Event:
    return Event("stage", rank, time, {"stage": name, "done": done, "total": total})


def test_ttft_counts_from_the_instances_readiness_and_ttl_leaves_the_handoff_out() -> None:
    plan = deployment(context_tp=2, context_instances=2, cp=2)  # ranks 0-1, 2-3, then 4-5
    record = Record(2)
    for rank, ready in enumerate((5.0, 6.0, 7.0, 9.0, 30.0, 30.0)):
        record.observe(stage(rank, ready, "ready"))
    for request, (rank, first) in enumerate(((0, 6.5), (2, 10.0))):
        record.observe(Event("prefilled", rank, first, {"request": request, "token": 40}))
        for way, size in (("peer", 600), ("host", 400 + request), ("peer", 200 * request)):
            record.observe(Event("handoff", rank, first, {"request": request, "bytes": size, "way": way}))
        for receiver, seconds in ((4, 0.25), (5, 0.5 + request)):
            record.observe(Event("received", receiver, 30.5, {"request": request, "seconds": seconds}))
    for time in (31.0, 31.1, 31.4):
        record.observe(Event("token", 4, time, {"request": 0, "token": 41}))
    record.observe(Event("finished", 4, 31.4, {"request": 0, "reason": "stop"}))
    assert list(record.unfinished) == [1]
    record.observe(Event("finished", 4, 31.5, {"request": 1, "reason": "length"}))
    record.observe(Event("kv_tokens", 5, 31.5, {"tokens": 8}))
    record.observe(Event("kv_tokens", 4, 31.5, {"tokens": 9}))
    requests = [Request(i, (1,) * (3 + i), 4, 0.0, 1.0, 0, False) for i in range(2)]
    summary = summarize(plan, requests, record, ["text", None])
    found = json.loads(to_json(summary))
    first, second = found["requests"]
    assert first.pop("ttft_s") == pytest.approx(0.5) and first.pop("ttl_p50_s") == pytest.approx(0.2)
    assert second.pop("ttft_s") == pytest.approx(1.0)
    common = {"prompt_tokens": 3, "text": "text", "finish_reason": "stop", "token_ids": [40, 41, 41, 41]}
    assert first == {"index": 0, **common, "handoff_bytes": 1000, "handoff_s": 0.5}
    assert (second["handoff_bytes"], second["handoff_s"]) == (1201, 1.5)
    assert second["ttl_p50_s"] is None and second["token_ids"] == [40] and second["text"] is None
    metrics = found["metrics"]
    assert metrics.pop("ttl_p50_s") == pytest.approx(0.2) and metrics.pop("ttl_p99_s") == pytest.approx(0.298)
    moved = {"handoff_bytes": 2201, "handoff_peer_bytes": 1400, "handoff_s": 2.0, "handoff_gb_s": 2201 / 2.0 / 1e9}
    assert metrics == {**moved, "kv_tokens_per_rank": {"4": 9, "5": 8}}
    assert found["verify"] is None
    printed = table(summary, record)
    overall = "KV handed over: 2,201 bytes in 2000 ms, 1.1e-06 GB/s, 1,400 of them between peers\n"
    assert overall in printed and "rank 4: 9, rank 5: 8" in printed
    of_first = "0 3 4 stop 500 ms 200 ms 298 ms 1,000 bytes in 500 ms, 2e-06 GB/s"
    assert " ".join(printed.splitlines()[1].split()) == of_first


@pytest.mark.parametrize(
    ("difference", "first", "dtype", "passes"),
    [
        (0.009, None, "float32", True),
        (0.011, None, "float32", False),
        (math.nan, None, "bfloat16", False),
        (0.001, Difference(1, 4, 17, 18), "float32", False),
        (0.001, Difference(1, 4, 17, 18), "bfloat16", True),
    ],
)
def test_verdicts(difference: float, first: Difference | None, dtype: str, passes: bool) -> None:
    plan = deployment()
    plan = replace(plan, model=replace(plan.model, dtype=dtype))  # type: ignore[arg-type]
    verdict = Verdict(difference, 0.01, first)
    assert verified(verdict, plan) is passes
    text = verdict_text(verdict, plan)
    assert ("passed" in text) is passes and ("FAILED" in text) is not passes
    assert ("request 1, generated token 4: expected 17, got 18" in text) is (first is not None)


def test_a_nan_verdict_is_still_json() -> None:
    record = Record(0)
    fields = {"max_abs_logit_diff": math.nan, "tolerance": 0.1, "first_difference": None}
    record.observe(Event("verify", 0, 1.0, fields))
    text = to_json(summarize(deployment(), [], record, []))
    assert json.loads(text, parse_constant=pytest.fail)["verify"] == {
        "max_abs_logit_diff": None,
        "first_difference": None,
    }


def test_milliseconds() -> None:
    assert [milliseconds(s) for s in (None, 0.00123, 0.0123, 0.123, 4.0)] == [
        "-",
        "1.23 ms",
        "12.3 ms",
        "123 ms",
        "4000 ms",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_follows_the_slowest_rank() -> None:
    stream = io.StringIO()
    progress = Progress(stream, ranks=2, requests=1)
    for event in (
        stage(0, 0, "connect"),
        stage(1, 0, "connect"),
        stage(0, 0, "weights", 3, 9),
        stage(0, 0, "ready"),
        stage(1, 0, "weights", 1, 9),
        stage(1, 0, "ready"),
        Event("prefilled", 0, 0, {"request": 0, "token": 1}),
        Event("token", 1, 0, {"request": 0, "token": 1}),
    ):
        progress.update(event)
    words = [line.partition("] ")[2] for line in stream.getvalue().splitlines()]
    assert words == ["starting processes", "connecting", "loading weights", "prefilling", "decoding"]


def test_progress_on_a_terminal_leaves_the_line_to_the_text() -> None:
    stream = Terminal()
    progress = Progress(stream, ranks=1, requests=1)
    progress.update(stage(0, 0, "weights", 3, 9))
    assert stream.getvalue().endswith("loading weights: 3 of 9 on 1 ranks") and "\n" not in stream.getvalue()
    progress.stop()
    shown = stream.getvalue()
    progress.update(stage(0, 0, "ready"))
    assert shown.endswith("\r\x1b[2K") and stream.getvalue() == shown


def test_a_model_cannot_drive_the_terminal() -> None:
    text = "a\x1b[2J\x07\tb\n\x9bc"
    assert printable(text, Terminal()) == "a\ufffd[2J\ufffd\tb\n\ufffdc"
    assert printable(text, io.StringIO()) == text


@pytest.mark.parametrize("line", [b"", b"hello", b"[]", b"1", b'{"event": "done"}', b"\xe2\x82", b'{"rank": []}'])
def test_what_is_no_event(line: bytes) -> None:
    assert parse(line) is None


# --- Whole launches ---------------------------------------------------------------------------------------------

# Rank 0 prefills, the last rank generates: what it says depends on the job, not on any model.
WORKER = """
import os, sys, time
from pathlib import Path
from helixc_runtime.job import read_generated, read_job
from helixc_runtime.worker import supervised
rank, world, run_dir, act = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1]), sys.argv[2]
job = read_job(run_dir)
first = {r.index: r.token_ids[0] for r in job.requests}

def body(emit):
    if act == "reference":
        wrong = next((g for g in read_generated(run_dir) if g.token_ids[0] != first[g.request]), None)
        emit.emit("verify", max_abs_logit_diff=2e-6, tolerance=1e-4, first_difference=wrong and
                  {"request": wrong.request, "step": 0, "expected": first[wrong.request], "got": wrong.token_ids[0]})
        return
    emit.emit("stage", stage="ready", done=1, total=1)
    if rank == 0:
        for r in job.requests:
            emit.emit("prefilled", request=r.index, token=first[r.index] + (act == "wrong"))
            (run_dir / f"handed{r.index}").touch()
            emit.emit("handoff", request=r.index, bytes=64, way="peer")
    if rank == world - 1:
        for r in job.requests:
            while not (run_dir / f"handed{r.index}").exists():
                time.sleep(0.001)
            for step in range(1, r.max_tokens):
                emit.emit("token", request=r.index, token=first[r.index] + step)
            if act != "forget":
                emit.emit("finished", request=r.index, reason="length")
        emit.emit("kv_tokens", tokens=7)

supervised(body, rank)
"""


def prepared(folder: Path, requests: int, act: str, *, verify: bool = False) -> Launch:
    """A launch whose processes run WORKER."""
    plan = deployment()
    ids = [tuple(random.choices(range(1000), k=4)) for _ in range(requests)]
    prompts = tuple(Prompt(f"p:{i}", None, ids[i], 5, 0.0, 1.0, 0, True) for i in range(requests))
    wanted = tuple(Request(i, ids[i], 5, 0.0, 1.0, 0, True) for i in range(requests))
    job = Job("/artifact", None, "cpu", wanted, verify, 30.0, 1)
    started = plan_launch(plan, job, folder, Host(sys.executable, runtime_pythonpath(None), 1, 1234))
    (folder / "logs").mkdir()
    (folder / "job.json").write_text(to_json(job))
    (folder / "worker.py").write_text(WORKER)

    def argv(what: str) -> tuple[str, ...]:
        return (sys.executable, str(folder / "worker.py"), str(folder), what)

    processes = tuple(replace(p, argv=argv(act)) for p in started.processes)
    reference = started.reference and replace(started.reference, argv=argv("reference"))
    return Launch(plan, prompts, None, replace(started, processes=processes, reference=reference))


def test_json_is_one_object_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch = prepared(tmp_path, 3, "right", verify=True)
    assert run(launch, LaunchOptions(format="json", verify=True)) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found.keys() == {"requests", "metrics", "verify"}
    for result, request in zip(found["requests"], launch.launch_plan.job.requests, strict=True):
        assert result["token_ids"] == [request.token_ids[0] + step for step in range(5)]
        assert result["ttft_s"] >= 0 and result["ttl_p50_s"] >= 0 and result["finish_reason"] == "length"
    assert found["metrics"]["handoff_bytes"] == 192 == found["metrics"]["handoff_peer_bytes"]
    assert found["metrics"]["kv_tokens_per_rank"] == {"2": 7}
    assert found["verify"] == {"max_abs_logit_diff": 2e-6, "first_difference": None}
    assert "verify passed" in err


def test_text_ends_with_a_table_and_a_failed_verify_with_exit_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launch = prepared(tmp_path, 2, "wrong", verify=True)
    assert run(launch, LaunchOptions(verify=True)) == 1
    out, _ = capfd.readouterr()
    first = launch.launch_plan.job.requests[0].token_ids[0]
    assert f"[0] 4 token ids\n{first + 1} {first + 1} {first + 2}" in out
    assert "request  prompt tokens  generated" in out and "KV tokens stored: rank 2: 7" in out
    assert "verify FAILED: largest logit difference 2e-06, tolerance 0.0001\nfirst differing token: request 0, " in out
    assert f"expected {first}, got {first + 1}" in out


def test_a_request_nobody_finished_is_a_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(prepared(tmp_path, 1, "forget"), LaunchOptions()) == 1
    assert "nobody finished request 0" in capfd.readouterr().err


def test_a_failing_rank_gives_exit_1_and_one_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch = prepared(tmp_path, 1, "right")
    (tmp_path / "job.json").unlink()
    assert run(launch, LaunchOptions()) == 1
    _, err = capfd.readouterr()
    assert err.count("error: ") == 1 and "exited with code 1" in err and "FileNotFoundError" in err


def test_a_wait_in_vain_is_the_cause_only_alone() -> None:
    """A rank whose kernel gave up waiting for a peer says less than what became of that peer."""
    waiting, failing = (Process(name, name, (), {}, "log") for name in ("rank 0", "rank 1"))
    error = PeerTimeout("rank 0 waited 60 s for rank 1 in vain: layer 3 FFN, decode step 7")
    waited = reported(waiting, f"{type(error).__name__}: {error}", 1.0)
    failed = reported(failing, "ValueError: weights of layer 7 are missing", 2.0)
    assert first_cause([waited, failed]) is failed
    assert first_cause([waited]) is waited
