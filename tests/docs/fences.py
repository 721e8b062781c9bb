"""The fenced blocks of the Markdown pages. The words after a block's language say how it is tested."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ERROR_PAGES = sorted((ROOT / "docs" / "errors").glob("*.md"))  # tested by test_error_pages
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {*ERROR_PAGES})]
_FENCE = re.compile(r"^```(\S+)?[ \t]*(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. `marks` are the words after the language: `check`, `run`, `test`, or none."""

    page: Path
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> list[Block]:
    """All blocks of `language`, page by page."""
    found = []
    for page in PAGES:
        if page.name == "mistakes.md" and language != "python":
            continue  # tested by test_mistakes
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append(Block(page, line, language, tuple(match[2].split()), match[3]))
    return found
