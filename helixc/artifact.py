"""Write an artifact directory: plan.json, spec.yaml, the kernels, and manifest.json with every file's digest."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from helixc import __version__
from helixc_runtime.artifact import KERNELS, MANIFEST, PLAN, SPEC, digest
from helixc_runtime.manifest import SCHEMA, Plan, to_json


def write(directory: Path, plan: Plan, spec: str, kernels: Mapping[str, Path], nvrtc: str | None) -> None:
    """Write or replace the artifact in `directory`. `kernels`: folder of each `<name>-<hash>` under kernels/.

    All files are written beside the target and renamed over it: a reader never sees half an artifact. Raises
    FileExistsError for a directory that holds something else, OSError otherwise.
    """
    if directory.exists() and not (directory / MANIFEST).is_file() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty and holds no {MANIFEST}: choose another directory with -o")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
        made = Path(temporary) / "artifact"
        made.mkdir()
        (made / PLAN).write_text(to_json(plan), encoding="utf-8")
        (made / SPEC).write_text(spec, encoding="utf-8")
        for name, folder in sorted(kernels.items()):
            shutil.copytree(folder, made / KERNELS / name)
        (made / MANIFEST).write_text(_manifest(made, nvrtc), encoding="utf-8")
        if directory.exists():
            directory.rename(Path(temporary) / "old")
        made.rename(directory)


def _manifest(directory: Path, nvrtc: str | None) -> str:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    digests = {path.relative_to(directory).as_posix(): digest(path.read_bytes()) for path in files}
    content = {"schema": SCHEMA, "helixc": __version__, "nvrtc": nvrtc, "files": digests}
    return json.dumps(content, indent=1) + "\n"
