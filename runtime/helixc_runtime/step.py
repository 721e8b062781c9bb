"""One decode step of a rank, from the rows' positions and tokens to the tokens after them.

Everything between is computed from one small control tensor on the device: lengths, owners and slots from the
positions, so that nothing waits for the host, and on a GPU a step is one captured graph for each padded batch size.
A row that is not in use has position -1: it attends to nothing, owns nothing and writes nothing.

A step leaves in the control tensor what the next one needs: the tokens it chose, and their positions. So the host can
launch the next step before it has seen the tokens, and writes the control tensor only when rows come or go. Of a model
in several stages no rank has both the tokens and their embeddings: there the host gives every step its tokens.
"""

from __future__ import annotations

from collections import deque
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
    token: int | None  # None: the one that the step before has chosen at this slot
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
    in_use = 4  # 1; 0: the row is padding
    temperature = 5
    top_p = 6


_FED = -1  # in place of a token: it stays the one on the device


@dataclass(frozen=True, slots=True)
class StepResult:
    """Of the last stage, by slot; on the device, and overwritten by the next step, or when its rows are assigned."""

    tokens: Tensor  # [size] int64
    logits: Tensor | None  # [size, vocab] float32; None where nothing but their largest is wanted


class _HostBuffer:
    """int64 memory on the host, pinned for a GPU, and the time of the last copy from or to it."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.tensor = torch.empty(shape, dtype=torch.int64, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def enqueued(self) -> None:
        """A copy from or to the buffer is the last thing on the current stream."""
        if self._copied:
            self._copied.record()

    def wait(self) -> None:
        """Until that copy is done."""
        if self._copied:
            self._copied.synchronize()


class TokensOnTheWay:
    """Tokens that a step has chosen, by slot, on their way to the host."""

    def __init__(self, buffer: _HostBuffer, count: int) -> None:
        self._buffer, self._count = buffer, count
        self.read = False

    def wait(self) -> list[int]:
        """The tokens, once the step is done."""
        self._buffer.wait()
        self.read = True
        return self._buffer.tensor[: self._count].tolist()


class Readback:
    """Brings the tokens of each step to the host, those of `depth` steps at a time."""

    def __init__(self, rows: int, depth: int, device: torch.device) -> None:
        self._buffers = [_HostBuffer((rows,), device) for _ in range(depth)]
        self._under_way: deque[TokensOnTheWay] = deque(maxlen=depth)

    def start(self, tokens: Tensor) -> TokensOnTheWay:
        """Enqueue the copy of `tokens` [size]. The ones of `depth` steps before must have been read."""
        if len(self._under_way) == len(self._buffers):
            assert self._under_way[0].read, "these tokens would be lost"
        buffer = self._buffers[0]
        self._buffers.append(self._buffers.pop(0))
        buffer.tensor[: len(tokens)].copy_(tokens, non_blocking=True)
        buffer.enqueued()
        self._under_way.append(TokensOnTheWay(buffer, len(tokens)))
        return self._under_way[-1]


class DecodeStep:
    """Runs the steps of one rank. Batches are padded to the next of `sizes`."""

    def __init__(self, decoder: Decoder, ops: Ops, cache: KvCache, *, keep_logits: bool = False) -> None:
        """`keep_logits`: results have all logits, also of steps without a row to draw for."""
        self.decoder, self.ops, self.cache, self.keep_logits = decoder, ops, cache, keep_logits
        self.rotary = decoder.rotary()
        rows = len(cache.table)
        self.sizes = padded_sizes(rows)
        self.feeds_itself = decoder.is_first and decoder.is_last
        # Two: the second is filled while the first may still be copied.
        self._given = [_HostBuffer((len(_Field), rows), decoder.device) for _ in range(2)]
        self._control = torch.empty(len(_Field), rows, dtype=torch.int64, device=decoder.device)
        self._size, self._draws = self.sizes[0], False
        self._graphs_wanted = read_switches().graphs
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, StepResult | None]] = {}
        self._write([])

    def capture(self, *, sampled: bool) -> None:
        """Capture a graph for each padded size, on a GPU. `sampled`: also for rows of a temperature above 0.

        Every rank of the instance must do so at the same point: the steps that warm up are collective.
        """
        if not self._can_capture():
            return
        stream = torch.cuda.Stream(self.decoder.device)  # type: ignore[no-untyped-call]
        pool = torch.cuda.graph_pool_handle()
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

    def assign(self, rows: Sequence[RowInput]) -> None:
        """Let the next step compute `rows`, at least one, at distinct slots; no other slot is in use any more.

        If the step `feeds_itself`, this holds until the next call: every step takes each row one position on.
        """
        self._size = next(size for size in self.sizes if size > max(row.slot for row in rows))
        self._draws = any(row.temperature > 0 for row in rows)
        self._write(rows)

    def __call__(self) -> StepResult | None:
        """Enqueue one step of the rows assigned. None from all but the last stage."""
        self.decoder.comm.check()
        if captured := self._graphs.get((self._size, self._draws)):
            graph, result = captured
            graph.replay()
            return result
        return self._compute(self._size, self._draws)

    def _can_capture(self) -> bool:
        """Grouped products of other dtypes than bfloat16 read their groups on the host."""
        decoder = self.decoder
        fixed = decoder.arch.moe is None or decoder.dtype == torch.bfloat16
        return decoder.device.type == "cuda" and fixed and self._graphs_wanted

    def _write(self, rows: Sequence[RowInput]) -> None:
        """Send the rows to the device."""
        given = self._given[0]
        self._given.reverse()
        given.wait()
        given.tensor.zero_()
        given.tensor[_Field.position] = -1
        integers, numbers = given.tensor.numpy(), given.tensor.view(torch.float64).numpy()
        for row in rows:
            token = _FED if row.token is None else row.token
            integers[: _Field.temperature, row.slot] = row.position, token, row.attends, row.seed, 1
            numbers[_Field.temperature :, row.slot] = row.temperature, row.top_p
        sent = given.tensor.to(self.decoder.device, non_blocking=True)
        given.enqueued()
        tokens = sent[_Field.token]
        tokens.copy_(torch.where(tokens == _FED, self._control[_Field.token], tokens))
        self._control.copy_(sent)

    def _compute(self, size: int, draws: bool) -> StepResult | None:
        control = self._control[:, :size]
        position = control[_Field.position]
        self.decoder.comm.begin_step()
        batch = self.ops.make_batch(self.cache, position, control[_Field.attends], self.rotary)
        hidden = self.decoder.decode(control[_Field.token], self.cache.layers, batch, self.rotary, self.ops)
        result = self._chosen(hidden, control, draws) if self.decoder.is_last else None
        self.decoder.comm.end_step()
        if result and self.feeds_itself:
            position.add_(control[_Field.in_use])
        return result

    def _chosen(self, hidden: Tensor, control: Tensor, draws: bool) -> StepResult:
        """The next tokens, where the next step finds them if this one `feeds_itself`.

        Without a row to draw for, all that the ranks tell each other is their largest logits.
        """
        tokens = control[_Field.token] if self.feeds_itself else None
        if not draws and not self.keep_logits:
            return StepResult(self.decoder.greedy(hidden, self.ops, tokens), None)
        logits = self.decoder.head(hidden, self.ops.linear)
        chosen = self._drawn(logits, control) if draws else logits.argmax(-1)
        return StepResult(chosen if tokens is None else tokens.copy_(chosen), logits)

    def _drawn(self, logits: Tensor, control: Tensor) -> Tensor:
        """What each row's request draws, [size] int64."""
        temperature, top_p = (control[field].view(torch.float64) for field in (_Field.temperature, _Field.top_p))
        position = control[_Field.position].clamp(min=0) + 1
        return sample_rows(logits, Choices(temperature, top_p, control[_Field.seed], position))


def padded_sizes(rows: int) -> list[int]:
    """Batch sizes to compute with: powers of two below `rows`, and `rows`."""
    return [1 << power for power in range(rows.bit_length()) if 1 << power < rows] + [rows]
