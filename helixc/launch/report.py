"""The end of a launch for people: the table of requests, the KV that moved, and the verdict of --verify."""

from __future__ import annotations

import math

from helixc.launch.metrics import Metrics, Summary, decode_gaps, gigabytes_a_second, percentile
from helixc.launch.record import Record, Verdict
from helixc.table import aligned
from helixc_runtime.manifest import Plan

_HEAD = ("request", "prompt tokens", "generated", "finish", "TTFT", "TTL p50", "TTL p99", "KV handed over")


def table(summary: Summary, record: Record) -> str:
    """Requests, one a row, then what was handed over and stored."""
    rows = [
        (
            str(result.index),
            str(result.prompt_tokens),
            str(len(result.token_ids)),
            result.finish_reason or "-",
            milliseconds(result.ttft_s),
            milliseconds(result.ttl_p50_s),
            milliseconds(percentile(decode_gaps(seen), 99)),
            handed_over(result.handoff_bytes, result.handoff_s),
        )
        for result, seen in zip(summary.requests, record.requests, strict=True)
    ]
    metrics = summary.metrics
    kv = ", ".join(f"rank {rank}: {tokens}" for rank, tokens in metrics.kv_tokens_per_rank.items())
    overall = f"TTL p50 {milliseconds(metrics.ttl_p50_s)}, p99 {milliseconds(metrics.ttl_p99_s)} over all requests"
    lines = [*aligned([_HEAD, *rows]), "", overall]
    moved = handed_over(metrics.handoff_bytes, metrics.handoff_s)
    lines += [f"KV handed over: {moved}{_between_peers(metrics)}", f"KV tokens stored: {kv or 'none reported'}"]
    return "\n".join(lines) + "\n"


def _between_peers(metrics: Metrics) -> str:
    if metrics.handoff_peer_bytes in (0, metrics.handoff_bytes):
        return ", between peers" if metrics.handoff_peer_bytes else ""
    return f", {metrics.handoff_peer_bytes:,} of them between peers"


def handed_over(size: int, seconds: float | None) -> str:
    """Bytes, time and speed of a handoff; "-" for none."""
    speed = gigabytes_a_second(size, seconds)
    return "-" if speed is None else f"{size:,} bytes in {milliseconds(seconds)}, {speed:.3g} GB/s"


def verified(verdict: Verdict, plan: Plan) -> bool:
    """Whether the deployment agrees with one process: logits within the tolerance, and in float32 the same tokens.

    Rounding of shorter types may flip a near tie, so there a different token is shown but allowed.
    """
    close = verdict.max_abs_logit_diff <= verdict.tolerance  # false for NaN
    return close and (verdict.first_difference is None or plan.model.rounds)


def verdict_text(verdict: Verdict, plan: Plan) -> str:
    """One or two lines on how the deployment compares with one unsharded process."""
    word = "passed" if verified(verdict, plan) else "FAILED"
    difference = f"{verdict.max_abs_logit_diff:.3g}" if math.isfinite(verdict.max_abs_logit_diff) else "not a number"
    lines = [f"verify {word}: largest logit difference {difference}, tolerance {verdict.tolerance:g}"]
    if first := verdict.first_difference:
        where = f"request {first.request}, generated token {first.step}"
        lines.append(f"first differing token: {where}: expected {first.expected}, got {first.got}")
    else:
        lines.append("every token is the one that a single unsharded process generates")
    return "\n".join(lines) + "\n"


def milliseconds(seconds: float | None) -> str:
    """`seconds` as milliseconds with three significant digits; "-" for None."""
    if seconds is None:
        return "-"
    value = seconds * 1000
    return f"{value:.0f} ms" if value >= 99.95 else f"{value:.1f} ms" if value >= 9.995 else f"{value:.2f} ms"
