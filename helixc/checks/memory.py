"""HX5xx: the KV cache against what it has to hold."""

from __future__ import annotations

from collections.abc import Iterator

from helixc.checks.case import Case
from helixc.checks.check import Finding, error, warning
from helixc_runtime.manifest import local_length

_MAX_TOKENS = ("kv_cache_config", "max_tokens")


@error("HX501")
def cache_holds_a_block(case: Case) -> Iterator[Finding]:
    """max_tokens is less than one block.

    The KV cache is allocated in whole blocks of tokens_per_block tokens.
    """
    for side in case.sides:
        tokens, block = side.spec.max_tokens, side.spec.tokens_per_block
        if tokens is not None and tokens < block:
            message = f"max_tokens {tokens} of {side.name} does not hold one block of {block} tokens"
            yield Finding(side.at(*_MAX_TOKENS), message, f"use {block} or more, or a smaller tokens_per_block")


@warning("HX502")
def cache_holds_a_request(case: Case) -> Iterator[Finding]:
    """A request of max_seq_len tokens does not fit into the KV cache.

    max_tokens counts the tokens that one rank holds. Of a request with n tokens a cp rank holds about n / cp, in whole
    blocks; the first rank holds the most.
    """
    for side in case.sides:
        tokens, length = side.spec.max_tokens, side.spec.max_seq_len
        if tokens is None or length is None:
            continue
        share = local_length(length, side.spec.tokens_per_block, side.cp, 0)
        if side.spec.tokens_per_block <= tokens < share:
            message = (
                f"a request of max_seq_len {length} needs {share} tokens a rank of {side.name}, max_tokens is {tokens}"
            )
            yield Finding(side.at(*_MAX_TOKENS), message, f"use {share} or more, or a shorter max_seq_len")
