"""Mutations of deployment files: of the data they hold, of how that is written, and of the bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import yaml

from helixc.spec.schema import Document
from helixc.spec.trtllm.vocabulary import ORCHESTRATOR

_KEYS = (
    *Document.model_fields,
    *ORCHESTRATOR,
    "cp_type",
    "tokens_per_block",
    "dtype",
    "max_tokens",
    "nodes",
    "gpu",
    "tp",
)
_WORDS = (
    *(
        "",
        " ",
        "None",
        "null",
        "~",
        "yes",
        "off",
        "HELIX",
        "RING",
        "auto",
        "fp8",
        "float16",
        "-",
        "*x",
        "&x",
        "!!int x",
    ),
    *("ctx tp2 / gen tp1 cp2", "gen tp0", "ctx", "gen tp1 cp99999999999", "/ / /", "gen tp2 tp2", "localhost:8001"),
    *("http://[::1]:80/x", ":", "::", "host:99999", "é", "日本語", "\u202e\u200b", "a\u0085b", "a\u2028b", "\ufeff"),
    *("😀" * 3, "\\ud800", "x" * 300, "1_000", "0x10", "0o17", "1e3", ".5", "2.0", "08", "[", "}", "#", "a: b", "\t"),
)
_NUMBERS = (0, 1, -1, 2, 3, 7, 8, 31, 32, 64, 65_536, 65_537, 10**7, 2**31, 2**40, 2**63, -(2**63), 10**25, 10**40)


class Mutator:
    """Draws mutated files from `rng`."""

    def __init__(self, rng: random.Random, seeds: list[tuple[str, str]]) -> None:
        self.rng = rng
        self.seeds = seeds
        self._data = [(name, yaml.safe_load(text)) for name, text in seeds]

    def file(self) -> tuple[str, bytes]:
        """(name, content) of a new mutated file."""
        if self.rng.random() < 0.1:
            return "bomb.yaml", self._bomb().encode("utf-8", "surrogatepass")
        if self.rng.random() < 0.6:
            name, text = self._of_data()
        else:
            name, text = self.rng.choice(self.seeds)
        for _ in range(self.rng.choice((0, 0, 1, 1, 2, 5))):
            text = self.rng.choice(self._TEXT)(self, text)
        raw = text.encode("utf-8", "surrogatepass")
        for _ in range(self.rng.choice((0, 0, 0, 0, 1, 3))):
            raw = self._bytes(raw)
        return name, raw

    # --- Data -----------------------------------------------------------------------------------------------------

    def _of_data(self) -> tuple[str, str]:
        name, data = self.rng.choice(self._data)
        data = json.loads(json.dumps(data))
        for _ in range(self.rng.choice((1, 1, 2, 3, 8))):
            self._change(data)
        return name, self._written(data)

    def _change(self, data: Any) -> None:
        """One change at a random place below `data`."""
        place = data
        while isinstance(place, dict) and place and self.rng.random() < 0.6:
            inner = self.rng.choice(list(place.values()))
            if not isinstance(inner, dict | list):
                break
            place = inner
        if isinstance(place, dict):
            self._change_mapping(place)
        elif isinstance(place, list) and place:
            place[self.rng.randrange(len(place))] = self.value()

    def _change_mapping(self, place: dict[str, Any]) -> None:
        keys = list(place)
        kind = self.rng.randrange(6)
        if kind == 0 or not keys:
            place[self._key()] = self.value()
        elif kind == 1:
            del place[self.rng.choice(keys)]
        elif kind == 2:
            place[self._misspelt(self.rng.choice(keys))] = place.pop(self.rng.choice(keys))
        elif kind == 3:
            key = self.rng.choice(keys)
            place[key] = {self._key(): place[key]}
        else:
            place[self.rng.choice(keys)] = self.value()

    def value(self, depth: int = 0) -> Any:
        """A random value: mostly small, sometimes huge or nested."""
        kind = self.rng.randrange(9)
        if kind < 3:
            return self.rng.choice(_NUMBERS) if self.rng.random() < 0.7 else self.rng.randrange(1, 64)
        if kind < 5:
            return self.rng.choice(_WORDS)
        if kind == 5:
            return self.rng.choice((True, False, None, 0.5, -0.0, 1e308, float("inf"), float("nan"), 2.0))
        if depth > 2:
            return None
        if kind == 6:
            return [self.value(depth + 1) for _ in range(self.rng.randrange(4))]
        return {self._key(): self.value(depth + 1) for _ in range(self.rng.randrange(4))}

    def _key(self) -> str:
        return self.rng.choice(_KEYS) if self.rng.random() < 0.8 else self.rng.choice(_WORDS)

    def _misspelt(self, key: str) -> str:
        if not key:
            return "x"
        index = self.rng.randrange(len(key))
        return key[:index] + self.rng.choice(("", "x", key[index] * 2, key[index].upper())) + key[index + 1 :]

    def _written(self, data: Any) -> str:
        """As block YAML, flow YAML or JSON."""
        style = self.rng.randrange(3)
        if style == 2:
            return json.dumps(data, ensure_ascii=self.rng.random() < 0.5)
        text: str = yaml.safe_dump(data, default_flow_style=bool(style), allow_unicode=True, sort_keys=False)
        return text

    # --- Text -----------------------------------------------------------------------------------------------------

    def _drop_line(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        if lines:
            del lines[self.rng.randrange(len(lines))]
        return "".join(lines)

    def _repeat_line(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        if lines:
            lines.insert(self.rng.randrange(len(lines)), self.rng.choice(lines))
        return "".join(lines)

    def _indent(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        if lines:
            index = self.rng.randrange(len(lines))
            lines[index] = self.rng.choice(("\t", " ", "    ", "- ", "? ")) + lines[index]
        return "".join(lines)

    def _insert(self, text: str) -> str:
        index = self.rng.randrange(len(text) + 1)
        return text[:index] + self.rng.choice((*_WORDS, "\x00", "\x07", "\ud800", "\n---\n", "\n...\n")) + text[index:]

    def _cut(self, text: str) -> str:
        index = self.rng.randrange(len(text) + 1)
        return text[:index] if self.rng.random() < 0.5 else text[index:]

    def _line_ends(self, text: str) -> str:
        return text.replace("\n", self.rng.choice(("\r\n", "\r", "\u2028", "\u0085", "\n\n")))

    def _mark(self, text: str) -> str:
        return "\ufeff" * self.rng.randrange(1, 3) + text

    def _anchor(self, text: str) -> str:
        """Give a value an anchor and use it elsewhere, as an alias or as a merge key."""
        lines = text.splitlines(keepends=True)
        if len(lines) < 2:
            return text
        first, second = sorted(self.rng.sample(range(len(lines)), 2))
        lines[first] = lines[first].replace(": ", ": &a ", 1)
        alias = self.rng.choice(("<<: *a\n", "k: *a\n", "<<: [*a, *a]\n", "<<: *b\n"))
        indent = len(lines[second]) - len(lines[second].lstrip(" "))
        lines.insert(second, " " * indent + alias)
        return "".join(lines)

    def _comment(self, text: str) -> str:
        comment = self.rng.choice(("ignore[HX305] x", "ignore[]", "ignore[HX999] a", "ignore", "ignore[HX301, HX305]"))
        lines = text.splitlines(keepends=True) or [""]
        index = self.rng.randrange(len(lines))
        lines[index] = lines[index].rstrip("\n") + f" # helixc: {comment}\n"
        return "".join(lines)

    _TEXT: tuple[Callable[[Mutator, str], str], ...] = (
        *(_drop_line, _repeat_line, _indent, _insert, _cut, _line_ends, _mark, _anchor, _comment),
    )

    def _bytes(self, raw: bytes) -> bytes:
        index = self.rng.randrange(len(raw) + 1)
        return raw[:index] + bytes([self.rng.randrange(256)]) + raw[index + self.rng.randrange(3) :]

    # --- Bombs ----------------------------------------------------------------------------------------------------

    def _bomb(self) -> str:
        size = self.rng.randrange(1, 400)
        return self.rng.choice(_BOMBS)(size)


def _aliases(size: int) -> str:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, size % 12 + 1)]
    return "\n".join(["l0: &l0 [1]", *levels, "model: *l0"])


def _merges(size: int) -> str:
    levels = [f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}], k{n}: {n}}}" for n in range(1, size % 24 + 1)]
    return "\n".join(["m0: &m0 {a: 1}", *levels, "context_servers: *m0"])


_BOMBS: tuple[Callable[[int], str], ...] = (
    _aliases,
    _merges,
    lambda size: "model: " + "[" * size + "]" * (size - 1),
    lambda size: "model: " + "{a: " * size + "}" * size,
    lambda size: "".join(f"{' ' * n}context_servers:\n" for n in range(size)),
    lambda size: "a: &a [*a]\nmodel: *a\n" + "<<: *a\n" * (size % 5),
    lambda size: "max_seq_len: " + "9" * size * 40,
    lambda size: "max_seq_len: 0x" + "f" * size * 40,
    lambda size: f"seed: {'9' * (size % 40)}e{size}\nparallelism: gen cp{'1' * size}\n",
    lambda size: "\n".join(f"key{n}: {n}" for n in range(size)),
    lambda size: "parallelism: " + "gen tp1 / " * size,
    lambda size: "- " * size,
    lambda size: '"' + "\\x41\\u0085\\U0001F600" * size + '": 1',
    lambda size: "? " * size + "a",
    lambda size: "model: |\n" + "  é\n" * size + "\t: x",
)
