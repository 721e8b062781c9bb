"""Where the templates are: inside an installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path


def template_root() -> Path:
    """The folder that holds include/ and kernels/."""
    packaged = Path(__file__).parents[1] / "_templates"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "templates"
