"""A CUDA driver for LoadedKernel on a machine without one: kernels load, and a launch is recorded by a C program."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helixc_runtime import cubin

SIZES = {"pointer": 8, "int32": 4, "map": 128}
FUNCTION = 0x7F00_1234_5678


class Record(ctypes.Structure):
    """The last launch. See driver.c."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("attribute_count", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("attribute_id", ctypes.c_int),
        ("attribute_value", ctypes.c_int),
        ("device", ctypes.c_int),
        ("arguments", (ctypes.c_ubyte * 128) * 32),
    )


class Driver:
    """The stub, installed until the test ends, and what torch says of the GPUs: two, each with a current stream."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        library = folder / "driver.so"
        source = Path(__file__).with_name("driver.c")
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        self.record = Record.in_dll(self._library, "record")
        self._device = ctypes.c_int.in_dll(self._library, "current_device")
        self.restart()
        self.attributes: list[tuple[Any, ...]] = []  # of cuFuncSetAttribute
        self.static_shared = 0  # bytes, of every kernel
        self._patch_bindings(monkeypatch)
        self._patch_torch(monkeypatch)

    @property
    def launches(self) -> int:
        return ctypes.c_uint.in_dll(self._library, "launches").value

    def restart(self) -> None:
        """Count launches from 0, on fresh streams."""
        ctypes.c_uint.in_dll(self._library, "launches").value = 0
        self.streams = {0: 0x1111_2222_3333, 1: 0x4444_5555_6666}

    def takes(self, kinds: Sequence[str]) -> None:
        """The arguments of the kernels launched from now on."""
        ctypes.c_uint.in_dll(self._library, "argument_count").value = len(kinds)
        sizes = (ctypes.c_uint * 32).in_dll(self._library, "argument_sizes")
        sizes[: len(kinds)] = [SIZES[kind] for kind in kinds]

    def answers(self, status: int) -> None:
        """Launches return this CUresult from now on."""
        ctypes.c_int.in_dll(self._library, "answer").value = status

    def argument(self, index: int, kind: str) -> bytes:
        """What the driver read of the last launch's argument."""
        return bytes(self.record.arguments[index][: SIZES[kind]])

    def _patch_bindings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from cuda.bindings import driver

        success = driver.CUresult.CUDA_SUCCESS

        def set_attribute(*arguments: Any) -> tuple[Any]:
            self.attributes.append(arguments)
            return (success,)

        monkeypatch.setattr(driver, "cuLibraryLoadData", lambda *_: (success, driver.CUlibrary(1)))
        monkeypatch.setattr(driver, "cuLibraryGetKernel", lambda *_: (success, driver.CUkernel(2)))
        monkeypatch.setattr(driver, "cuKernelGetFunction", lambda *_: (success, driver.CUfunction(FUNCTION)))
        monkeypatch.setattr(driver, "cuFuncGetAttribute", lambda *_: (success, self.static_shared))
        monkeypatch.setattr(driver, "cuFuncSetAttribute", set_attribute)
        monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", lambda *_: (success, driver.CUtensorMap()))
        monkeypatch.setattr(cubin, "_driver_library", lambda: self._library)

    def _patch_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @contextlib.contextmanager
        def on(device: torch.device | int) -> Iterator[None]:
            index = device.index if isinstance(device, torch.device) else device
            before, self._device.value = self._device.value, 0 if index is None else index
            yield
            self._device.value = before

        processors = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "device", on)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self._device.value)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: self.streams[device], raising=False)
