"""Memory of one rank that other processes of its host may map: CUDA's interprocess handles, or an unnamed file.

Neither outlives the processes that use it, however they end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from helixc_runtime.peer_memory import Handle, PeerMemoryError, check, map_handle

_SHARING = "sharing KV pages between processes"
_WAY_OUT = "Compile the deployment with HELIXC_HOST_HANDOFF=1 if its ranks cannot write into each other's memory"


class Arena:
    """`size` bytes on `device`, uninitialised, of which `memory` [size] uint8 is the only view.

    `shared`: others may map it, by its handle. A GPU's memory can be shared at any time.
    """

    def __init__(self, size: int, device: torch.device, shared: bool) -> None:
        self._file: int | None = None
        if shared and device.type == "cpu":
            self._file = os.memfd_create("helixc-kv")
            weakref.finalize(self, os.close, self._file)
            os.ftruncate(self._file, size)
            self.memory = torch.frombuffer(mmap.mmap(self._file, size), dtype=torch.uint8)
        else:
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)

    def handle(self) -> str:
        """What a process of this host maps it by. Raises PeerMemoryError if the driver refuses."""
        if self.memory.device.type == "cpu":
            assert self._file is not None, "the arena was not made to be shared"
            return json.dumps({"process": os.getpid(), "file": self._file})
        driver, address = _driver(), ctypes.c_uint64(self.memory.data_ptr())
        base, whole, handle = ctypes.c_uint64(), ctypes.c_size_t(), Handle()
        with _current(self.memory.device):
            # What is shared is the whole allocation, in which torch has placed us.
            found = driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(whole), address)
            check(driver, found, _SHARING, _WAY_OUT)
            check(driver, driver.cuIpcGetMemHandle(ctypes.byref(handle), base), _SHARING, _WAY_OUT)
        return json.dumps({"ipc": bytes(handle.bytes).hex(), "offset": address.value - base.value})


def map_arena(handle: str, size: int) -> Tensor:
    """The [size] uint8 of an arena of the CPU. Raises PeerMemoryError if it cannot be mapped."""
    place = json.loads(handle)
    try:
        file = os.open(f"/proc/{place['process']}/fd/{place['file']}", os.O_RDWR)
        try:
            return torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        raise PeerMemoryError(f"mapping the KV pages of process {place['process']}: {error}. {_WAY_OUT}") from error


def map_gpu_arena(handle: str, device: torch.device) -> int:
    """The address, for kernels of `device`, of an arena of that GPU or another one of this host.

    It stays mapped until the process ends. Raises PeerMemoryError.
    """
    place, driver = json.loads(handle), _driver()
    with _current(device):
        base = map_handle(driver, bytes.fromhex(place["ipc"]), "mapping KV pages between processes", _WAY_OUT)
    return base.value + int(place["offset"])


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """The calling thread talks to torch's context of `device`, which has to exist by then."""
    with torch.cuda.device(device):
        torch.zeros(1, device=device)
        yield


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
