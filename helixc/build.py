"""The driver: one checked deployment through all passes, a line each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from helixc.artifact import write
from helixc.codegen.build import Cubin, Progress, compile_all, render_all
from helixc.codegen.config import configure
from helixc.codegen.nvrtc import Nvrtc
from helixc.codegen.select import names_for, select
from helixc.plan.lower import lower
from helixc.plan.place import place, with_kernels
from helixc.plan.verify import verify
from helixc.spec.spec import Spec
from helixc_runtime.manifest import ModelArch, Plan


@dataclass(frozen=True, slots=True)
class Built:
    """A written artifact and the kernels in it."""

    directory: Path
    plan: Plan
    cubins: tuple[Cubin, ...]


def make_plan(spec: Spec, arch: ModelArch, arches: tuple[str, ...]) -> Plan:
    """The proven plan with its kernels chosen, not compiled. Raises InvalidPlan, or ValueError for unserved dims."""
    deployment = lower(spec, arch)
    plan = place(deployment, partial(names_for, arches))
    verify(plan)
    return with_kernels(plan, tuple(configure(problem).planned() for problem in select(plan, arches)))


def build(plan: Plan, arches: tuple[str, ...], text: str, directory: Path, progress: Progress | None = None) -> Built:
    """Compile what make_plan made into the artifact `directory`. `text` is the file as the user wrote it.

    Raises NvrtcMissing, CompileError or RenderError for the kernels, FileExistsError or OSError for the directory.
    """
    problems = select(plan, arches)
    sources = render_all(problems)
    cubins = compile_all(sources, progress)
    plan = with_kernels(plan, tuple(cubin.kernel() for cubin in cubins))
    write(directory, plan, text, {cubin.directory.name: cubin.directory for cubin in cubins}, Nvrtc().version)
    return Built(directory, plan, cubins)


def build_without_kernels(spec: Spec, arch: ModelArch, text: str, directory: Path) -> Plan:
    """An artifact that runs on CPUs only, for machines where NVRTC is not installed."""
    plan = with_kernels(make_plan(spec, arch, arches=()), ())
    write(directory, plan, text, {}, nvrtc=None)
    return plan
