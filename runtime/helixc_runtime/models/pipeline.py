"""HOP-B, the batch-wise overlap of the Helix paper: one group of rows is exchanged while the next is attended.

    main stream    attend 0 | attend 1   | attend 2   | exchange 2 | the layer goes on, with all rows
    second stream             exchange 0 | exchange 1 ^

Fork: an exchange waits for the attention of its own rows only. Join: the last exchange waits for those before it, and
so does all that follows. So the exchanges of a layer come one after another, in the order of the groups, and the next
layer's after them: in the order in which a rank with one stream would send. Inboxes have their halves in turn, messages
their numbers and collectives their partners, as without groups (inbox.cuh).

Attention never waits for an exchange, nor an exchange for a later attention: ranks wait for each other along that order
only. On a GPU the two share multiprocessors, and may wait for each other's. Thread blocks start in the order of their
numbers: so, of the first exchange that is not done on all ranks, the lowest block that is not done runs on both ends,
or one end's exchange runs nowhere, and does not keep attention from its end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from helixc_runtime.comm import Comm
from helixc_runtime.manifest import Hop
from helixc_runtime.ops import DecodeBatch, Ops, Partial

AttendGroup = Callable[[Tensor, DecodeBatch], Partial]  # q of a group's tokens, the group -> what to exchange


class Pipeline:
    """How the rows of one decode step are attended and exchanged: in the groups of `hop`, or all at once.

    `cp` ranks exchange.
    """

    def __init__(self, hop: Hop, cp: int, batch: DecodeBatch, ops: Ops, comm: Comm) -> None:
        """Prepare `ops` for the step."""
        split = len(batch.page_table) >= hop.rows
        self._groups = tuple(batch.in_groups(hop.groups)) if split and hop.groups > 1 else (batch,)
        self._cp, self._ops, self._comm = cp, ops, comm
        for group in self._groups:
            ops.begin_step(group)

    def run(self, q: Tensor, attend: AttendGroup, what: str) -> Tensor:
        """q [N, H, D] attended and exchanged: [N, H / C, P], P as `attend` gives it. `what`: see Comm.exchange."""
        first, *others = self._groups
        if not others:
            return self._comm.exchange(attend(q, first), self._ops, what)
        second = second_stream(q.device)
        bounds = pairwise(accumulate((len(group.lengths) for group in self._groups), initial=0))
        rows = [slice(*ends) for ends in bounds]
        partials = [attend(q[rows[0]], first)]  # all kept: the allocator does not know that the second stream reads
        _, heads, width = partials[0].o.shape
        out = partials[0].o.new_empty(len(q), heads // self._cp, width)
        for group, own, before in zip(others, rows[1:], rows, strict=False):
            attended = second.mark()
            partials.append(attend(q[own], group))  # launched first: what it leaves of the GPU is the exchange's
            with second.after(attended):
                self._comm.exchange(partials[-2], self._ops, what, out[before])
        second.join()
        self._comm.exchange(partials[-1], self._ops, what, out[rows[-1]])
        return out


class SecondStream:
    """A stream beside torch's current one. On a CPU everything happens in the order of the program."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event | None:
        """This point of the current stream."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def after(self, mark: torch.cuda.Event | None) -> AbstractContextManager[object]:
        """What is launched within goes to this stream, and waits for `mark`."""
        if self._stream is None or mark is None:
            return nullcontext()
        self._stream.wait_event(mark)
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        """What comes next on the current stream waits for all of this one."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@cache
def second_stream(device: torch.device) -> SecondStream:
    """One a device: each stream has memory of its own in torch's allocator."""
    return SecondStream(device)
