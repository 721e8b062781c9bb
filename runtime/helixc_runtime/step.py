"""One decode step of a rank, from the rows' positions and tokens to the tokens after them.

Everything between is computed from one small control tensor on the device: lengths, owners and slots from the
positions, so that nothing waits for the host, and on a GPU a step is one captured graph for each padded batch size.
A row that is not in use has position -1: it attends to nothing, owns nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from helixc_runtime.kv import KvCache
from helixc_runtime.models.decoder import Decoder
from helixc_runtime.ops import Ops
from helixc_runtime.sampling import Choices, sample_rows
from helixc_runtime.switches import read_switches


@dataclass(frozen=True, slots=True)
class RowInput:
    """What one row of the batch needs for one step."""

    slot: int  # its place in the batch
    token: int
    position: int  # global, of `token`
    attends: bool  # whether this rank holds the row's KV
    temperature: float
    top_p: float
    seed: int


class _Field(IntEnum):
    """Rows of the control tensor [fields, batch] int64; floating numbers by their bits."""

    position = 0
    token = 1
    attends = 2
    seed = 3
    temperature = 4
    top_p = 5


@dataclass(frozen=True, slots=True)
class StepResult:
    """Of the last stage, by slot; overwritten by the next step."""

    tokens: Tensor  # [size] int64
    logits: Tensor  # [size, vocab] float32


class DecodeStep:
    """Runs the steps of one rank. Batches are padded to the next of `sizes`."""

    def __init__(self, decoder: Decoder, ops: Ops, cache: KvCache) -> None:
        self.decoder, self.ops, self.cache = decoder, ops, cache
        self.rotary = decoder.rotary()
        rows = len(cache.table)
        self.sizes = padded_sizes(rows)
        on_gpu = decoder.device.type == "cuda"
        self._host = torch.empty(len(_Field), rows, dtype=torch.int64, pin_memory=on_gpu)
        self._control = torch.empty(len(_Field), rows, dtype=torch.int64, device=decoder.device)
        self._graphs_wanted = read_switches().graphs
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, StepResult | None]] = {}

    def capture(self, *, sampled: bool) -> None:
        """Capture a graph for each padded size, on a GPU. `sampled`: also for rows of a temperature above 0.

        Every rank of the instance must do so at the same point: the steps that warm up are collective.
        """
        if not self._can_capture():
            return
        stream = torch.cuda.Stream(self.decoder.device)  # type: ignore[no-untyped-call]
        pool = torch.cuda.graph_pool_handle()
        self._write([])
        for size in self.sizes:
            for draws in (False, True) if sampled else (False,):
                stream.wait_stream(torch.cuda.current_stream(self.decoder.device))
                with torch.cuda.stream(stream):
                    self._compute(size, draws)  # what is allocated or compiled once
                torch.cuda.current_stream(self.decoder.device).wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                # Other threads, such as NCCL's watchdog, go on calling CUDA meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    result = self._compute(size, draws)
                self._graphs[size, draws] = graph, result

    def __call__(self, rows: Sequence[RowInput]) -> StepResult | None:
        """One step of at least one row, at distinct slots. None from all but the last stage."""
        self.decoder.comm.check()
        size = next(size for size in self.sizes if size > max(row.slot for row in rows))
        draws = any(row.temperature > 0 for row in rows)
        self._write(rows)
        if captured := self._graphs.get((size, draws)):
            graph, result = captured
            graph.replay()
            return result
        return self._compute(size, draws)

    def _can_capture(self) -> bool:
        """Grouped products of other dtypes than bfloat16 read their groups on the host."""
        decoder = self.decoder
        fixed = decoder.arch.moe is None or decoder.dtype == torch.bfloat16
        return decoder.device.type == "cuda" and fixed and self._graphs_wanted

    def _write(self, rows: Sequence[RowInput]) -> None:
        """Send the rows to the device. The memory sent from is free again once the step's tokens have been read."""
        self._host.zero_()
        self._host[_Field.position] = -1
        integers, numbers = self._host.numpy(), self._host.view(torch.float64).numpy()
        for row in rows:
            integers[: _Field.temperature, row.slot] = row.position, row.token, row.attends, row.seed
            numbers[_Field.temperature :, row.slot] = row.temperature, row.top_p
        self._control.copy_(self._host, non_blocking=True)

    def _compute(self, size: int, draws: bool) -> StepResult | None:
        control = self._control[:, :size]
        active = control[_Field.position] >= 0
        position = control[_Field.position].clamp(min=0)
        attends = active & (control[_Field.attends] == 1)
        batch = self.cache.batch(position, attends, self.rotary)
        hidden = self.decoder.decode(control[_Field.token], self.cache.layers, batch, self.rotary, self.ops)
        if not self.decoder.is_last:
            return None
        logits = self.decoder.head(hidden)
        if not draws:
            return StepResult(logits.argmax(-1), logits)
        temperature, top_p = (control[field].view(torch.float64) for field in (_Field.temperature, _Field.top_p))
        return StepResult(sample_rows(logits, Choices(temperature, top_p, control[_Field.seed], position + 1)), logits)


def padded_sizes(rows: int) -> list[int]:
    """Batch sizes to compute with: powers of two below `rows`, and `rows`."""
    return [1 << power for power in range(rows.bit_length()) if 1 << power < rows] + [rows]
