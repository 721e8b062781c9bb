"""A TensorRT-LLM file as its two roles, whatever kind of file it is: which place gives which key its value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from helixc.diagnostics import Span
from helixc.spec.source import KeyPath, Source
from helixc.spec.trtllm.dialect import Kind, kind_of
from helixc.spec.trtllm.vocabulary import ORCHESTRATOR_OWN
from helixc_runtime.manifest import Role

_SECTIONS: dict[Kind, dict[Role, KeyPath]] = {
    Kind.ORCHESTRATOR: {"context": ("context_servers",), "generation": ("generation_servers",)},
    Kind.BENCHMARK: {"context": ("worker_config", "ctx"), "generation": ("worker_config", "gen")},
}
_COUNTS: dict[Role, KeyPath] = {
    "context": ("hardware", "num_ctx_servers"),
    "generation": ("hardware", "num_gen_servers"),
}
_CONTEXT_NAME = re.compile(r"(?:^|[_-])(?:ctx|context|prefill)(?:[_-]|$)")


@dataclass(frozen=True, slots=True)
class Servers:
    """The servers of one role. `section` is where their keys stand, () for a file that is one worker's."""

    role: Role
    kind: Kind
    section: KeyPath
    source: Source

    @property
    def name(self) -> str:
        """The section's name in messages, as the file has it."""
        return ".".join(map(str, self.section)) or "this worker"

    def path(self, *key: str) -> KeyPath | None:
        """Where `key` has its value: in the section, or in an orchestrator's top level, which the sections inherit."""
        if key == ("num_instances",) and self.kind is Kind.BENCHMARK:
            return _COUNTS[self.role] if _COUNTS[self.role] in self.source.spans else None
        own = (*self.section, *key)
        if own in self.source.spans:
            return own
        inherits = self.kind is Kind.ORCHESTRATOR and key[0] not in ORCHESTRATOR_OWN
        # A mapping in the section replaces the top level's of that name as a whole.
        if inherits and (*self.section, key[0]) not in self.source.spans and key in self.source.spans:
            return key
        return None

    def value(self, *key: str) -> Any:
        """The value of `key`, None if the file does not give it."""
        path = self.path(*key)
        return None if path is None else at(self.source, path)

    def count(self, *key: str) -> int | None:
        """The value of `key` if it is a whole number of 1 or more."""
        value = self.value(*key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def size(self, *key: str) -> int:
        """A parallel size: 1 where the file gives none."""
        return self.count(*key) or 1

    def is_on(self, *key: str) -> bool:
        """Whether the file switches `key` on."""
        return truth(self.value(*key)) is True

    def span(self, *key: str) -> Span:
        """Where the value of `key` stands, or what describes this role."""
        path = self.path(*key)
        return self.place if path is None else self.source.value_span(path)

    @property
    def place(self) -> Span:
        """The key of the section."""
        if self.section in self.source.spans and self.section:
            return self.source.key_span(self.section)
        return first_key(self.source)

    @property
    def instances(self) -> int:
        """Replicas of this role; a section that does not say has one."""
        value = self.value("num_instances")
        return value if isinstance(value, int) and not isinstance(value, bool) else 1

    @property
    def drafts(self) -> int:
        """Tokens that speculative decoding drafts in a step."""
        keys = ("max_draft_len", "num_nextn_predict_layers")
        return next((n for key in keys if (n := self.count("speculative_config", key))), 0)

    @property
    def cp(self) -> int:
        return self.size("context_parallel_size")


@dataclass(frozen=True, slots=True)
class TrtllmFile:
    """A file of TensorRT-LLM. A role is None if the file does not describe it."""

    kind: Kind
    source: Source
    context: Servers | None
    generation: Servers | None

    @classmethod
    def of(cls, source: Source) -> TrtllmFile:
        kind = kind_of(source)
        if kind is Kind.WORKER:
            role: Role = "context" if _is_context(source) else "generation"
            worker = Servers(role, kind, (), source)
            return cls(kind, source, *((worker, None) if role == "context" else (None, worker)))
        found: dict[Role, Servers] = {}
        for role, section in _SECTIONS[kind].items():
            if section in source.spans and isinstance(at(source, section), dict):
                found[role] = Servers(role, kind, section, source)
        return cls(kind, source, found.get("context"), found.get("generation"))

    @property
    def start(self) -> Span:
        """The file's first key, for what is about the whole."""
        return first_key(self.source)

    @property
    def roles(self) -> Iterator[Servers]:
        return (servers for servers in (self.context, self.generation) if servers is not None)

    @property
    def both(self) -> tuple[Servers, Servers] | None:
        """The two roles where both have instances."""
        if self.context is None or self.generation is None or not self.context.instances:
            return None
        return self.context, self.generation

    @property
    def helix(self) -> Servers | None:
        """The generation servers if they use context parallelism."""
        return self.generation if self.generation is not None and self.generation.cp > 1 else None


def _is_context(source: Source) -> bool:
    """A worker's file does not say its role; its name often does, and context parallelism is for generation."""
    named = _CONTEXT_NAME.search(PurePath(source.path).stem.lower()) is not None
    return named and "cp_config" not in source.data


def first_key(source: Source) -> Span:
    """The place of the file's first key; of its start if it has none."""
    first = next(iter(source.data), None)
    return Span.start_of(source.path) if first is None else source.key_span((first,))


def at(source: Source, path: KeyPath) -> Any:
    """The value at a path that has a span."""
    value: Any = source.data
    for key in path:
        value = value[key]
    return value


def truth(value: object) -> bool | None:
    """A truth value, also by the words that TensorRT-LLM's YAML 1.1 reader takes for one."""
    if isinstance(value, bool):
        return value
    words = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
    return words.get(value.lower()) if isinstance(value, str) else None
