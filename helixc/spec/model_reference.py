"""What `model:` names: a checkpoint folder or a built-in geometry."""

from __future__ import annotations

import os
from pathlib import Path

from helixc.diagnostics import Diagnostic, Rule, Severity, closest
from helixc.model import builtin_names
from helixc.spec.source import Source

MODEL_NOT_FOUND = Rule(
    "HX401",
    Severity.ERROR,
    "The model is neither a folder nor a built-in geometry",
    """`model` is a checkpoint folder in Hugging Face's layout (config.json, *.safetensors), absolute or relative to the
deployment file, or the name of a built-in geometry. Nothing is downloaded. A folder wins over a built-in geometry of
the same name.""",
)


def resolve_model(source: Source) -> tuple[str, list[Diagnostic]]:
    """The absolute folder, or the built-in name; the text as it stands, with a finding, if it is neither."""
    name: str = source.data["model"]
    if ("model",) not in source.spans:
        return name, []  # a placeholder: the schema has reported that the model is missing
    folder = os.path.abspath(os.path.join(os.path.dirname(source.path), os.path.expanduser(name)))
    if os.path.isdir(folder):
        return folder, []
    if name in builtin_names():
        return name, []
    span = source.value_span(("model",))
    if os.path.isfile(folder):
        help = f"give its folder: {os.path.dirname(name) or '.'}"
        return name, [MODEL_NOT_FOUND.at(span, f"`model` is a file, not a checkpoint folder: {name}", help)]
    message = f"`model` is neither a folder nor a built-in geometry: {name}"
    return name, [MODEL_NOT_FOUND.at(span, message, _help(name, folder))]


def _help(name: str, folder: str) -> str:
    meant = _sibling(name, folder) or closest(Path(name).name, builtin_names())
    if meant is not None:
        return f"did you mean `{meant}`? There is no folder {folder}"
    return f"there is no folder {folder}; the built-in geometries are {', '.join(builtin_names())}"


def _sibling(name: str, folder: str) -> str | None:
    """A folder beside the one that does not exist, with a similar name, as the user would write it."""
    parent = os.path.dirname(folder)
    if not os.path.isdir(parent):
        return None
    folders = [entry.name for entry in os.scandir(parent) if entry.is_dir()]
    found = closest(os.path.basename(folder), folders)
    return os.path.join(os.path.dirname(name), found) if found else None
