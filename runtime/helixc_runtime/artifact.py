"""Load an artifact directory: plan.json, checked against manifest.json's digests before anything is used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from helixc_runtime.manifest import SCHEMA, ManifestError, Plan, plan_from_json

PLAN, MANIFEST, SPEC, KERNELS = "plan.json", "manifest.json", "spec.yaml", "kernels"


class ArtifactError(Exception):
    """The directory is not an artifact of this version, or a file in it is missing or changed."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A loaded artifact. Kernel paths in the plan are relative to `directory`."""

    directory: Path
    plan: Plan
    spec: str


def digest(content: bytes) -> str:
    """The digest that manifest.json records for a file."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def load(directory: Path, checkpoint: str | None = None) -> Artifact:
    """Load and check the artifact in `directory`. Raises ArtifactError naming the file and the way out.

    `checkpoint`: the folder of the weights on this machine, where it is not the one the artifact was compiled with.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except OSError:
        raise ArtifactError(f"{directory} holds no {MANIFEST}: make one with `helixc compile FILE -o DIR`") from None
    except ValueError as error:
        raise ArtifactError(f"{directory / MANIFEST} is not JSON ({error}): compile the deployment again") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA or not isinstance(manifest["files"], dict):
        raise ArtifactError(f"{directory / MANIFEST} is not of schema {SCHEMA}: compile the deployment again")
    contents = {name: _checked(directory, name, expected) for name, expected in manifest["files"].items()}
    for name in (PLAN, SPEC):
        if name not in contents:
            raise ArtifactError(f"{directory / MANIFEST} does not list {name}: compile the deployment again")
    try:
        plan = plan_from_json(contents[PLAN].decode())
    except ManifestError as error:
        raise ArtifactError(f"{directory / PLAN}: {error}") from None
    if checkpoint is not None:
        plan = replace(plan, model=replace(plan.model, checkpoint=checkpoint))
    return Artifact(directory, plan, contents[SPEC].decode())


def _checked(directory: Path, name: str, expected: str) -> bytes:
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ArtifactError(f"{MANIFEST} names {name}, which is outside {directory}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}; compile the deployment again") from None
    if digest(content) != expected:
        raise ArtifactError(f"{path} is not the file that was compiled (its digest differs); compile again")
    return content
