"""Prompts as the user gives them: --prompt TEXT, or --prompts FILE with a JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helixc.launch.options import LaunchError, LaunchOptions


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, either text or token ids, with its sampling. `source` says where it was given."""

    source: str
    text: str | None
    token_ids: tuple[int, ...] | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    ignore_eos: bool


def read_prompts(options: LaunchOptions) -> tuple[Prompt, ...]:
    """The prompts of `options`, in order. Raises LaunchError with every mistake found."""
    if bool(options.prompts) == (options.prompts_file is not None):
        found = "both were given" if options.prompts else "neither was given"
        raise LaunchError(f"a launch needs either --prompt TEXT or --prompts FILE; {found}")
    if options.prompts_file is not None:
        return _read_file(options.prompts_file, options)
    read = _Collector(options)
    for index, text in enumerate(options.prompts):
        read.add(f"--prompt {index + 1}" if len(options.prompts) > 1 else "--prompt", {"prompt": text})
    return read.result()


def _read_file(path: Path, options: LaunchOptions) -> tuple[Prompt, ...]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise LaunchError(f"{path}: cannot read the prompts: {error.strerror}") from None
    read = _Collector(options)
    for number, line in enumerate(lines, 1):
        if line.strip():
            read.add_line(f"{path}:{number}", line)
    if not read.seen:
        raise LaunchError(f'{path}: holds no prompts; write one JSON object a line, such as {{"prompt": "Hello"}}')
    return read.result()


class _Mistake(Exception):
    """What is wrong with one prompt, without its source."""


class _Collector:
    """Builds prompts and gathers all mistakes, so that one run reports every line."""

    def __init__(self, options: LaunchOptions) -> None:
        self.seen = 0
        self._options = options
        self._prompts: list[Prompt] = []
        self._mistakes: list[str] = []

    def add_line(self, source: str, line: bytes) -> None:
        try:
            data = json.loads(line.decode(), object_pairs_hook=_no_duplicates)
        except UnicodeDecodeError as error:
            self._fail(source, f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}")
        except json.JSONDecodeError as error:
            self._fail(source, f"not JSON: {error.msg} at column {error.colno}; write one JSON object a line")
        except _Mistake as mistake:
            self._fail(source, str(mistake))
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
            self._fail(source, f"not a prompt: {error}")
        else:
            self.add(source, data)

    def add(self, source: str, data: Any) -> None:
        self.seen += 1
        try:
            self._prompts.append(_prompt(source, data, self._options))
        except _Mistake as mistake:
            self._mistakes.append(f"{source}: {mistake}")

    def _fail(self, source: str, message: str) -> None:
        self.seen += 1
        self._mistakes.append(f"{source}: {message}")

    def result(self) -> tuple[Prompt, ...]:
        if self._mistakes:
            raise LaunchError(*self._mistakes)
        return tuple(self._prompts)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise _Mistake(f"key {key!r} is given twice")
        seen.add(key)
    return dict(pairs)


def _prompt(source: str, data: Any, options: LaunchOptions) -> Prompt:
    if not isinstance(data, dict):
        raise _Mistake(f'expected an object such as {{"prompt": "Hello"}}, got {_shown(data)}')
    known = ("prompt", "token_ids", *_SAMPLING)
    if unknown := [key for key in data if key not in known]:
        raise _Mistake(f"unknown key {unknown[0]!r}; the keys are {', '.join(known)}")
    if ("prompt" in data) == ("token_ids" in data):
        found = "both" if "prompt" in data else "neither"
        raise _Mistake(f"give either prompt (text) or token_ids, found {found}")
    values = {
        key: _checked(key, data.get(key, getattr(options, key)), valid, expected)
        for key, (valid, expected) in _SAMPLING.items()
    }
    text = _text(data["prompt"]) if "prompt" in data else None
    ids = _token_ids(data["token_ids"]) if "token_ids" in data else None
    return Prompt(source, text, ids, **values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Mistake(f"prompt: expected text, got {_shown(value)}")
    if not value:
        raise _Mistake("the prompt is empty; a model needs at least one token to start from")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Mistake(f"prompt: not valid Unicode at character {error.start + 1} ({value[error.start]!a})") from None
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise _Mistake(f"token_ids: expected an array of whole numbers, got {_shown(value)}")
    for index, token in enumerate(value):
        if type(token) is not int:
            raise _Mistake(f"token_ids[{index}]: expected a whole number, got {_shown(token)}")
    if not value:
        raise _Mistake("token_ids is empty; a model needs at least one token to start from")
    return tuple(value)


def _checked(key: str, value: Any, valid: Callable[[Any], bool], expected: str) -> Any:
    if not valid(value):
        raise _Mistake(f"{key}: expected {expected}, got {_shown(value)}")
    return float(value) if key in ("temperature", "top_p") else value


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_SAMPLING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda v: _is_int(v) and v >= 1, "a whole number of at least 1"),
    "temperature": (lambda v: _is_number(v) and v >= 0, "a number of at least 0 (0 is greedy)"),
    "top_p": (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0 and at most 1"),
    "seed": (lambda v: _is_int(v) and 0 <= v < 2**63, "a whole number from 0 to 2**63 - 1"),
    "ignore_eos": (lambda v: type(v) is bool, "true or false"),
}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
