"""What checks look at: the typed deployment, where its values stand in the file, and the model's geometry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from helixc.diagnostics import Related, Span
from helixc.spec.origin import Origins, section_name
from helixc.spec.source import Source
from helixc.spec.spec import RoleSpec, Spec
from helixc_runtime.manifest import ModelArch, Role

TP, CP, PP = "tensor_parallel_size", "context_parallel_size", "pipeline_parallel_size"
MOE_TP, MOE_EP = "moe_tensor_parallel_size", "moe_expert_parallel_size"


@dataclass(frozen=True, slots=True)
class Side:
    """One role of the deployment, with the words of the semantics page."""

    role: Role
    spec: RoleSpec
    origins: Origins

    @property
    def name(self) -> str:
        return section_name(self.role)

    @property
    def tp(self) -> int:
        return self.spec.tensor_parallel_size

    @property
    def cp(self) -> int:
        """1 for context instances: HX302 reports any other size, and no other check should repeat it."""
        return self.spec.context_parallel_size if self.role == "generation" else 1

    @property
    def pp(self) -> int:
        return self.spec.pipeline_parallel_size

    @property
    def ffn_ranks(self) -> int:
        """Ranks of one stage, tp * cp: what attention uses and the FFN repurposes."""
        return self.tp * self.cp

    @property
    def ranks(self) -> int:
        """Ranks of all instances of this role."""
        return self.spec.num_instances * self.ffn_ranks * self.pp

    @property
    def grid(self) -> str:
        """`tp 2 x cp 4`, for messages."""
        return f"tp {self.tp} x cp {self.cp}" if self.cp > 1 else f"tp {self.tp}"

    def at(self, *key: str) -> Span:
        """Where the value of `key` stands, or what describes this role."""
        return self.origins.span(self.role, *key)

    def given(self, *key: str) -> Span | None:
        """Where the value of `key` stands, None if it is a default."""
        return self.origins.given(self.role, *key)

    def first_given(self, *keys: str) -> Span:
        """Where the first of these keys that the file gives stands."""
        return next((span for key in keys if (span := self.given(key))), self.at(keys[0]))

    def related(self, message: str, key: str, besides: Span) -> tuple[Related, ...]:
        """The place of `key` as a second place of a finding, if it is given elsewhere than `besides`."""
        span = self.given(key)
        return (Related(message, span),) if span and span != besides else ()


@dataclass(frozen=True, slots=True)
class Case:
    """A deployment to check."""

    source: Source
    spec: Spec
    origins: Origins

    @property
    def sides(self) -> Iterator[Side]:
        """The roles that have instances."""
        if self.spec.context is not None:
            yield Side("context", self.spec.context, self.origins)
        yield Side("generation", self.spec.generation, self.origins)


@dataclass(frozen=True, slots=True)
class ModelCase(Case):
    """A deployment whose model's geometry is known."""

    arch: ModelArch
