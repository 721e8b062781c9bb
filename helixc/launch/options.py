"""What the user may choose for one launch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from helixc_runtime.job import Device


class LaunchError(Exception):
    """The launch cannot start, for a reason the user can do something about. One message an argument."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """The flags of `helixc launch`. `max_tokens` to `ignore_eos` are what a prompt gets that does not say otherwise.

    `checkpoint` None: the folder that the artifact was compiled with.
    `device` None: cuda if this host has what the plan needs, else cpu. `run_dir` None: a new one under .helixc/runs.
    """

    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    device: Device | None = None
    checkpoint: Path | None = None
    chat: bool = False
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    verify: bool = False
    dry_run: bool = False
    format: Literal["text", "json"] = "text"
    run_dir: Path | None = None
    deadline_s: float = 60.0
