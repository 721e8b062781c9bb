"""Debugging switches: environment variables HELIXC_..., each 1 or unset. docs/debugging.md says what they are for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Switches:
    """What is switched on. `portable` is the compiler's, the others are the runtime's."""

    portable: bool = False
    sync: bool = False
    log_launches: bool = False
    check_nan: bool = False


def read_switches(environment: Mapping[str, str] | None = None) -> Switches:
    """The switches of `environment`, by default this process's. Raises ValueError on other values than 0 and 1."""
    given = os.environ if environment is None else environment

    def on(name: str) -> bool:
        value = given.get(name, "")
        if value not in ("", "0", "1"):
            raise ValueError(f"{name} is {value!r}, expected 1 or 0")
        return value == "1"

    return Switches(on("HELIXC_PORTABLE"), on("HELIXC_SYNC"), on("HELIXC_LOG_LAUNCHES"), on("HELIXC_CHECK_NAN"))
