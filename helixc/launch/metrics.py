"""The numbers of a finished launch, in the form `launch --format json` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from helixc.launch.record import Record, RequestRecord, Verdict
from helixc_runtime.job import Difference, Request
from helixc_runtime.manifest import Plan


@dataclass(frozen=True, slots=True)
class RequestResult:
    """One request. Times in seconds; None where there are too few tokens. `text` is None without a tokenizer.

    `handoff_s`: until the last generation rank had its prompt's KV; None where none was handed over.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: str | None
    prompt_tokens: int
    ttft_s: float | None
    ttl_p50_s: float | None
    handoff_bytes: int
    handoff_s: float | None


@dataclass(frozen=True, slots=True)
class Metrics:
    """Of all requests together. TTL in seconds, over every decode step.

    `handoff_s`: seconds that receiving the prompts' KV took, the slowest rank's of each request, added up;
    `handoff_gb_s`: 10^9 bytes a second of them; `handoff_peer_bytes`: what did not pass through the hosts.
    """

    ttl_p50_s: float | None
    ttl_p99_s: float | None
    handoff_bytes: int
    handoff_peer_bytes: int
    handoff_s: float
    handoff_gb_s: float | None
    kv_tokens_per_rank: dict[int, int]


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """None stands for a difference that is not a number."""

    max_abs_logit_diff: float | None
    first_difference: Difference | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything a program may want to know of a launch."""

    requests: tuple[RequestResult, ...]
    metrics: Metrics
    verify: VerifyResult | None


def summarize(plan: Plan, requests: Sequence[Request], record: Record, texts: Sequence[str | None]) -> Summary:
    """The summary of `record`; `texts` holds the decoded text of each request."""
    steps = [gap for r in record.requests for gap in decode_gaps(r)]
    moved = sum(sum(r.handed_over.values()) for r in record.requests)
    seconds = sum(r.handoff_s or 0.0 for r in record.requests)
    metrics = Metrics(
        ttl_p50_s=percentile(steps, 50),
        ttl_p99_s=percentile(steps, 99),
        handoff_bytes=moved,
        handoff_peer_bytes=sum(r.handed_over.get("peer", 0) for r in record.requests),
        handoff_s=seconds,
        handoff_gb_s=gigabytes_a_second(moved, seconds),
        kv_tokens_per_rank=dict(sorted(record.kv_tokens.items())),
    )
    results = tuple(
        RequestResult(
            index=request.index,
            token_ids=tuple(seen.tokens),
            text=text,
            finish_reason=seen.finish_reason,
            prompt_tokens=len(request.token_ids),
            ttft_s=time_to_first_token(plan, record, seen),
            ttl_p50_s=percentile(decode_gaps(seen), 50),
            handoff_bytes=sum(seen.handed_over.values()),
            handoff_s=seen.handoff_s,
        )
        for request, seen, text in zip(requests, record.requests, texts, strict=True)
    )
    return Summary(results, metrics, _verify(record.verdict))


def decode_gaps(request: RequestRecord) -> list[float]:
    """Seconds of each decode step. The gap before the second token is left out: it holds the handoff."""
    times = request.times[1:]
    return [after - before for before, after in pairwise(times)]


def time_to_first_token(plan: Plan, record: Record, request: RequestRecord) -> float | None:
    """Seconds from when the request's context instance was ready to its first token.

    Starting processes and loading weights is left out: a deployment does it once.
    """
    if request.prefilled_by is None:
        return None
    prefiller = plan.ranks[request.prefilled_by]
    ready = [record.ready_at[r] for r in plan.instance_of(prefiller).ranks if r in record.ready_at]
    return request.times[0] - max(ready) if ready else None


def gigabytes_a_second(size: int, seconds: float | None) -> float | None:
    """10^9 bytes a second of `size` bytes; None where they took no time."""
    return size / seconds / 1e9 if seconds else None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The `percent`-th percentile of `values`, linear between the two nearest; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _verify(verdict: Verdict | None) -> VerifyResult | None:
    if verdict is None:
        return None
    difference = verdict.max_abs_logit_diff
    return VerifyResult(difference if math.isfinite(difference) else None, verdict.first_difference)
