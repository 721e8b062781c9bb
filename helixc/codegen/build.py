"""Sources to cubins through the cache, on two threads: NVRTC releases the GIL."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from helixc.codegen.cache import Entry, KernelCache, cache_root
from helixc.codegen.config import configure
from helixc.codegen.nvrtc import Nvrtc
from helixc.codegen.problem import KernelSpec
from helixc.codegen.render import KernelSource, Renderer
from helixc.codegen.template_root import template_root
from helixc_runtime.manifest import Kernel

_THREADS = 2


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled kernel. `directory` holds kernel.cu, kernel.cubin and meta.json, to be copied into an artifact."""

    source: KernelSource
    directory: Path
    registers: int
    shared_bytes: int
    spill_bytes: int
    from_cache: bool

    def kernel(self) -> Kernel:
        """The plan's entry; the cubin's path is inside the artifact: kernels/<name>-<hash>/kernel.cubin."""
        config = self.source.config
        return Kernel(
            name=config.spec.name,
            template=config.spec.template,
            params=config.params,
            arch=config.spec.arch,
            cubin=f"kernels/{self.directory.name}/kernel.cubin",
            registers=self.registers,
            shared_bytes=self.shared_bytes + (config.dynamic_shared or 0),
            spill_bytes=self.spill_bytes,
        )


Progress = Callable[[Cubin, int, int], None]  # the kernel just finished, how many are, of how many


def render_all(specs: Iterable[KernelSpec], root: Path | None = None) -> tuple[KernelSource, ...]:
    """Choose and render every kernel. Raises RenderError, or ValueError for dims no kernel serves."""
    renderer = Renderer(root or template_root())
    return tuple(renderer.render(configure(spec)) for spec in specs)


def compile_all(
    sources: Iterable[KernelSource], progress: Progress | None = None, cache: Path | None = None
) -> tuple[Cubin, ...]:
    """Compile what the cache lacks; results in the order of `sources`. Raises NvrtcMissing or CompileError."""
    wanted = tuple(sources)
    compiler = Nvrtc()
    store = KernelCache(cache or cache_root(), compiler.version)
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [pool.submit(_compile, source, compiler, store) for source in wanted]
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                if progress:
                    progress(job.result(), done, len(jobs))
            return tuple(job.result() for job in jobs)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compile(source: KernelSource, compiler: Nvrtc, store: KernelCache) -> Cubin:
    entry, hit = store.find(source), True
    if entry is None:
        entry, hit = store.store(source, compiler.compile(source)), False
    return _cubin(source, entry, from_cache=hit)


def _cubin(source: KernelSource, entry: Entry, *, from_cache: bool) -> Cubin:
    return Cubin(source, entry.directory, entry.registers, entry.shared_bytes, entry.spill_bytes, from_cache)
