"""The page of every code, docs/errors/HX*.md, which `helixc explain` prints, and its beginning as the rule wants it."""

from __future__ import annotations

from pathlib import Path

from helixc.diagnostics import Rule

_PACKAGE = Path(__file__).parent


def page(code: str) -> str:
    """The Markdown page of `code`, which must exist."""
    return (page_root() / f"{code}.md").read_text(encoding="utf-8")


def page_root() -> Path:
    """The folder of the pages: inside the installed package, or in the checkout around it."""
    return installed_root() if installed_root().is_dir() else _PACKAGE.parent / "docs" / "errors"


def installed_root() -> Path:
    """Where a wheel has the pages."""
    return _PACKAGE / "_errors"


def beginning(rule: Rule) -> str:
    """The first lines of the rule's page."""
    return f"# {rule.code}: {rule.title}\n\nSeverity: {rule.severity.value}.\n\n{rule.explanation}\n"
