"""What the workers reported, gathered: tokens and their times, bytes handed over, the verdict of --verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from helixc_runtime.events import Event
from helixc_runtime.job import Difference


@dataclass(slots=True)
class RequestRecord:
    """One request so far. `times`: when each token was sampled, seconds of the machine's monotonic clock.

    `handed_over`: bytes of KV by the way they took, peer or host; `handoff_s`: seconds until the last rank had its own.
    """

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    prefilled_by: int | None = None  # rank
    finish_reason: str | None = None
    handed_over: dict[str, int] = field(default_factory=dict)
    handoff_s: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far the deployment is from one unsharded process."""

    max_abs_logit_diff: float
    tolerance: float
    first_difference: Difference | None


class Record:
    """Gathers the events of a launch of `requests` requests."""

    def __init__(self, requests: int) -> None:
        self.requests = [RequestRecord() for _ in range(requests)]
        self.ready_at: dict[int, float] = {}  # rank -> seconds
        self.kv_tokens: dict[int, int] = {}  # rank -> tokens stored over the job
        self.verdict: Verdict | None = None

    def observe(self, event: Event) -> None:
        """Take one event in. Raises KeyError if a worker leaves out one of the event's fields."""
        data = event.fields
        match event.name:
            case "stage" if data["stage"] == "ready":
                self.ready_at.setdefault(event.rank, event.time)
            case "prefilled" | "token":
                request = self.requests[data["request"]]
                request.tokens.append(data["token"])
                request.times.append(event.time)
                if event.name == "prefilled":
                    request.prefilled_by = event.rank
            case "finished":
                self.requests[data["request"]].finish_reason = data["reason"]
            case "handoff":
                moved, way = self.requests[data["request"]].handed_over, data["way"]
                moved[way] = moved.get(way, 0) + data["bytes"]
            case "received":
                request = self.requests[data["request"]]
                request.handoff_s = max(request.handoff_s or 0.0, data["seconds"])
            case "kv_tokens":
                self.kv_tokens[event.rank] = data["tokens"]
            case "verify":
                first = data["first_difference"]
                found = Difference(**first) if first else None
                self.verdict = Verdict(data["max_abs_logit_diff"], data["tolerance"], found)

    @property
    def unfinished(self) -> Sequence[int]:
        """Requests nobody reported as finished."""
        return [i for i, r in enumerate(self.requests) if r.finish_reason is None]
