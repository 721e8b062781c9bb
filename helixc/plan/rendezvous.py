"""Does a set of programs, one a rank, always run to its end? Answered by running them, each step blocking.

Every operation here blocks until all its participants have arrived, except `post`, which leaves a message and goes on.
That is more than NCCL or gloo demand, so programs that end here end there. One run decides: operations of different
ranks commute, and nothing a rank does next depends on timing, so that if one order of events reaches the end, all do.
For the same reason programs that end one by one also end one after the other.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

Kind = Literal["all_reduce", "all_gather", "exchange", "broadcast", "send", "recv", "post", "take"]


class Op(NamedTuple):
    """One communication of one rank.

    `ranks`: the members of a collective in group order, or (source, target) of a message. `size`: bytes that this rank
    puts in or receives, a token (a whole message for a broadcast). `what` is its purpose, on which all must agree.
    """

    kind: Kind
    ranks: tuple[int, ...]
    size: int
    what: str
    source: int | None = None  # of a broadcast

    def __str__(self) -> str:
        if self.kind in ("send", "post"):
            return f"{self.kind} to {self.ranks[1]} ({self.what})"
        if self.kind in ("recv", "take"):
            return f"{self.kind} from {self.ranks[0]} ({self.what})"
        return f"{self.kind} over {_listed(self.ranks)} ({self.what})"


Program = Sequence[Op]
_PARTNER: dict[Kind, Kind] = {"send": "recv", "recv": "send"}


def flaws(programs: Mapping[int, Program]) -> list[str]:
    """Why the programs do not all end, or disagree on the way; empty if all is well."""
    return _Run(programs).run()


class _Run:
    """One execution. A rank is in `ready`, or waits in exactly one of `arrived`, `messages`, `takers`, or has ended."""

    def __init__(self, programs: Mapping[int, Program]) -> None:
        self.programs = programs
        self.at = dict.fromkeys(programs, 0)
        self.ready = deque(programs)
        self.teams = _Teams()
        self.arrived: dict[int, list[int]] = defaultdict(list)  # by group
        self.messages: dict[tuple[Kind, tuple[int, ...]], int] = {}  # who waits to send or receive, by (kind, pair)
        self.mailbox: dict[tuple[int, ...], deque[Op]] = defaultdict(deque)  # posted, by pair
        self.takers: dict[tuple[int, ...], int] = {}
        self.found: list[str] = []

    def run(self) -> list[str]:
        while self.ready and not self.found:
            self._advance(self.ready.popleft())
        if not self.found:
            self.found += self._blocked()
        if not self.found:
            left = [op for box in self.mailbox.values() for op in box]
            self.found += [f"rank {op.ranks[0]}: nobody takes its {op}" for op in left]
        return self.found

    def _op(self, rank: int) -> Op | None:
        program, at = self.programs[rank], self.at[rank]
        return program[at] if at < len(program) else None

    def _advance(self, rank: int) -> None:
        """Run `rank` until it has to wait, or its program ends."""
        while (op := self._op(rank)) is not None and not self.found:
            if not self._takes_part(rank, op):
                self.found.append(f"rank {rank} takes no part in the {op} it issues")
            elif op.kind == "post":
                self.mailbox[op.ranks].append(op)
                self.at[rank] += 1
                if op.ranks in self.takers:
                    self.ready.append(self.takers.pop(op.ranks))
            elif not self._meets(rank, op):
                return

    def _meets(self, rank: int, op: Op) -> bool:
        """Whether everybody that `op` needs is there; if so all of them go on."""
        if op.kind == "take":
            if not self.mailbox[op.ranks]:
                self.takers[op.ranks] = rank
                return False
            self._agree(op, self.mailbox[op.ranks].popleft())
            self.at[rank] += 1
            return True
        together = self._together(rank, op)
        if together is None:
            return False
        for other in together:
            other_op = self._op(other)
            assert other_op is not None
            self._agree(op, other_op)
        for other in together:
            self.at[other] += 1
        self.ready.extend(other for other in together if other != rank)
        return True

    def _together(self, rank: int, op: Op) -> list[int] | None:
        """All participants of `op`, or None after noting that `rank` waits."""
        if op.kind in _PARTNER:
            partner = self.messages.pop((_PARTNER[op.kind], op.ranks), None)
            if partner is None:
                self.messages[op.kind, op.ranks] = rank
                return None
            return [partner, rank]
        team = self.teams.number(op.ranks)
        waiting = self.arrived[team]
        waiting.append(rank)
        return self.arrived.pop(team) if len(waiting) == len(op.ranks) else None

    def _agree(self, op: Op, other: Op) -> None:
        same_kind = op.kind == other.kind or {op.kind, other.kind} in ({"send", "recv"}, {"post", "take"})
        if not same_kind or (op.size, op.what, op.source) != (other.size, other.what, other.source):
            ranks = _listed(op.ranks)
            self.found.append(f"ranks {ranks} meet in different operations: {_full(op)} and {_full(other)}")

    def _blocked(self) -> Iterator[str]:
        """The first rank that cannot go on, and the chain of ranks it waits for."""
        waiting = sorted(rank for rank in self.programs if self._op(rank) is not None)
        if not waiting:
            return
        chain: list[str] = []
        seen: set[int] = set()
        rank: int | None = waiting[0]
        while rank is not None:
            op = self._op(rank) if rank in self.programs else None
            if op is None:
                chain.append(f"rank {rank}, which has nothing left to do" if rank in self.programs else f"rank {rank}")
                break
            if rank in seen:
                chain.append(f"rank {rank} again")
                break
            seen.add(rank)
            chain.append(f"rank {rank} in {op}")
            rank = self._missing(op)
        yield f"{len(waiting)} ranks wait forever: " + ", waits for ".join(chain)

    def _missing(self, op: Op) -> int | None:
        """A rank that `op` waits for."""
        if op.kind in ("send", "recv", "take"):
            return op.ranks[1] if op.kind == "send" else op.ranks[0]
        there = self.arrived[self.teams.number(op.ranks)]
        return next((r for r in op.ranks if r not in there), None)

    def _takes_part(self, rank: int, op: Op) -> bool:
        if op.kind in ("send", "post"):
            return rank == op.ranks[0] != op.ranks[1]
        if op.kind in ("recv", "take"):
            return rank == op.ranks[1] != op.ranks[0]
        return rank in self.teams.members(op.ranks)


class _Teams:
    """Groups by a number each: hashing the tuple of a large group at every operation would cost more than the rest."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, ...], int] = {}
        self._members: list[frozenset[int]] = []
        self._seen: dict[int, tuple[int, tuple[int, ...]]] = {}  # by the tuple's id, which the tuple here keeps alive

    def number(self, ranks: tuple[int, ...]) -> int:
        """The same for equal tuples."""
        seen = self._seen.get(id(ranks))
        if seen is None:
            seen = self._numbers.setdefault(ranks, len(self._numbers)), ranks
            self._seen[id(ranks)] = seen
            if seen[0] == len(self._members):
                self._members.append(frozenset(ranks) if len({*ranks}) == len(ranks) else frozenset())
        return seen[0]

    def members(self, ranks: tuple[int, ...]) -> frozenset[int]:
        """The ranks of a group; nobody if one is named twice."""
        return self._members[self.number(ranks)]


def _full(op: Op) -> str:
    source = "" if op.source is None else f" from {op.source}"
    return f"{op.kind} of {op.size} B{source} for {op.what}"


def _listed(ranks: tuple[int, ...]) -> str:
    return ",".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]},{ranks[1]}..{ranks[-1]}"
