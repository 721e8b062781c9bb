"""HELIXC_SYNC and HELIXC_LOG_LAUNCHES: kernels whose launches are written down and waited for."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from helixc_runtime.cubin import CubinError, LoadedKernel
from helixc_runtime.switches import Switches


class WatchedKernel(LoadedKernel):
    """A LoadedKernel that says on stderr what it launches, and waits for the end of it, as `switches` want."""

    def __init__(
        self,
        switches: Switches,
        path: Path,
        name: str,
        arguments: Sequence[str],
        threads: int,
        device: torch.device,
        shared: int = 0,
        early: bool = False,
    ) -> None:
        """See LoadedKernel."""
        super().__init__(path, name, arguments, threads, device, shared, early)
        self._switches, self._size = switches, f"block {threads} shared {shared}"

    def launch(self, grid: tuple[int, int, int], *values: int | ctypes.Array[ctypes.c_uint8]) -> None:
        """See LoadedKernel. HELIXC_SYNC: raises CubinError for what goes wrong while the kernel runs, too."""
        if self._switches.log_launches:  # before the launch: it may be the last
            shown = ", ".join(map(_shown, values))
            print(f"launch {self.name} grid {grid} {self._size} on cuda:{self._device}: {shown}", file=sys.stderr)
        super().launch(grid, *values)
        if self._switches.sync and not torch.cuda.is_current_stream_capturing():
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError as error:
                raise CubinError(f"running {self.name} with grid {grid}: {error}") from error


def _shown(value: int | ctypes.Array[ctypes.c_uint8]) -> str:
    """Addresses in hexadecimal: no other argument is as large."""
    if not isinstance(value, int):
        return "map"
    return hex(value) if value >= 1 << 31 else str(value)
