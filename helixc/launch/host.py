"""What this machine offers a launch: cores, a free port, CUDA devices."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from dataclasses import dataclass

from helixc.launch.launch_plan import Host, runtime_pythonpath
from helixc.launch.options import LaunchError
from helixc_runtime.job import Device
from helixc_runtime.manifest import Plan

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True, slots=True)
class Gpus:
    """Compute capability ("9.0") of each visible CUDA device; `missing` says why there is none."""

    capabilities: tuple[str, ...]
    missing: str | None


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """Where a launch runs, and why."""

    device: Device
    reason: str


def this_host() -> Host:
    """This interpreter, the CPUs it may run on, and a TCP port that is free now."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Host(sys.executable, runtime_pythonpath(os.environ.get("PYTHONPATH")), cores, free_port())


def free_port() -> int:
    """A TCP port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_gpus() -> Gpus:
    """Ask the CUDA driver, if there is one, for the devices visible to this process. Creates no context."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Gpus((), "no CUDA driver on this host")
    if status := cuda.cuInit(0):
        return Gpus((), f"the CUDA driver finds no usable device (cuInit returned {status})")
    count = ctypes.c_int()
    if status := cuda.cuDeviceGetCount(ctypes.byref(count)):
        return Gpus((), f"the CUDA driver cannot count its devices (error {status})")
    return Gpus(tuple(_capability(cuda, i) for i in range(count.value)), None if count.value else "no CUDA device")


def _capability(cuda: ctypes.CDLL, index: int) -> str:
    device, value = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    digits = []
    for attribute in (_MAJOR, _MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        digits.append(str(value.value))
    return ".".join(digits)


def choose_device(wanted: Device | None, plan: Plan, gpus: Gpus) -> DeviceChoice:
    """`wanted` if `plan` can run on it here; None: cuda where it can, else cpu. Raises LaunchError."""
    if wanted == "cpu":
        return DeviceChoice("cpu", "asked for")
    obstacle = _cuda_obstacle(plan, gpus)
    if obstacle is None:
        return DeviceChoice("cuda", f"{len(gpus.capabilities)} devices of compute capability {gpus.capabilities[0]}")
    if wanted == "cuda":
        raise LaunchError(f"--device cuda: {obstacle}; use --device cpu, or a deployment that fits this host")
    return DeviceChoice("cpu", obstacle)


def _cuda_obstacle(plan: Plan, gpus: Gpus) -> str | None:
    """Why `plan` cannot run on the CUDA devices of this host."""
    nodes = 1 + max(rank.node for rank in plan.ranks)
    if nodes > 1:
        return f"the plan spans {nodes} nodes and a launch starts processes on this one only"
    if gpus.missing:
        return gpus.missing
    needed, here = 1 + max(rank.device for rank in plan.ranks), len(gpus.capabilities)
    if needed > here:
        return f"the plan places ranks on {needed} CUDA devices and this host has {here}"
    return next((o for i in range(needed) if (o := _kernel_obstacle(plan, gpus.capabilities[i]))), None)


def _kernel_obstacle(plan: Plan, capability: str) -> str | None:
    arch = "sm_" + capability.replace(".", "")
    compiled = sorted({kernel.arch for kernel in plan.kernels if kernel.cubin})
    if any(a.rstrip("af") == arch for a in compiled):
        return None
    return f"the artifact's kernels are compiled for {', '.join(compiled) or 'no architecture'}, this device is {arch}"
