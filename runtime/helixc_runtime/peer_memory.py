"""Memory of one GPU that the processes of other GPUs of its host write into: CUDA's interprocess handles."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from helixc_runtime.comm import Comm, GroupName

NOTHING = 1 << 31  # kNothing of inbox.cuh: what an inbox rests full of
_HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1  # CUipcMem_flags
_WAY_OUT = "Compile the deployment with HELIXC_COLLECTIVES=1 if its GPUs cannot write into each other's memory"


class PeerMemoryError(RuntimeError):
    """The driver refused to share memory between GPUs."""


class Handle(ctypes.Structure):
    """CUipcMemHandle of cuda.h, which is passed by value."""

    _fields_ = (("bytes", ctypes.c_uint8 * _HANDLE_BYTES),)


def open_inboxes(size: int, group: GroupName, members: int, index: int, comm: Comm, device: torch.device) -> Tensor:
    """Addresses [members] int64 on `device` of `size` bytes on every GPU of `group`, in group order; `index` is ours.

    All are full of NOTHING. All members call together; they stay mapped until the process ends. Raises PeerMemoryError.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)  # makes torch's context exist
        own = ctypes.c_uint64()
        made = driver.cuMemAlloc_v2(ctypes.byref(own), ctypes.c_size_t(size))
        check(driver, made, f"allocating {size:,} bytes", _WAY_OUT)
        words = ctypes.c_size_t(size // 4)
        check(driver, driver.cuMemsetD32_v2(own, ctypes.c_uint32(NOTHING), words), "filling an inbox", _WAY_OUT)
        torch.cuda.synchronize(device)
        handle = Handle()
        check(driver, driver.cuIpcGetMemHandle(ctypes.byref(handle), own), "sharing an inbox", _WAY_OUT)
        # Who has our handle finds the inbox full of NOTHING: it needs no other barrier.
        ours = torch.frombuffer(bytearray(handle.bytes), dtype=torch.uint8).to(device)
        handles = comm.all_gather(ours, group).cpu()
        addresses = []
        for member in range(members):
            address = ctypes.c_uint64(own.value)
            if member != index:
                what = f"opening the inbox of member {member} of the {group} group"
                address = map_handle(driver, handles[member].numpy().tobytes(), what, _WAY_OUT)
            addresses.append(address.value)
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def map_handle(driver: ctypes.CDLL, handle: bytes, what: str, way_out: str) -> ctypes.c_uint64:
    """Where the memory of `handle` begins, for kernels of the current device; raises as `check` does."""
    address, theirs = ctypes.c_uint64(), Handle.from_buffer_copy(handle)
    check(driver, driver.cuIpcOpenMemHandle_v2(ctypes.byref(address), theirs, _LAZY_ENABLE_PEER_ACCESS), what, way_out)
    return address


def check(driver: ctypes.CDLL, status: int, what: str, way_out: str) -> None:
    """Raise PeerMemoryError if the driver refused to do `what`."""
    if status:
        name = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(name))
        said = name.value.decode() if name.value else f"error {status}"
        raise PeerMemoryError(f"{what}: the CUDA driver says {said}. {way_out}")
