"""CudaOps on a CPU: the kernels' own source through g++, launched with the grid and arguments CudaOps computes."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from helixc.codegen.build import render_all
from helixc.codegen.problem import problems
from helixc.codegen.render import KernelSource
from helixc.codegen.template_root import template_root
from helixc_runtime import ops_cuda
from helixc_runtime.attention_shape import AttentionShape

_HERE = Path(__file__).parent
_TYPES = {"pointer": ctypes.c_uint64, "int32": ctypes.c_int32}


class CpuKernel:
    """Stands in for LoadedKernel: the "cubin" is a shared library."""

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
        assert shared == 0 and not early, "only the portable kernels run on the CPU"
        self._run = ctypes.CDLL(str(path)).run
        self._threads = threads
        self._slots = [_TYPES[kind]() for kind in arguments]

    def launch(self, grid: tuple[int, int, int], *values: int) -> None:
        for slot, value in zip(self._slots, values, strict=True):
            slot.value = value
        array = (ctypes.c_void_p * len(self._slots))(*[ctypes.addressof(slot) for slot in self._slots])
        self._run(*grid, self._threads, array)


def cpu_ops(
    shape: AttentionShape,
    cp: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    processors: int,
    root: Path | None = None,
    only_append: bool = False,
) -> ops_cuda.CudaOps:
    """CudaOps whose kernels run on the CPU, from the templates at `root`, for `processors` multiprocessors.

    `only_append`: it has no other kernel.
    """
    root = root or template_root()
    monkeypatch.setattr(ops_cuda, "check_arch", lambda arches, device: "sm_100a")
    monkeypatch.setattr(ops_cuda, "LoadedKernel", CpuKernel)
    # What CudaOps asks of the GPU.
    properties = types.SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    empty = torch.empty  # what is not written shall not be what happened to be there
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    specs = problems(shape, cp, "sm_100a")
    if only_append:
        specs = tuple(spec for spec in specs if spec.template == "append")
        monkeypatch.setattr(ops_cuda, "make_attend", lambda *arguments: None)
    kernels = []
    for source in render_all(specs, root):
        planned = source.config.planned()
        library = _build(source, folder, root)
        kernels.append(dataclasses.replace(planned, cubin=library.name))
    return ops_cuda.CudaOps(shape, kernels, folder, torch.device("cpu"))


def _build(source: KernelSource, folder: Path, root: Path) -> Path:
    name = source.config.spec.name
    text, library = folder / f"{name}.cpp", folder / f"{name}.so"
    if not library.exists():
        text.write_text(
            f"{source.text}\n"
            'extern "C" void run(unsigned x, unsigned y, unsigned z, unsigned threads, void** values) {\n'
            f"  simt::launch({name}, {{x, y, z}}, threads, values);\n}}\n"
        )
        paths = [f"-I{_HERE / 'include'}", f"-I{root / 'include'}", "-include", str(_HERE / "cuda_on_cpu.h")]
        options = [
            "-O2",
            "-std=c++17",
            "-w",
            "-fno-gnu-unique",
            "-fno-strict-aliasing",
            "-shared",
            "-fPIC",
            "-ffp-contract=fast",
        ]
        subprocess.run(["g++", *options, *paths, str(text), "-o", str(library)], check=True)
    return library
