"""The verbs that build: compile, plan, and the compile step of launch. They print; helixc.build does the work."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helixc.build import Built, build, build_without_kernels, make_plan
from helixc.codegen.build import Cubin
from helixc.codegen.nvrtc import CompileError, NvrtcMissing
from helixc.codegen.render import RenderError
from helixc.codegen.roofline import roofline
from helixc.frontend import Analysis, analyse
from helixc.hardware import GPUS
from helixc.plan.show import to_text
from helixc.report import as_json, print_findings
from helixc.spec.spec import Spec
from helixc.table import aligned, byte_size
from helixc_runtime.artifact import ArtifactError, load
from helixc_runtime.manifest import Kernel, ModelArch, Plan, to_json

DEFAULT_ARCH = "sm_90a"
EVERY_ARCH = ("sm_90a", "sm_100a")


@dataclass(frozen=True, slots=True)
class Checked:
    """A deployment without errors."""

    spec: Spec
    arch: ModelArch
    text: str


class BuildFailure(Exception):
    """Something outside the deployment file stopped the build; the message says what to do."""


def compile_file(file: Path, output: Path | None, arches: tuple[str, ...], format: str) -> int:
    """`helixc compile`, without `arches` for the deployment's own GPUs.

    Returns the exit code: 1 with findings, 2 if the artifact cannot be made here.
    """
    analysis = analyse(file)
    checked = _checked(analysis)
    if checked is None:
        if format == "json":
            print(json.dumps({"artifact": None, "diagnostics": json.loads(as_json(analysis.diagnostics))}))
        else:
            print_findings(analysis.diagnostics, [analysis])
        return 1
    if format == "text":
        print_findings(analysis.diagnostics, [analysis])
    arches = arches or _arches(checked.spec, (DEFAULT_ARCH,))
    try:
        plan = _plan(checked, arches)
        built = _build(plan, arches, checked.text, output or Path("artifacts", plan.name))
    except (BuildFailure, NvrtcMissing) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2
    print(json.dumps(_as_json(built, analysis)) if format == "json" else _summary(built, checked.spec.hardware.gpu))
    return 0


def plan_path(path: Path, format: str) -> int:
    """`helixc plan` of a deployment file or an artifact. Returns the exit code."""
    plan = _plan_at(path)
    if isinstance(plan, int):
        return plan
    sys.stdout.write(to_json(plan) if format == "json" else to_text(plan))
    return 0


def plan_difference(before: Path, after: Path, format: str) -> int:
    """`helixc plan A B`: what changes from one deployment to the other. Returns the exit code."""
    from helixc.plan import show_diff
    from helixc.plan.diff import compare

    plans = [_plan_at(path) for path in (before, after)]
    failed = [plan for plan in plans if isinstance(plan, int)]
    if failed:
        return max(failed)
    a, b = (plan for plan in plans if isinstance(plan, Plan))
    diff = compare(a, b)
    sys.stdout.write(to_json(diff) if format == "json" else show_diff.to_text(diff))
    return 0


def _plan_at(path: Path) -> Plan | int:
    """The plan of a deployment file or an artifact, or the exit code after saying why there is none."""
    if path.is_dir():
        try:
            return load(path).plan
        except ArtifactError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    analysis = analyse(path)
    print_findings(analysis.diagnostics, [analysis], sys.stderr)
    checked = _checked(analysis)
    if checked is None:
        return 1
    try:
        return _plan(checked, _arches(checked.spec, (DEFAULT_ARCH,)))
    except BuildFailure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2


def artifact_for_launch(file: Path, *, needs_kernels: bool) -> Path | int:
    """Compile `file` under .helixc/artifacts, unless it stands there already. The directory, or the exit code."""
    analysis = analyse(file)
    print_findings(analysis.diagnostics, [analysis], sys.stderr)
    checked = _checked(analysis)
    if checked is None:
        return 1
    try:
        arches = _arches(checked.spec, EVERY_ARCH)
        plan = _plan(checked, arches)
        key = hashlib.sha256((to_json(plan) + checked.text).encode()).hexdigest()[:12]
        directory = Path(".helixc", "artifacts", f"{plan.name}-{key}")
        if not _stands(directory):
            try:
                _build(plan, arches, checked.text, directory)
            except NvrtcMissing as missing:
                if needs_kernels:
                    raise BuildFailure(str(missing)) from None
                print(f"note: no kernels, so this artifact runs on CPUs only: {missing}", file=sys.stderr)
                build_without_kernels(checked.spec, checked.arch, checked.text, directory)
        return directory
    except BuildFailure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 2


def _checked(analysis: Analysis) -> Checked | None:
    if not analysis.ok:
        return None
    if not analysis.is_whole:
        what = "describes one worker only, or a model whose geometry is not known"
        print(f"error: nothing can be built from {analysis.file}: it {what}", file=sys.stderr)
        return None
    assert analysis.spec and analysis.arch and analysis.source
    return Checked(analysis.spec, analysis.arch, analysis.source.text)


def _arches(spec: Spec, otherwise: tuple[str, ...]) -> tuple[str, ...]:
    """What to compile kernels for: the deployment's GPUs where it names them."""
    return (GPUS[spec.hardware.gpu].arch,) if spec.hardware.gpu else otherwise


def _stands(directory: Path) -> bool:
    try:
        return bool(load(directory).plan.kernels)
    except ArtifactError:
        return False


def _plan(checked: Checked, arches: tuple[str, ...]) -> Plan:
    try:
        return make_plan(checked.spec, checked.arch, arches)
    except ValueError as error:
        raise BuildFailure(f"no kernel serves this model: {error}") from None


def _build(plan: Plan, arches: tuple[str, ...], text: str, directory: Path) -> Built:
    """build(), its failures as BuildFailure; NvrtcMissing passes where the caller can do without."""
    try:
        return build(plan, arches, text, directory, _progress)
    except (CompileError, RenderError) as error:
        raise BuildFailure(str(error)) from None
    except OSError as error:
        raise BuildFailure(f"cannot write the artifact {directory}: {error.strerror or error}") from None


def _progress(cubin: Cubin, done: int, total: int) -> None:
    how = "cached" if cubin.from_cache else "compiled"
    spec = cubin.source.config.spec
    print(f"[{done}/{total}] {how} {spec.name} for {spec.arch}", file=sys.stderr)


def _summary(built: Built, gpu: str | None) -> str:
    head = ("kernel", "arch", "registers", "shared", "spills", "roofline")
    rows = [
        (k.name, k.arch, str(k.registers), byte_size(k.shared_bytes or 0), str(k.spill_bytes), _least(built, k, gpu))
        for k in built.plan.kernels
    ]
    instance = built.plan.instances[-1]
    largest = f"batch {instance.max_batch_size} and {instance.max_seq_len:,} tokens a row"
    roles = [f"{sum(r.role == role for r in built.plan.ranks)} {role}" for role in ("context", "generation")]
    return "\n".join(
        [
            f"{built.plan.name}: {len(built.plan.ranks)} ranks ({', '.join(roles)}), proven",
            *aligned([head, *rows], indent="  "),
            f"roofline: the least time of one layer's launch at {largest}, from peak figures",
            f"wrote {built.directory}: run it with `helixc launch {built.directory}`",
        ]
    )


def _least(built: Built, kernel: Kernel, gpu: str | None) -> str:
    found = roofline(built.plan, kernel, gpu)
    return f"{found.seconds * 1e6:.2f} us on {found.gpu}, {found.bound}" if found else "-"


def _as_json(built: Built, analysis: Analysis) -> dict[str, Any]:
    return {
        "artifact": str(built.directory),
        "name": built.plan.name,
        "ranks": len(built.plan.ranks),
        "kernels": json.loads(to_json(built.plan.kernels)),
        "diagnostics": json.loads(as_json(analysis.diagnostics)),
    }
