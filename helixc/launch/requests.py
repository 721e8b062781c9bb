"""Prompts to requests: tokenized, and checked against what the plan's instances can hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from helixc.launch.options import LaunchError, LaunchOptions
from helixc.launch.prompts import Prompt
from helixc.launch.tokenizer import Tokenizer, TokenizerError
from helixc_runtime.job import Request
from helixc_runtime.manifest import Instance, Plan, local_length


def make_requests(
    plan: Plan, prompts: Sequence[Prompt], tokenizer: Tokenizer | None, options: LaunchOptions
) -> tuple[Request, ...]:
    """A request a prompt, in order. `tokenizer` may be None if every prompt is token ids.

    Raises LaunchError with every prompt that is empty, outside the vocabulary, or too long for the deployment.
    """
    if not any(i.role == "context" for i in plan.instances):
        raise LaunchError(
            f"{plan.name} has no context instances, so nothing can prefill the prompts; "
            "add a context_servers section (or `ctx ...` in parallelism) and compile again"
        )
    requests, mistakes = [], []
    for index, prompt in enumerate(prompts):
        try:
            ids = _token_ids(prompt, tokenizer, options)
        except TokenizerError as error:
            mistakes.append(f"{prompt.source}: {error}")
            continue
        found = [f"{prompt.source}: {m}" for m in _mistakes(plan, ids, prompt.max_tokens)]
        mistakes += found
        sampling = (prompt.max_tokens, prompt.temperature, prompt.top_p, prompt.seed, prompt.ignore_eos)
        requests.append(Request(index, ids, *sampling))
    if mistakes:
        raise LaunchError(*mistakes)
    return tuple(requests)


def _token_ids(prompt: Prompt, tokenizer: Tokenizer | None, options: LaunchOptions) -> tuple[int, ...]:
    if prompt.token_ids is not None:
        return prompt.token_ids
    assert prompt.text is not None and tokenizer is not None
    return tokenizer.encode_chat(prompt.text) if options.chat else tokenizer.encode(prompt.text)


def _mistakes(plan: Plan, ids: tuple[int, ...], max_tokens: int) -> Iterator[str]:
    """What makes one prompt impossible to serve, with the way out."""
    vocab = plan.model.arch.vocab_size
    if not ids:
        yield "the prompt has no tokens; a model needs at least one to start from"
    for index, token in enumerate(ids):
        if not 0 <= token < vocab:
            yield f"token_ids[{index}] is {token}, outside the vocabulary of {vocab} tokens (0 to {vocab - 1})"
            return
    for role in ("context", "generation"):
        instance = next(i for i in plan.instances if i.role == role)
        tokens = len(ids) if role == "context" else len(ids) + max_tokens
        if mistake := _too_long(instance, len(ids), tokens) or (
            _no_room(plan, instance, tokens) if role == "generation" else None
        ):
            yield mistake
            return


def _too_long(instance: Instance, prompt_tokens: int, tokens: int) -> str | None:
    if tokens <= instance.max_seq_len:
        return None
    limit = f"{instance.role}_servers.max_seq_len ({instance.max_seq_len})"
    raise_it = f"raise {limit} and compile again"
    if instance.role == "context":
        return f"the prompt's {prompt_tokens} tokens exceed {limit}; shorten it, or {raise_it}"
    sizes = f"{prompt_tokens} prompt tokens + max_tokens {tokens - prompt_tokens} = {tokens} exceed {limit}"
    left = instance.max_seq_len - prompt_tokens
    lower = f"lower max_tokens to {left}" if left > 0 else "shorten the prompt"
    return f"{sizes}; {lower}, or {raise_it}"


def _no_room(plan: Plan, instance: Instance, tokens: int) -> str | None:
    """A request that the KV cache could not hold even alone would wait for ever.

    Every rank reserves as many pages as the fullest one needs, cp rank 0.
    """
    block = plan.tokens_per_block
    pages = -(-local_length(tokens, block, instance.cp, 0) // block)
    for rank in (plan.ranks[r] for r in instance.ranks):
        if pages > max(1, rank.memory.kv_capacity_tokens // block):
            return (
                f"its {tokens} tokens need {pages * block} in the KV cache of rank {rank.rank} ({instance.role}), "
                f"which holds {rank.memory.kv_capacity_tokens}; raise "
                f"{instance.role}_servers.kv_cache_config.max_tokens and compile again, or shorten the request"
            )
    return None
