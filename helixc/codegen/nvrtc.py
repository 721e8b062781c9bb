"""NVRTC: compile a rendered kernel to a cubin, without a GPU, a driver or CUDA's headers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from helixc.codegen.render import KernelSource

FLAGS = ("-std=c++17", "--ptxas-options=-v")
_NO_CACHE = "-no-cache"  # some NVRTCs keep a cache of their own, from which a cubin comes without ptxas' log


class NvrtcMissing(RuntimeError):
    """NVRTC or its Python binding is not installed."""


class CompileError(RuntimeError):
    """NVRTC rejected a kernel; the message holds its log, which names the template's or header's line."""


@dataclass(frozen=True, slots=True)
class Binary:
    """What NVRTC made of one kernel: the cubin and ptxas' account of it (bytes a thread block or thread)."""

    cubin: bytes
    registers: int
    shared_bytes: int
    spill_bytes: int


class Nvrtc:
    """The installed compiler. Raises NvrtcMissing where there is none. Safe to use from several threads."""

    def __init__(self) -> None:
        self._nvrtc = _binding()
        try:
            major, minor = self._call("version", self._nvrtc.nvrtcVersion())
        except Exception as error:  # the binding loads the library on its first call, and says so in its own types
            raise NvrtcMissing(_missing(error)) from error
        self.version = f"{major}.{minor}"

    def compile(self, source: KernelSource) -> Binary:
        """Compile for the source's architecture. Raises CompileError with NVRTC's log."""
        nvrtc, spec = self._nvrtc, source.config.spec
        names = [name.encode() for name, _ in source.headers]
        texts = [text.encode() for _, text in source.headers]
        program = self._call(
            "create", nvrtc.nvrtcCreateProgram(source.text.encode(), b"kernel.cu", len(names), texts, names)
        )
        try:
            flags = [flag.encode() for flag in (f"-arch={spec.arch}", *FLAGS)]
            result = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
            log = self._log(program)
            if result[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS and "registers" not in log:
                flags.append(_NO_CACHE.encode())
                result = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
                log = self._log(program)
            if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                raise CompileError(f"kernel {spec.name} does not compile for {spec.arch}: {result[0].name}\n{log}")
            cubin = bytes(self._call("size", nvrtc.nvrtcGetCUBINSize(program)))  # the binding writes into it
            self._call("cubin", nvrtc.nvrtcGetCUBIN(program, cubin))
        finally:
            nvrtc.nvrtcDestroyProgram(program)
        return Binary(cubin, *_resources(spec.name, log))

    def _log(self, program: Any) -> str:
        log = bytes(self._call("log size", self._nvrtc.nvrtcGetProgramLogSize(program)))
        self._call("log", self._nvrtc.nvrtcGetProgramLog(program, log))
        return log.decode(errors="replace").rstrip("\0 \n")

    def _call(self, what: str, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC failed ({what}): {error.name}")
        return values[0] if len(values) == 1 else tuple(values)


def _binding() -> ModuleType:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise NvrtcMissing(_missing(error)) from error
    module: ModuleType = nvrtc
    return module


def _missing(error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"compiling kernels needs NVRTC, which was not found ({reason}); install it with: pip install 'helixc[nvrtc]'"
    )


def _resources(name: str, log: str) -> tuple[int, int, int]:
    """(registers, static shared bytes, spill bytes) out of ptxas' verbose log."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise CompileError(f"kernel {name}: ptxas' log does not say what it uses\n{log}")
    shared = re.search(r"(\d+) bytes smem", log)
    return int(registers[1]), int(shared[1]) if shared else 0, int(spills[1]) + int(spills[2])
