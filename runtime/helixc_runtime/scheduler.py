"""Which requests an instance has, and when the next may start: continuous batching, first come first served.

Order matters: context ranks send prompts in the order of their requests, so a generation instance that admitted a
later request of the same sender first would wait for bytes that cannot come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from helixc_runtime.job import Request
from helixc_runtime.kv import Row, pages_needed
from helixc_runtime.manifest import Instance, Plan, Rank


def assigned(plan: Plan, instance: Instance, requests: Iterable[Request]) -> list[Request]:
    """Requests are dealt round-robin over the instances of each role, in order."""
    count = sum(i.role == instance.role for i in plan.instances)
    return [r for r in requests if r.index % count == instance.index]


def serving(plan: Plan, role: str, request: Request) -> Instance:
    """The instance of `role` that serves `request`: the inverse of `assigned`."""
    instances = [i for i in plan.instances if i.role == role]
    return instances[request.index % len(instances)]


def dp_rank(plan: Plan, instance: Instance, request: Request) -> int:
    """The data-parallel rank (a tp rank) that attends for `request`; 0 without attention data parallelism."""
    count = sum(i.role == instance.role for i in plan.instances)
    return request.index // count % instance.tp if instance.attention_dp else 0


def attends(plan: Plan, instance: Instance, rank: Rank, request: Request) -> bool:
    """Whether `rank` of `instance` holds the KV of `request`: all do, or its data-parallel rank alone."""
    return not instance.attention_dp or rank.tp_rank == dp_rank(plan, instance, request)


class Scheduler:
    """Admission of one generation instance's requests, decided by its leader alone."""

    def __init__(self, plan: Plan, instance: Instance, requests: list[Request], pages: int) -> None:
        self.plan, self.instance = plan, instance
        self.waiting = deque(requests)
        self._free = [pages] * (instance.tp if instance.attention_dp else 1)
        self._running = 0

    def head(self) -> Request | None:
        """The next request, if a row and its pages are free."""
        if not self.waiting or self._running == self.instance.max_batch_size:
            return None
        request = self.waiting[0]
        fits = self._pages(request) <= self._free[dp_rank(self.plan, self.instance, request)]
        return request if fits else None

    def admit(self, request: Request) -> None:
        """Take the head of the queue into the batch."""
        assert self.waiting.popleft() is request
        self._running += 1
        self._free[dp_rank(self.plan, self.instance, request)] -= self._pages(request)

    def skip(self, request: Request) -> None:
        """Drop the head of the queue: its first token was its last."""
        assert self.waiting.popleft() is request

    def finish(self, request: Request) -> None:
        """Take a running request out of the batch."""
        self._running -= 1
        self._free[dp_rank(self.plan, self.instance, request)] += self._pages(request)

    def _pages(self, request: Request) -> int:
        return pages_needed(len(request.token_ids) + request.max_tokens, self.plan.tokens_per_block, self.instance.cp)


def new_row(request: Request, slot: int, first_token: int) -> Row:
    """The row of a request that was prefilled."""
    return Row(request.index, slot, len(request.token_ids), request.max_tokens, [first_token])
