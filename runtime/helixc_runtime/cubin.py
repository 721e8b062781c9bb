"""Load a cubin with the CUDA driver and launch its kernel on torch's current stream and context."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_FORMATS = {"pointer": "Q", "int32": "i"}  # of struct; a "map" is passed where it lies
_STATIC_SHARED = 48 * 1024  # bytes a thread block may have without asking
# Per cent of what can be shared memory of a multiprocessor that is. The rest is L1, where loads under way lie: with all
# shared, half the bandwidth is left. 64 KiB hold two thread blocks of the kernels that read weights. They all ask for
# the same: only an empty multiprocessor can change it, and one on which they follow each other is never empty.
_SHARED_PERCENT, _ALL_SHARED = 28, 100
_SMALL = 31 * 1024  # bytes of shared memory of a thread block, two of which fit
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


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


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, its union as words."""

    _fields_ = (("id", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h. cuda-bindings has one too, but filling it takes longer than the launch."""

    _fields_ = (
        ("grid_x", ctypes.c_uint32),
        ("grid_y", ctypes.c_uint32),
        ("grid_z", ctypes.c_uint32),
        ("block_x", ctypes.c_uint32),
        ("block_y", ctypes.c_uint32),
        ("block_z", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint32),
    )


class LoadedKernel:
    """One kernel of a loaded cubin, with an argument array that launches fill in place.

    `arguments` names the type of each argument: "pointer", "int32" or "map" (a TensorMap); maps come first. `shared` is
    the dynamic shared memory of a thread block in bytes. `early`: the launch may start while the kernel before it still
    runs (programmatic dependent launch); the kernel itself waits where it must. Not safe for concurrent launches of one
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
        self.name = name
        self._driver = driver
        self._device = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.synchronize(device)  # makes torch's context exist
        with torch.cuda.device(device):
            library = self._check(driver.cuLibraryLoadData(path.read_bytes(), [], [], 0, [], [], 0), path)
            kernel = self._check(driver.cuLibraryGetKernel(library, name.encode()), path)
            function = self._check(driver.cuKernelGetFunction(kernel), path)
            self._divide_memory(function, shared, path)
        self._function = int(function)
        self._arguments = _Arguments(name, arguments)
        self._config = _launch_config(threads, shared, early)
        self._config_address = ctypes.addressof(self._config)
        self._launch = _driver_library().cuLaunchKernelEx
        self._launch.argtypes = (ctypes.c_void_p,) * 4
        # What torch.cuda.current_stream looks up, without the object around it: Triton and Inductor launch this way.
        self._stream_of = torch._C._cuda_getCurrentRawStream

    def _divide_memory(self, function: Any, shared: int, path: Path) -> None:
        """Ask for `shared` bytes of dynamic shared memory, and for as much L1 as two thread blocks leave."""
        driver, attributes = self._driver, self._driver.CUfunction_attribute
        static = self._check(driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function), path)
        percent = _SHARED_PERCENT if static + shared <= _SMALL else _ALL_SHARED
        wanted = {attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: percent}
        if shared > _STATIC_SHARED:
            wanted[attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES] = shared
        for attribute, value in wanted.items():
            self._check(driver.cuFuncSetAttribute(function, attribute, value), path)

    def launch(self, grid: tuple[int, int, int], *values: int | ctypes.Array[ctypes.c_uint8]) -> None:
        """Enqueue one launch with `values` (device addresses, int32s, tensor maps) on torch's current stream."""
        config = self._config
        config.grid_x, config.grid_y, config.grid_z = grid
        # Read at every launch: under CUDA-graph capture the current stream is another one.
        config.stream = self._stream_of(self._device)
        array = self._arguments.fill(values)
        if torch.cuda.current_device() == self._device:
            status = self._launch(self._config_address, self._function, array, None)
        else:
            with torch.cuda.device(self._device):
                status = self._launch(self._config_address, self._function, array, None)
        if status:
            self._check((self._driver.CUresult(status),), f"launching {self.name} with grid {grid}")

    def _check(self, result: tuple[Any, ...], what: object) -> Any:
        error, *values = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise CubinError(f"{what}: the CUDA driver says {error.name}")
        return values[0] if values else None


class _Arguments:
    """A kernel's arguments in memory, and the array of their addresses that the driver reads."""

    def __init__(self, kernel: str, kinds: Sequence[str]) -> None:
        self._kernel, self._count, self._maps = kernel, len(kinds), kinds.count("map")
        scalars = kinds[self._maps :]
        assert "map" not in scalars, "maps come first"
        layout = "".join(_FORMATS[kind] for kind in scalars)
        self._pack = struct.Struct(f"@{layout}").pack_into
        self._memory = ctypes.create_string_buffer(max(1, struct.calcsize(f"@{layout}")))
        ends = [struct.calcsize(f"@{layout[: i + 1]}") for i in range(len(layout))]
        start = ctypes.addressof(self._memory)
        places = [start + end - struct.calcsize(kind) for end, kind in zip(ends, layout, strict=True)]
        self._array = (ctypes.c_void_p * self._count)(*[None] * self._maps, *places)
        self._address = ctypes.addressof(self._array)

    def fill(self, values: Sequence[Any]) -> int:
        """Store one launch's values; the array's address. The maps must live until the launch is enqueued."""
        assert len(values) == self._count, f"{self._kernel} takes {self._count} arguments, got {len(values)}"
        for i in range(self._maps):
            self._array[i] = ctypes.addressof(values[i])
        self._pack(self._memory, 0, *values[self._maps :])
        return self._address


def _launch_config(threads: int, shared: int, early: bool) -> _LaunchConfig:
    """All but the grid and the stream, which are a launch's own."""
    config = _LaunchConfig(block_x=threads, block_y=1, block_z=1, shared_bytes=shared)
    if early:
        attribute = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value[0] = 1
        config.attributes = ctypes.pointer(attribute)
        config.attribute_count = 1
    return config


def _driver_library() -> ctypes.CDLL:
    """The driver that torch and cuda-bindings have loaded."""
    return ctypes.CDLL("libcuda.so.1")
