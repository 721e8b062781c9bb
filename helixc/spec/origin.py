"""Which of the places that may give a key gives its value: the section, the short form or the top level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helixc.diagnostics import Span
from helixc.spec.short_form import ShortForm, parse_short_form
from helixc.spec.source import KeyPath, Source
from helixc_runtime.manifest import Role

ROLES: tuple[Role, ...] = ("context", "generation")


def section_name(role: Role) -> str:
    """The key of the long form's section."""
    return f"{role}_servers"


@dataclass(frozen=True, slots=True)
class Origins:
    """Finds where the value of a role's key comes from. The section wins over the top level."""

    source: Source
    short: ShortForm

    @classmethod
    def of(cls, source: Source) -> Origins:
        return cls(source, parse_short_form(source)[0])

    def section(self, role: Role) -> Mapping[str, Any] | None:
        """The long form's section, None if it is absent."""
        found = self.source.data.get(section_name(role))
        return found if isinstance(found, dict) else None

    def describes(self, role: Role) -> bool:
        return self.section(role) is not None or role in self.short.roles

    def path(self, role: Role, *key: str) -> KeyPath | None:
        """The key path that gives `key` to `role` in the long form, None if there is none."""
        paths: tuple[KeyPath, ...] = ((section_name(role), *key), key)
        return next((path for path in paths if path in self.source.spans), None)

    def given(self, role: Role, *key: str) -> Span | None:
        """The place of the value that the file gives to `key`, None where the default applies."""
        own: KeyPath = (section_name(role), *key)
        if own in self.source.spans:
            return self.source.spans[own].value
        if key[0] in self.short.roles.get(role, {}):
            return self.short.roles[role][key[0]].span
        return self.source.spans[key].value if key in self.source.spans else None

    def span(self, role: Role, *key: str) -> Span:
        """The place of the value of `key`, or of what describes the role if the default applies."""
        return self.given(role, *key) or self.role_span(role)

    def role_span(self, role: Role) -> Span:
        """The place of the section's key, or of the word in the short form."""
        if (section_name(role),) in self.source.spans:
            return self.source.key_span((section_name(role),))
        return self.short.places.get(role) or Span.start_of(self.source.path)
