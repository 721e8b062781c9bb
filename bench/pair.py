"""Two ranks of one generation instance, a process and a GPU each, with nothing of an engine but their Comm and Ops.

On a machine of one GPU they share it, and their kernels wait for each other by time slices: no place to measure.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from helixc.codegen.build import compile_all, render_all
from helixc.codegen.problem import KernelSpec
from helixc.codegen.select import select
from helixc.launch.host import free_port
from helixc_runtime.attention_shape import attention_shape
from helixc_runtime.comm import backend_for
from helixc_runtime.ffn_cuda import ARGUMENTS as FFN_ARGUMENTS
from helixc_runtime.manifest import Kernel, Plan
from helixc_runtime.one_sided import OneSidedComm
from helixc_runtime.ops_cuda import CudaOps
from tests.deployments import on_gpus, plan_of, role

_spawn = multiprocessing.get_context("spawn")
GRACE_S = 10.0  # for the other process, once one has ended


@dataclass(frozen=True)
class Side:
    """What each of the two has. `seed` is the same for both."""

    index: int
    plan: Plan
    folder: Path  # of the artifact
    comm: OneSidedComm
    ops: CudaOps
    device: torch.device
    seed: int

    def meet(self) -> None:
        """Wait for the other, once this GPU has done its work."""
        torch.cuda.synchronize(self.device)
        dist.barrier()


@dataclass(frozen=True)
class Ending:
    """How one process ended: with its body's value, with a traceback, or without a word."""

    how: Literal["done", "failed", "gone"]
    value: Any = None


def pair_plan(model: str, folder: Path, arch: str, rows: int) -> Plan:
    """bare_plan, and what attention and the sends need compiled in `folder`: the kernels of the FFN are left out."""
    plan = bare_plan(model, rows)
    specs = [spec for spec in select(plan, (arch,)) if spec.template not in FFN_ARGUMENTS]
    return replace(plan, kernels=compiled(specs, folder))


def bare_plan(model: str, rows: int) -> Plan:
    """`gen tp1 cp2` of a built-in geometry in bfloat16 on one host, without kernels; one-sided up to `rows`.

    Latent attention exchanges latents, whatever would be chosen for so many rows.
    """
    plan = plan_of(model, None, role(cp=2, batch=rows, block=64, exchange_space="latent"), dtype="bfloat16")
    return replace(plan, instances=(replace(plan.instances[0], reduce_rows=rows),))


def compiled(specs: Sequence[KernelSpec], folder: Path) -> tuple[Kernel, ...]:
    """Kernels, in an artifact's `folder`."""
    kernels = []
    for cubin in compile_all(render_all(specs)):
        shutil.copytree(cubin.directory, folder / "kernels" / cubin.directory.name, dirs_exist_ok=True)
        kernels.append(cubin.kernel())
    return tuple(kernels)


def ops_of(plan: Plan, index: int, folder: Path, device: torch.device) -> CudaOps:
    """The Ops of one of the two, of an artifact in `folder`."""
    rank = plan.ranks[index]
    shape = attention_shape(plan.model, rank, plan.tokens_per_block)
    return CudaOps(shape, plan.kernels, folder, device)


def run_pair(
    body: Callable[..., Any],
    plan: Plan,
    folder: Path,
    *arguments: Any,
    seed: int = 0,
    patience: float = 20.0,
    deadline: float = 120.0,
) -> list[Ending]:
    """`body(side, *arguments)` in both processes; what is there `deadline` seconds later is killed."""
    pipes, processes = start_pair(_process, plan, folder, seed, patience, body, arguments)
    endings: dict[Connection, Ending] = {}
    end = time.monotonic() + deadline
    while len(endings) < len(pipes) and (left := end - time.monotonic()) > 0:
        for pipe in wait([pipe for pipe in pipes if pipe not in endings], timeout=left):
            endings[pipe] = _ending(pipe)
            end = min(end, time.monotonic() + GRACE_S)
    for process in processes:
        process.kill()
        process.join()
    return [endings.get(pipe, Ending("gone")) for pipe in pipes]


def values(endings: list[Ending]) -> list[Any]:
    """What both bodies returned. Raises RuntimeError if one did not."""
    for index, ending in enumerate(endings):
        if ending.how != "done":
            raise RuntimeError(f"rank {index} is {ending.how}: {ending.value}")
    return [ending.value for ending in endings]


def _ending(pipe: Connection) -> Ending:
    try:
        return Ending(*pipe.recv())
    except EOFError:
        return Ending("gone")


def start_pair(main: Callable[..., None], *arguments: Any) -> tuple[list[Connection], list[BaseProcess]]:
    """Our ends of the pipes, and the processes: two of `main(index, port, *arguments, pipe)`, which meet there."""
    port, pipes, processes = free_port(), [], []
    for index in range(2):
        ours, theirs = _spawn.Pipe(duplex=False)
        processes.append(_spawn.Process(target=main, args=(index, port, *arguments, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    return pipes, processes


def _process(
    index: int,
    port: int,
    plan: Plan,
    folder: Path,
    seed: int,
    patience: float,
    body: Callable[..., Any],
    arguments: tuple[Any, ...],
    pipe: Connection,
) -> None:
    try:
        plan = on_gpus(plan, torch.cuda.device_count())
        device = torch.device("cuda", plan.ranks[index].device)
        torch.cuda.set_device(device)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
        group = dist.new_group([0, 1], backend=backend_for(plan, (0, 1), device))
        rank, kernels = plan.ranks[index], plan.kernels
        groups = {"cp": group, "ffn_tp": group}
        with torch.inference_mode():
            comm = OneSidedComm(rank, groups, plan.instances[0], kernels, folder, device, patience)
            ops = ops_of(plan, index, folder, device)
            value = body(Side(index, plan, folder, comm, ops, device, seed), *arguments)
            torch.cuda.synchronize(device)
        pipe.send(("done", value))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # a GPU that waits, or a stopped peer, keeps nothing alive
