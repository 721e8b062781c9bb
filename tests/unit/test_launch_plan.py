"""What would be started, from plan and options; devices; the launcher's independence of heavy packages."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import helixc
from helixc.artifact import write
from helixc.launch import LaunchError, LaunchOptions, launch
from helixc.launch.host import Gpus, choose_device, this_host
from helixc.launch.launch_plan import Host, plan_launch, runtime_pythonpath, threads_per_rank, to_text
from helixc_runtime.job import Generated, Job, Request, read_generated, read_job, write_generated, write_job
from helixc_runtime.manifest import Kernel, ManifestError
from tests.unit.launch_deployment import deployment

HOST = Host(python="/opt/py/bin/python", pythonpath="/src/runtime", cores=12, port=29511)


def a_job(*, keep_logits: bool = False) -> Job:
    tokens = tuple(random.choices(range(1000), k=5))
    return Job("/artifact", None, "cpu", (Request(0, tokens, 8, 0.5, 0.9, 3, False),), keep_logits, 60.0, 4)


def test_every_rank_gets_torchruns_environment() -> None:
    plan = deployment(context_tp=2, tp=1, cp=2)
    started = plan_launch(plan, a_job(), Path("/runs/a b"), HOST)
    assert [p.env["RANK"] for p in started.processes] == ["0", "1", "2", "3"]
    last = started.processes[3]
    assert last.env == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": str(plan.ranks[3].device),
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
        "OMP_NUM_THREADS": "4",
        "PYTHONPATH": "/src/runtime",
        "PYTHONSAFEPATH": "1",
    }
    assert last.argv == ("/opt/py/bin/python", "-m", "helixc_runtime.worker", "/runs/a b")
    assert last.log == "/runs/a b/logs/rank3.log"
    assert last.title == "rank 3 (generation instance 0, pp 0 tp 0 cp 1)"
    assert started.processes[1].title == "rank 1 (context instance 0, pp 0 tp 1 cp 0)"
    assert started.reference is None


def test_nodes_and_threads() -> None:
    started = plan_launch(deployment(context_tp=2, cp=4, gpus_per_node=4), a_job(), Path("/r"), HOST)
    assert [p.env["GROUP_RANK"] for p in started.processes] == ["0"] * 4 + ["1"] * 2
    assert [p.env["LOCAL_WORLD_SIZE"] for p in started.processes] == ["4"] * 4 + ["2"] * 2
    cuda = plan_launch(deployment(), replace(a_job(), device="cuda"), Path("/r"), HOST)
    assert all("OMP_NUM_THREADS" not in p.env for p in cuda.processes)
    assert [threads_per_rank(12, n) for n in (1, 5, 12, 40)] == [12, 2, 1, 1]


def test_verify_adds_the_reference_process() -> None:
    started = plan_launch(deployment(), a_job(keep_logits=True), Path("/r"), HOST)
    assert started.reference is not None
    assert started.reference.argv[-2:] == ("helixc_runtime.reference", "/r")
    assert started.reference.env["WORLD_SIZE"] == "1" and started.reference.env["OMP_NUM_THREADS"] == "12"


def test_the_printed_lines_are_shell_commands_of_the_processes() -> None:
    started = plan_launch(deployment(), a_job(keep_logits=True), Path("/runs/a b"), HOST)
    lines = [line for line in to_text(started).splitlines() if not line.startswith("#")]
    assert started.reference is not None
    for line, process in zip(lines, (*started.processes, started.reference), strict=True):
        words = shlex.split(line, comments=True)
        env = [f"{k}={v}" for k, v in process.env.items()]
        assert words == [*env, *process.argv, f"2>{process.log}"]


def test_the_job_file_round_trips(tmp_path: Path) -> None:
    job = a_job()
    write_job(job, tmp_path)
    assert read_job(tmp_path) == job
    generated = (Generated(0, tuple(random.choices(range(9), k=3))), Generated(1, ()))
    write_generated(generated, tmp_path)
    assert read_generated(tmp_path) == generated
    assert json.loads((tmp_path / "generated.json").read_text())[1] == {"request": 1, "token_ids": []}
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(ManifestError, match=r"job\.json"):
        read_job(tmp_path)


def test_the_runtime_is_found_by_a_bare_interpreter() -> None:
    env = {**os.environ, "PYTHONPATH": runtime_pythonpath("/nowhere") or ""}
    code = "import helixc_runtime.job, sys; print(helixc_runtime.job.__file__)"
    found = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("job.py")
    assert env["PYTHONPATH"].endswith("/nowhere")


def test_this_host_offers_a_free_port_and_cores() -> None:
    host = this_host()
    assert host.python == sys.executable and host.cores >= 1 and 1024 <= host.port < 65536


GPUS = Gpus(("9.0",) * 4, None)
KERNELS = (Kernel("attend", "attend", {}, "sm_90a", "k.cubin"), Kernel("attend_b", "attend", {}, "sm_100a", "b.cubin"))


@pytest.mark.parametrize(
    ("plan", "gpus", "why"),
    [
        (deployment(cp=4), GPUS, "5 CUDA devices and this host has 4"),
        (deployment(cp=4, gpus_per_node=4), GPUS, "spans 2 nodes"),
        (deployment(), Gpus((), "no CUDA driver on this host"), "no CUDA driver on this host"),
        (deployment(), Gpus(("8.0",) * 4, None), "compiled for sm_100a, sm_90a, this device is sm_80"),
    ],
)
def test_a_plan_that_does_not_fit_the_gpus(plan: object, gpus: Gpus, why: str) -> None:
    fitted = replace(plan, kernels=KERNELS)  # type: ignore[type-var]
    with pytest.raises(LaunchError, match=why):
        choose_device("cuda", fitted, gpus)
    choice = choose_device(None, fitted, gpus)
    assert choice.device == "cpu" and re.search(why, choice.reason)


def test_cuda_is_taken_where_it_fits() -> None:
    plan = replace(deployment(), kernels=KERNELS)
    assert choose_device(None, plan, GPUS).device == "cuda"
    assert choose_device("cuda", plan, GPUS).device == "cuda"
    assert choose_device("cpu", plan, GPUS).device == "cpu"
    with pytest.raises(LaunchError, match="no architecture"):
        choose_device("cuda", replace(plan, kernels=()), GPUS)


def a_prompt_file(folder: Path, *, tokens: int = 4) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text(json.dumps({"token_ids": random.choices(range(1000), k=tokens)}) + "\n")
    return path


def test_a_dry_run_prints_the_launch_plan_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "artifact", deployment(), "", {}, nvrtc=None)
    run_dir = tmp_path / "run"
    options = LaunchOptions(
        prompts_file=a_prompt_file(tmp_path), device="cpu", dry_run=True, run_dir=run_dir, format="json"
    )
    assert launch(tmp_path / "artifact", options) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [p["env"]["RANK"] for p in printed["processes"]] == ["0", "1", "2"]
    assert printed["run_dir"] == str(run_dir) and printed["job"]["device"] == "cpu"
    assert launch(tmp_path / "artifact", replace(options, format="text")) == 0
    assert capsys.readouterr().out.count("-m helixc_runtime.worker") == 3
    assert not run_dir.exists()


def test_what_cannot_be_launched_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = LaunchOptions(prompts_file=a_prompt_file(tmp_path), device="cpu", run_dir=tmp_path / "run")
    assert launch(tmp_path, options) == 2
    assert "helixc compile" in capsys.readouterr().err
    write(tmp_path / "artifact", deployment(context_instances=0), "", {}, nvrtc=None)
    assert launch(tmp_path / "artifact", options) == 2
    assert "no context instances" in capsys.readouterr().err
    write(tmp_path / "whole", deployment(), "", {}, nvrtc=None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.json").touch()
    assert launch(tmp_path / "whole", options) == 2
    assert "is not empty" in capsys.readouterr().err


def test_launching_a_directory_needs_only_the_standard_library(tmp_path: Path) -> None:
    write(tmp_path / "artifact", deployment(), "", {}, nvrtc=None)
    prompts = a_prompt_file(tmp_path)
    code = f"""
import sys
for name in ("torch", "numpy", "pydantic", "jinja2", "yaml", "tokenizers", "safetensors"):
    sys.modules[name] = None  # an import of it fails
from pathlib import Path
from helixc.launch import LaunchOptions, launch
sys.exit(launch(Path({str(tmp_path / "artifact")!r}), LaunchOptions(prompts_file=Path({str(prompts)!r}), dry_run=True)))
"""
    root = Path(helixc.__path__[0]).resolve().parent
    env = {**os.environ, "PYTHONPATH": f"{root}:{runtime_pythonpath(None) or ''}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("helixc_runtime.worker") == 3
