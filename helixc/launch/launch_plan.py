"""What a launch starts: every process with its command, environment and log. --dry-run prints this very value."""

from __future__ import annotations

import shlex
import site
from dataclasses import dataclass
from pathlib import Path

import helixc_runtime
from helixc_runtime.job import Job
from helixc_runtime.manifest import Plan, Rank


@dataclass(frozen=True, slots=True)
class Process:
    """One process. `env` is added to the launcher's own; `log` receives its stderr."""

    name: str  # "rank 3" or "reference"
    title: str  # the name, and its place in the deployment
    argv: tuple[str, ...]
    env: dict[str, str]
    log: str


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """A whole launch. `reference` is the unsharded process that runs after the others, for --verify."""

    deployment: str
    run_dir: str
    job: Job
    processes: tuple[Process, ...]
    reference: Process | None


@dataclass(frozen=True, slots=True)
class Host:
    """What the commands need to know of this machine. `port`: a free TCP port; `cores`: CPUs this process may use."""

    python: str
    pythonpath: str | None
    cores: int
    port: int


def plan_launch(plan: Plan, job: Job, run_dir: Path, host: Host) -> LaunchPlan:
    """The processes that run `job` on `plan`, in rank order, and the reference process if the job keeps logits."""
    ranks = tuple(_worker(plan, rank, job, run_dir, host) for rank in plan.ranks)
    reference = _reference(job, run_dir, host) if job.keep_logits else None
    return LaunchPlan(plan.name, str(run_dir), job, ranks, reference)


def threads_per_rank(cores: int, ranks: int) -> int:
    """CPU threads of one rank when `ranks` processes share `cores`."""
    return max(1, cores // ranks)


def runtime_pythonpath(inherited: str | None) -> str | None:
    """PYTHONPATH under which a new interpreter finds helixc_runtime; `inherited` where it is installed anyway."""
    home = str(Path(helixc_runtime.__path__[0]).resolve().parent)
    if home in [str(Path(p).resolve()) for p in (*site.getsitepackages(), site.getusersitepackages())]:
        return inherited
    return f"{home}:{inherited}" if inherited else home


def to_text(launch: LaunchPlan) -> str:
    """The launch plan as shell lines, a process a line."""
    processes = launch.processes + ((launch.reference,) if launch.reference else ())
    head = [
        f"# {launch.deployment}: {len(launch.processes)} processes on {launch.job.device}, "
        f"{len(launch.job.requests)} requests; artifact {launch.job.artifact}",
        f"# {launch.run_dir} holds job.json and the logs; the environment below is added to this shell's",
    ]
    return "\n".join(head + [_shell_line(p) for p in processes]) + "\n"


def _shell_line(process: Process) -> str:
    env = " ".join(f"{k}={shlex.quote(v)}" for k, v in process.env.items())
    return f"{env} {shlex.join(process.argv)} 2>{shlex.quote(process.log)}  # {process.title}"


def _worker(plan: Plan, rank: Rank, job: Job, run_dir: Path, host: Host) -> Process:
    name = f"rank {rank.rank}"
    place = f"{rank.role} instance {rank.instance}, pp {rank.pp_rank} tp {rank.tp_rank} cp {rank.cp_rank}"
    env = _torchrun_env(
        rank=rank.rank,
        world_size=len(plan.ranks),
        local_rank=rank.device,
        local_world_size=sum(r.node == rank.node for r in plan.ranks),
        node=rank.node,
        host=host,
    )
    argv = (host.python, "-m", "helixc_runtime.worker", str(run_dir))
    log = str(run_dir / "logs" / f"rank{rank.rank}.log")
    return Process(name, f"{name} ({place})", argv, env | _threads(job, job.threads) | _python(host), log)


def _reference(job: Job, run_dir: Path, host: Host) -> Process:
    env = _torchrun_env(rank=0, world_size=1, local_rank=0, local_world_size=1, node=0, host=host)
    argv = (host.python, "-m", "helixc_runtime.reference", str(run_dir))
    log = str(run_dir / "logs" / "reference.log")
    title = "reference (one unsharded process)"
    return Process("reference", title, argv, env | _threads(job, host.cores) | _python(host), log)


def _torchrun_env(
    *, rank: int, world_size: int, local_rank: int, local_world_size: int, node: int, host: Host
) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(host.port),
    }


def _threads(job: Job, threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads)} if job.device == "cpu" else {}


def _python(host: Host) -> dict[str, str]:
    """Workers must find the runtime, and must not import a user's queue.py from the working directory."""
    path = {"PYTHONPATH": host.pythonpath} if host.pythonpath else {}
    return {**path, "PYTHONSAFEPATH": "1"}
