"""CudaOps on a CPU: the kernels' own source through g++, launched with the grid and arguments CudaOps computes."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import random
import re
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from helixc.codegen.build import render_all
from helixc.codegen.problem import KernelSpec, ffn, problems
from helixc.codegen.render import KernelSource
from helixc.codegen.template_root import template_root
from helixc_runtime import ops_cuda
from helixc_runtime.attention_shape import AttentionShape
from helixc_runtime.ffn_cuda import ARGUMENTS, CudaFfn
from helixc_runtime.ffn_cuda import EARLY as FFN_EARLY
from helixc_runtime.ffn_shape import FfnShape
from helixc_runtime.manifest import WITHOUT_HOP, Hop

_HERE = Path(__file__).parent
_MACHINE = ("machine.cpp", "overlap.cpp", "copy_engine.cpp", "tensor_cores.cpp")
_OPTIONS = (
    "-std=c++17",
    "-w",
    "-Wno-psabi",
    "-fno-gnu-unique",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
    "-ffp-contract=fast",
    "-U_FORTIFY_SOURCE",
)
# Loads and stores call overlap.cpp, in place of the sanitizer's own library.
_WATCHED = ("-O1", "-fsanitize=thread", "-nodefaultlibs", "-Wl,-z,now")
# What follows a kernel's own source.
_ENTRY = """{text}
extern "C" {{ unsigned cluster = {cluster}; }}
extern "C" const char* run_kernel(const simt::Launch* launch, void** values) {{
  thread_local char variable;
  return simt::run(*launch, &variable, [](void** values) {{ simt::call({name}, values); }}, values);
}}
"""
_TYPES: dict[str, Any] = {"pointer": ctypes.c_uint64, "int32": ctypes.c_int32, "map": ctypes.c_uint8 * 128}
_CROWD = 4  # blocks that run interleaved of a kernel that need not have all its blocks on the GPU at once

ASYNCHRONY = ("early", "late", "random")  # simt::Asynchrony


class KernelFault(Exception):
    """A kernel was stopped: a deadlock, a trap, or what the hardware or its programming rules do not allow."""


@dataclasses.dataclass
class Gpu:
    """What the kernels run on: `processors` multiprocessors, and what decides the order of events (see simt.h)."""

    processors: int
    seed: int = 0
    asynchrony: str = "late"
    watched: bool = False  # loads and stores of its kernels are seen, as Overlap needs

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)


class Overlap(TorchDispatchMode):
    """While it is entered, launches of this thread overlap as far as they let each other (overlap.cpp).

    Torch's operations are kernels, too, that are not launched early. KernelFault tells what a kernel reads, or stores,
    too early. The Gpu must be `watched`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._machine = ctypes.CDLL(str(_machine()))
        self._machine.simt_stored.argtypes = (ctypes.c_void_p, ctypes.c_uint64)

    def __enter__(self) -> Self:
        self._machine.simt_overlap(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._machine.simt_overlap(False)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and skipping would import torch's compiler."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        stored = [given[a.name] for a in schema.arguments if a.alias_info and a.alias_info.is_write and a.name in given]
        if not any(a.alias_info for a in schema.returns) and "empty" not in schema.name:
            stored.append(result)
        if stored:
            self.kernel(stored)
        return result

    def kernel(self, *stored: Any) -> None:
        """A kernel that stores to these tensors, and is not launched early."""
        self._machine.simt_other_kernel()
        for tensor in tree_leaves(stored):
            if isinstance(tensor, Tensor) and tensor.numel():
                span = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                self._machine.simt_stored(tensor.data_ptr(), span * tensor.element_size())


class _Launch(ctypes.Structure):
    """simt::Launch."""

    _fields_: ClassVar = [
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32),
        ("resident", ctypes.c_uint32),
        ("early", ctypes.c_uint32),
        ("asynchrony", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
    ]


class CpuKernel:
    """Stands in for LoadedKernel: the "cubin" is a shared library."""

    gpu: Gpu  # of all kernels

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
        self._name, self._threads, self._shared, self._early = name, threads, shared, early
        self.library = ctypes.CDLL(str(path))
        self._run = self.library.run_kernel
        self._run.restype = ctypes.c_char_p
        self._slots = [_TYPES[kind]() for kind in arguments]

    def launch(self, grid: tuple[int, int, int], *values: int | ctypes.Array[ctypes.c_uint8]) -> None:
        for slot, value in zip(self._slots, values, strict=True):
            if isinstance(value, int):
                slot.value = value
            else:
                ctypes.memmove(slot, value, len(value))
        array = (ctypes.c_void_p * len(self._slots))(*[ctypes.addressof(slot) for slot in self._slots])
        gpu = self.gpu
        launch = _Launch(
            threads=self._threads,
            shared=self._shared,
            cluster=ctypes.c_uint32.in_dll(self.library, "cluster").value,
            resident=gpu.processors if self._shared else min(gpu.processors, _CROWD),
            early=self._early,
            asynchrony=ASYNCHRONY.index(gpu.asynchrony),
            seed=gpu.random.getrandbits(62),
        )
        launch.grid[:] = grid
        fault = self._run(ctypes.byref(launch), array)
        if fault is not None:
            raise KernelFault(f"{self._name}: {fault.decode()}")


# Around what a GPU would not run: the mode Overlap does not see it.
unseen = _disable_current_modes

_empty = torch.empty


def _poisoned(*size: int, **options: Any) -> torch.Tensor:
    """torch.empty: what is not written shall not be what happened to be there. Bytes of 255 are NaN in any type."""
    made = _empty(*size, **options)
    with unseen():
        return made.fill_(torch.nan if made.is_floating_point() else 255 if made.dtype == torch.uint8 else 85)


def cpu_ops(
    shape: AttentionShape,
    cp: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    processors: int | Gpu,
    root: Path | None = None,
    arch: str = "sm_100a",
    only_append: bool = False,
    idle: Collection[str] = (),
    more: Sequence[KernelSpec] = (),
    ffn_shape: FfnShape | None = None,
    hop: Hop = WITHOUT_HOP,
) -> ops_cuda.CudaOps:
    """CudaOps whose kernels for `arch` run on the CPU, from the templates at `root`, for `processors` multiprocessors.

    `folder` stands for the artifact. Kernels of the templates `idle` do nothing; with `only_append` there are no others
    but append; `more` come with them. Launches raise KernelFault.
    """
    root = root or template_root()
    gpu = processors if isinstance(processors, Gpu) else Gpu(processors)
    monkeypatch.setattr(ops_cuda, "check_arch", lambda arches, device: arch)
    monkeypatch.setattr(ops_cuda, "LoadedKernel", CpuKernel)
    monkeypatch.setattr(CpuKernel, "gpu", gpu, raising=False)
    # What CudaOps asks of the GPU, and what encodes tensor maps.
    properties = types.SimpleNamespace(multi_processor_count=gpu.processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.SimpleNamespace(driver=_Driver))
    monkeypatch.setattr(torch, "empty", _poisoned)
    specs = problems(shape, cp, arch)
    if only_append:
        specs = tuple(spec for spec in specs if spec.template == "append")
        monkeypatch.setattr(ops_cuda, "make_attend", lambda *arguments: None)
    kernels = []
    for source in render_all((*specs, *more), root):
        planned = source.config.planned()
        if planned.template in idle:
            idle_text = f'extern "C" void {planned.name}() {{ simt::wait_for_previous_kernels(); }}'
            source = dataclasses.replace(source, text=idle_text)
        library = build(source, root, watched=gpu.watched)
        link = folder / library.name
        link.unlink(missing_ok=True)
        link.symlink_to(library)
        kernels.append(dataclasses.replace(planned, cubin=library.name))
    return ops_cuda.CudaOps(shape, kernels, folder, torch.device("cpu"), ffn_shape, hop)


def cpu_ffn(
    shape: FfnShape,
    max_rows: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu: Gpu,
    root: Path | None = None,
) -> CudaFfn:
    """CudaFfn whose kernels run on the CPU, as cpu_ops."""
    monkeypatch.setattr(CpuKernel, "gpu", gpu, raising=False)
    monkeypatch.setattr(torch, "empty", _poisoned)
    kernels, loaded = [], {}
    for source in render_all(ffn(shape, max_rows, "sm_90a"), root or template_root()):
        planned = source.config.planned()
        arguments, threads = ARGUMENTS[planned.template], int(planned.params["threads"])
        library, early = build(source, root, watched=gpu.watched), planned.template in FFN_EARLY
        loaded[planned.name] = CpuKernel(library, planned.name, arguments, threads, torch.device("cpu"), early=early)
        kernels.append(planned)
    return CudaFfn(shape, kernels, loaded, gpu.processors, torch.device("cpu"))


def build(source: KernelSource, root: Path | None = None, *, watched: bool = False) -> Path:
    """The shared library of a kernel; equal ones are built once a process. `watched`: see Gpu."""
    include = (_HERE / "include", (root or template_root()) / "include")
    name = source.config.spec.name
    text = _ENTRY.format(text=source.text, name=name, cluster=source.config.cluster or 1)
    digest = hashlib.sha256("\0".join(_with_headers(text, include)).encode()).hexdigest()[:16]
    library = _built() / f"{name}-{digest}{'-watched' * watched}.so"
    if not library.exists():
        written = library.with_suffix(".cpp")
        written.write_text(text)
        paths = [*(f"-I{path}" for path in (_HERE, *include)), "-include", str(_HERE / "cuda_on_cpu.h")]
        options = _WATCHED if watched else ("-O2",)
        _compile(*options, *paths, str(written), str(_machine()), "-lgcc", into=library)
    return library


def _with_headers(text: str, include: Sequence[Path]) -> list[str]:
    """`text` and all that it includes, whether directly or not."""
    seen: dict[str, str] = {}

    def visit(text: str) -> None:
        for name in re.findall(r'^#include "(.*)"$', text, re.MULTILINE):
            if name not in seen:
                seen[name] = next(path for folder in include if (path := folder / name).exists()).read_text()
                visit(seen[name])

    visit(text)
    return [text, *seen.values()]


@functools.cache
def _machine() -> Path:
    """The library of the GPU itself; one for all kernels, so that they share the fibers."""
    library = _built() / "libsimt.so"
    _compile("-O3", *(str(_HERE / name) for name in _MACHINE), into=library)
    return library


@functools.cache
def _build_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="helixc-simt-")


def _built() -> Path:
    return Path(_build_folder().name)


def _compile(*arguments: str, into: Path) -> None:
    subprocess.run(["g++", *_OPTIONS, *arguments, "-o", str(into)], check=True)


class _Names:
    """An enumeration of the driver's, of which only the names matter."""

    def __getattr__(self, name: str) -> str:
        return name


class _Encoded:
    def __init__(self, content: bytes) -> None:
        self._content = ctypes.create_string_buffer(content, len(content))

    def getPtr(self) -> int:
        return ctypes.addressof(self._content)


class _Driver:
    """The driver's part in tensor maps: its checks, and a map that copy_engine.cpp reads."""

    CUtensorMapDataType = CUtensorMapInterleave = CUtensorMapSwizzle = _Names()
    CUtensorMapL2promotion = CUtensorMapFloatOOBfill = _Names()
    CUresult = types.SimpleNamespace(
        CUDA_SUCCESS=types.SimpleNamespace(name="CUDA_SUCCESS"),
        CUDA_ERROR_INVALID_VALUE=types.SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE"),
    )
    cuuint32_t = cuuint64_t = int

    _BYTES: ClassVar = {"UINT8": 1, "BFLOAT16": 2, "FLOAT16": 2, "FLOAT32": 4}
    _SPAN: ClassVar = {"SWIZZLE_NONE": 0, "SWIZZLE_64B": 64, "SWIZZLE_128B": 128}

    @classmethod
    def cuTensorMapEncodeTiled(
        cls,
        kind: str,
        rank: int,
        address: int,
        dims: list[int],
        strides: list[int],
        box: list[int],
        element_strides: list[int],
        interleave: str,
        swizzle: str,
        promotion: str,
        fill: str,
    ) -> tuple[Any, Any]:
        size = cls._BYTES[kind.removeprefix("CU_TENSOR_MAP_DATA_TYPE_")]
        span = cls._SPAN[swizzle.removeprefix("CU_TENSOR_MAP_")]
        assert interleave.endswith("INTERLEAVE_NONE") and fill.endswith("FILL_NONE")
        assert set(element_strides) == {1}
        inner = box[0] * size
        legal = (
            3 <= rank + 2 <= 7
            and (len(dims), len(strides), len(box)) == (rank, rank - 1, rank)
            and address % 16 == 0
            and all(0 < dim <= 1 << 32 for dim in dims)
            and all(0 < stride < 1 << 40 and stride % 16 == 0 for stride in strides)
            and all(0 < side <= 256 for side in box)
            and inner % 16 == 0
            and (span == 0 or inner <= span)
        )
        if not legal:
            return cls.CUresult.CUDA_ERROR_INVALID_VALUE, None
        missing = [0] * (5 - rank)
        content = struct.pack(
            "<8sQ3I5I8x5Q4Q",
            b"simt map",
            address,
            rank,
            size,
            span,
            *box,
            *missing,
            *dims,
            *missing,
            *strides,
            *missing,
        )
        return cls.CUresult.CUDA_SUCCESS, _Encoded(content)
