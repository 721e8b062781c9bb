"""Debugging switches: environment variables HELIXC_..., each 1 or unset. docs/debugging.md says what they are for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Switches:
    """What is switched on. The compiler reads `portable`, `collectives` and `host_handoff`, the runtime the others."""

    portable: bool = False
    collectives: bool = False
    host_handoff: bool = False
    sync: bool = False
    log_launches: bool = False
    check_nan: bool = False
    eager: bool = False
    deterministic: bool = False

    @property
    def graphs(self) -> bool:
        """Whether a step may be replayed as a CUDA graph: nothing can look into one."""
        return not (self.sync or self.log_launches or self.check_nan or self.eager)


def read_switches(environment: Mapping[str, str] | None = None) -> Switches:
    """The switches of `environment`, by default this process's. Raises ValueError on other values than 0 and 1."""
    given = os.environ if environment is None else environment

    def on(name: str) -> bool:
        value = given.get(name, "")
        if value not in ("", "0", "1"):
            raise ValueError(f"{name} is {value!r}, expected 1 or 0")
        return value == "1"

    return Switches(
        portable=on("HELIXC_PORTABLE"),
        collectives=on("HELIXC_COLLECTIVES"),
        host_handoff=on("HELIXC_HOST_HANDOFF"),
        sync=on("HELIXC_SYNC"),
        log_launches=on("HELIXC_LOG_LAUNCHES"),
        check_nan=on("HELIXC_CHECK_NAN"),
        eager=on("HELIXC_EAGER"),
        deterministic=on("HELIXC_DETERMINISTIC"),
    )
