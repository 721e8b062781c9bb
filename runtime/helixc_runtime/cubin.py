"""Load a cubin with the CUDA driver and launch its kernel on torch's current stream and context."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_CTYPES: dict[str, Any] = {"pointer": ctypes.c_uint64, "int32": ctypes.c_int32, "map": ctypes.c_uint8 * 128}
_STATIC_SHARED = 48 * 1024  # bytes a thread block may have without asking


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

    `arguments` names the type of each argument: "pointer", "int32" or "map" (a TensorMap). `shared` is the dynamic
    shared memory of a thread block in bytes. `early`: the launch may start while the kernel before it still runs
    (programmatic dependent launch); the kernel itself waits where it must. Not safe for concurrent launches of one
    object.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        arguments: Sequence[str],
        threads: int,
        device: torch.device,
        shared: int = 0,
        early: bool = False,
    ) -> None:
        """Load `path` on `device`. Raises CubinError if the driver or its Python binding refuses."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise CubinError(f"launching kernels needs cuda-bindings ({error}): pip install cuda-bindings") from error
        self._driver, self._name, self._device = driver, name, device
        torch.cuda.synchronize(device)  # makes torch's context exist
        with torch.cuda.device(device):
            library = self._check(driver.cuLibraryLoadData(path.read_bytes(), [], [], 0, [], [], 0), path)
            kernel = self._check(driver.cuLibraryGetKernel(library, name.encode()), path)
            self._function = self._check(driver.cuKernelGetFunction(kernel), path)
            if shared > _STATIC_SHARED:
                attributes = driver.CUfunction_attribute
                most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._check(driver.cuFuncSetAttribute(self._function, most, shared), path)
        self._slots = [_CTYPES[kind]() for kind in arguments]
        self._array = (ctypes.c_void_p * len(self._slots))(*[ctypes.addressof(slot) for slot in self._slots])
        self._config = self._launch_config(threads, shared, early)

    def launch(self, grid: tuple[int, int, int], *values: int | ctypes.Array[ctypes.c_uint8]) -> None:
        """Enqueue one launch with `values` (device addresses, int32s, tensor maps) on torch's current stream."""
        assert len(values) == len(self._slots), f"{self._name} takes {len(self._slots)} arguments, got {len(values)}"
        for slot, value in zip(self._slots, values, strict=True):
            if isinstance(value, int):
                slot.value = value
            else:
                ctypes.memmove(slot, value, len(value))
        config = self._config
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        # Read at every launch: under CUDA-graph capture the current stream is another one.
        config.hStream = self._driver.CUstream(torch.cuda.current_stream(self._device).cuda_stream)
        with torch.cuda.device(self._device):
            result = self._driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(self._array), 0)
        self._check(result, f"launching {self._name} with grid {grid}")

    def _launch_config(self, threads: int, shared: int, early: bool) -> Any:
        config = self._driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        attributes = []
        if early:
            attribute = self._driver.CUlaunchAttribute()
            attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
            config.attrs = attributes
        config.numAttrs = len(attributes)
        self._attributes = attributes  # the config refers to them
        return config

    def _check(self, result: tuple[Any, ...], what: object) -> Any:
        error, *values = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise CubinError(f"{what}: the CUDA driver says {error.name}")
        return values[0] if values else None
