"""HX94x: lengths and budgets in tokens."""

from __future__ import annotations

from collections.abc import Iterator

from helixc.checks.check import Finding, note, warning
from helixc.diagnostics import Related
from helixc.spec.source import KeyPath
from helixc.spec.trtllm.servers import TrtllmFile, at

_BUFFER = ("cache_transceiver_config", "max_tokens_in_buffer")


@warning("HX941")
def buffer_holds_a_prompt(file: TrtllmFile) -> Iterator[Finding]:
    """The transfer buffer is smaller than the longest prompt.

    A prompt's KV goes through a buffer of max_tokens_in_buffer tokens. A longer prompt still works, but part of its
    transfer allocates memory on the way or falls back to a slower path, and only long prompts show it.
    """
    if file.context is None or file.generation is None:
        return
    longest = _longest_prompt(file)
    if longest is None:
        return
    tokens, path = longest
    for servers in file.roles:
        buffer = servers.count(*_BUFFER)
        if buffer is not None and buffer * servers.cp < tokens:
            related = (Related("prompts may be this long", file.source.value_span(path)),)
            message = f"max_tokens_in_buffer {buffer} of {servers.name} is below the longest prompt of {tokens} tokens"
            yield Finding(servers.span(*_BUFFER), message, f"use {-(-tokens // servers.cp)} or more", related)


@warning("HX942")
def units_are_clear(file: TrtllmFile) -> Iterator[Finding]:
    """A length of a Helix instance may be meant for one rank or for all of them.

    With context_parallel_size above 1 a length of the generation servers that is smaller than that of the context
    servers, but not when multiplied by cp, looks as if it counted the tokens of one cp rank. Releases of TensorRT-LLM
    differ in this. For helixc max_seq_len counts the tokens of a request, over all ranks, and only
    kv_cache_config.max_tokens those of one rank.
    """
    both = file.both
    if both is None or file.helix is None:
        return
    context, generation = both
    for key in ("max_seq_len", "max_num_tokens"):
        first, second = context.count(key), generation.count(key)
        if first and second and second < first <= second * generation.cp:
            related = (Related("that of the context servers", context.span(key)),)
            message = (
                f"{key} {second} of {generation.name} holds a prompt of {first} only if it counts"
                f" the tokens of one of {generation.cp} cp ranks"
            )
            help = f"for helixc write {first} or more; for TensorRT-LLM check what your release counts"
            yield Finding(generation.span(key), message, help, related)


@warning("HX943")
def benchmark_fits(file: TrtllmFile) -> Iterator[Finding]:
    """The benchmark's requests do not fit into the servers.

    Each request has input_length tokens, which the context servers prefill, and output_length more, all of which the
    generation servers hold.
    """
    given, answer = _benchmark(file, "input_length"), _benchmark(file, "output_length")
    if given is None:
        return
    needs = [(file.context, given), (file.generation, given + (answer or 0))]
    for servers, tokens in needs:
        length = servers.count("max_seq_len") if servers else None
        if servers is not None and length is not None and length * servers.cp < tokens:
            message = f"max_seq_len {length} of {servers.name} is below the benchmark's {tokens} tokens a request"
            related = (Related("the benchmark's prompts", file.source.value_span(("benchmark", "input_length"))),)
            yield Finding(servers.span("max_seq_len"), message, f"use {tokens} or more", related)


@warning("HX944")
def batch_fits_the_budget(file: TrtllmFile) -> Iterator[Finding]:
    """max_num_tokens does not let a full batch take a step.

    A generation step computes a token of every request, and each of its draft tokens. With max_num_tokens below
    max_batch_size * (1 + max_draft_len) the batch never fills.
    """
    if file.generation is None:
        return
    batch, budget = file.generation.count("max_batch_size"), file.generation.count("max_num_tokens")
    drafts = file.generation.drafts
    if batch and budget and budget < batch * (1 + drafts):
        related = (Related("max_batch_size is given here", file.generation.span("max_batch_size")),)
        each = f"{batch} requests of {1 + drafts} tokens" if drafts else f"{batch} requests"
        message = f"max_num_tokens {budget} of {file.generation.name} is below a step of {each}"
        help = f"use {batch * (1 + drafts)} or more, or a smaller max_batch_size"
        yield Finding(file.generation.span("max_num_tokens"), message, help, related)


@note("HX945")
def prompts_fit_the_budget(file: TrtllmFile) -> Iterator[Finding]:
    """Prompts longer than max_num_tokens are refused.

    Without chunked prefill a prompt is computed in one step, so the context servers take prompts of up to
    max_num_tokens tokens, whatever max_seq_len says.
    """
    if file.context is None or file.context.is_on("enable_chunked_prefill"):
        return
    key = "max_input_len" if file.context.path("max_input_len") else "max_seq_len"
    length, budget = file.context.count(key), file.context.count("max_num_tokens")
    if length and budget and budget < length:
        related = (Related(f"{key} is given here", file.context.span(key)),)
        message = f"prompts of {file.context.name} may have {budget} tokens (max_num_tokens), not {length} ({key})"
        help = f"raise max_num_tokens to {length}, or switch enable_chunked_prefill on, if longer ones are to come"
        yield Finding(file.context.span("max_num_tokens"), message, help, related)


def _longest_prompt(file: TrtllmFile) -> tuple[int, KeyPath] | None:
    """(tokens, where they are given): what the context servers accept at most, or what the benchmark sends."""
    benchmark = _benchmark(file, "input_length")
    if benchmark is not None:
        return benchmark, ("benchmark", "input_length")
    assert file.context is not None
    keys = ["max_input_len", "max_seq_len"]
    if not file.context.is_on("enable_chunked_prefill"):
        keys.append("max_num_tokens")
    found = [(n, path) for key in keys if (n := file.context.count(key)) and (path := file.context.path(key))]
    return min(found, key=lambda pair: pair[0]) if found else None


def _benchmark(file: TrtllmFile, key: str) -> int | None:
    path = ("benchmark", key)
    value = at(file.source, path) if path in file.source.spans else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
