"""Load a cubin with the CUDA driver and launch its kernel on torch's current stream and context."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_CTYPES: dict[str, Any] = {"pointer": ctypes.c_uint64, "int32": ctypes.c_int32}


class CubinError(RuntimeError):
    """A cubin does not fit this GPU, or the driver refused it."""


def device_arch(device: torch.device) -> str:
    """The architecture whose cubins run on `device`, such as sm_90a."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}a" if major >= 9 else f"sm_{major}{minor}"


def check_arch(arches: Sequence[str], device: torch.device) -> str:
    """The one of `arches` that runs on `device`. Raises CubinError saying how to get one."""
    wanted = device_arch(device)
    if wanted in arches:
        return wanted
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    compiled = ", ".join(sorted(set(arches))) or "no architecture"
    raise CubinError(
        f"the kernels were compiled for {compiled}, but {device} ({name}) has compute capability {major}.{minor}: "
        f"compile the deployment with --arch {wanted}"
    )


class LoadedKernel:
    """One kernel of a loaded cubin, with an argument array that launches fill in place.

    `arguments` names the type of each argument, "pointer" or "int32". Not safe for concurrent launches of one object.
    """

    def __init__(self, path: Path, name: str, arguments: Sequence[str], threads: int, device: torch.device) -> None:
        """Load `path` on `device`. Raises CubinError if the driver or its Python binding refuses."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise CubinError(f"launching kernels needs cuda-bindings ({error}): pip install cuda-bindings") from error
        self._driver, self._name, self._threads, self._device = driver, name, threads, device
        torch.cuda.synchronize(device)  # makes torch's context exist
        with torch.cuda.device(device):
            library = self._check(driver.cuLibraryLoadData(path.read_bytes(), [], [], 0, [], [], 0), path)
            kernel = self._check(driver.cuLibraryGetKernel(library, name.encode()), path)
            self._function = self._check(driver.cuKernelGetFunction(kernel), path)
        self._slots = [_CTYPES[kind]() for kind in arguments]
        self._array = (ctypes.c_void_p * len(self._slots))(*[ctypes.addressof(slot) for slot in self._slots])

    def launch(self, grid: tuple[int, int, int], *values: int) -> None:
        """Enqueue one launch with `values` (device addresses and int32s) on torch's current stream."""
        assert len(values) == len(self._slots), f"{self._name} takes {len(self._slots)} arguments, got {len(values)}"
        for slot, value in zip(self._slots, values, strict=True):
            slot.value = value
        # Read at every launch: under CUDA-graph capture the current stream is another one.
        stream = self._driver.CUstream(torch.cuda.current_stream(self._device).cuda_stream)
        block = (self._threads, 1, 1)
        with torch.cuda.device(self._device):
            arguments = ctypes.addressof(self._array)
            result = self._driver.cuLaunchKernel(self._function, *grid, *block, 0, stream, arguments, 0)
        self._check(result, f"launching {self._name} with grid {grid}")

    def _check(self, result: tuple[Any, ...], what: object) -> Any:
        error, *values = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise CubinError(f"{what}: the CUDA driver says {error.name}")
        return values[0] if values else None
