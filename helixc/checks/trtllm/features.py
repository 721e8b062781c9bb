"""HX91x: what TensorRT-LLM's Helix needs to be told, and what it cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from helixc.checks.check import Finding, error, warning
from helixc.diagnostics import listed
from helixc.spec.trtllm.known_models import builtin_like
from helixc.spec.trtllm.servers import Servers, TrtllmFile, at
from helixc.spec.trtllm.translate import model_path

_CP = "context_parallel_size"
_MLA = ("deepseek", "kimi")


@warning("HX911")
def cp_type_is_given(file: TrtllmFile) -> Iterator[Finding]:
    """context_parallel_size is given without a cp_type.

    TensorRT-LLM does not take Helix for granted: without `cp_config.cp_type: HELIX` the ranks are a context-parallel
    group of another kind, or of none, and what they compute is not Helix. helixc knows no other kind, so it reads the
    file as Helix.
    """
    helix = file.helix
    if helix is not None and helix.path("cp_config", "cp_type") is None:
        message = f"{_CP} {helix.cp} of {helix.name} without a cp_type: TensorRT-LLM does not take that for Helix"
        yield Finding(helix.span(_CP), message, "add `cp_config: {cp_type: HELIX, tokens_per_block: 32}`")


@warning("HX912")
def blocks_are_given(file: TrtllmFile) -> Iterator[Finding]:
    """tokens_per_block is not given in both places that Helix reads.

    TensorRT-LLM's Helix deals out the prompt by `cp_config.tokens_per_block` and pages the cache by
    `kv_cache_config.tokens_per_block`. Both are required and must be equal. Without the first the first request fails;
    without the second the default of the release applies, which need not be the same number. helixc has one block size
    and takes whichever is given.
    """
    helix = file.helix
    if helix is None:
        return
    configs = ("cp_config", "kv_cache_config")
    missing = [config for config in configs if helix.path(config, "tokens_per_block") is None]
    if missing:
        given = next((n for config in configs if (n := helix.count(config, "tokens_per_block"))), 32)
        places = listed((f"{config}.tokens_per_block" for config in missing), "and")
        span = helix.span("cp_config") if helix.path("cp_config") else helix.span(_CP)
        yield Finding(span, f"{places} of {helix.name} not given, but Helix needs both", f"write {given} in both")


@error("HX913")
def features_combine(file: TrtllmFile) -> Iterator[Finding]:
    """A feature is switched on that Helix cannot be combined with.

    On a generation instance whose KV cache is dealt out to cp ranks, a reused block or a partly filled one would have
    to be on the right rank at the right position; a chunk of a prompt, or the short prompts that
    conditional_disagg_config lets generation instances prefill, would need a prefill that is split the same way; beams
    would have to share and copy blocks across ranks; and a pipelined transfer needs context_parallel_size 1 on both
    peers. None of this exists. Switch the feature off on the generation servers.
    """
    helix = file.helix
    if helix is None:
        return
    for key in (("kv_cache_config", "enable_block_reuse"), ("enable_chunked_prefill",)):
        if helix.is_on(*key):
            yield _cannot(helix, key, f"`{key[-1]}: true`", f"write `{key[-1]}: false`")
    width = helix.count("max_beam_width") or 1
    if width > 1:
        yield _cannot(helix, ("max_beam_width",), f"beam search (max_beam_width {width})", "use `max_beam_width: 1`")
    pipelined = ("cache_transceiver_config", "enable_pipelined_transfer")
    for servers in file.roles:
        if servers.is_on(*pipelined):
            yield _cannot(servers, pipelined, "`enable_pipelined_transfer: true`", "leave it out")
    conditional = ("conditional_disagg_config",)
    if conditional in file.source.spans and at(file.source, conditional):
        message = "conditional_disagg_config lets generation instances prefill, which Helix instances cannot"
        yield Finding(file.source.key_span(conditional), message, "remove it")


def _cannot(servers: Servers, key: tuple[str, ...], feature: str, help: str) -> Finding:
    return Finding(servers.span(*key), f"Helix cannot be combined with {feature} of {servers.name}", help)


@warning("HX914")
def reuse_is_off(file: TrtllmFile) -> Iterator[Finding]:
    """Block reuse is left on by default with Helix.

    `kv_cache_config.enable_block_reuse` is true in TensorRT-LLM unless the file says otherwise, and Helix cannot be
    combined with it. helixc has no block reuse.
    """
    helix = file.helix
    if helix is not None and helix.path("kv_cache_config", "enable_block_reuse") is None:
        span = helix.span("kv_cache_config") if helix.path("kv_cache_config") else helix.span(_CP)
        message = f"enable_block_reuse of {helix.name} is on by default, and Helix cannot be combined with it"
        yield Finding(span, message, "add `kv_cache_config: {enable_block_reuse: false}`")


@warning("HX915")
def model_is_served(file: TrtllmFile) -> Iterator[Finding]:
    """TensorRT-LLM's Helix does not serve this model.

    Its Helix supports models with multi-head latent attention, such as DeepSeek-V3 and Kimi-K2, on Blackwell GPUs.
    helixc's Helix also serves models with grouped-query attention.
    """
    path = model_path(file)
    if file.helix is None or path is None:
        return
    name = str(at(file.source, path))
    known = builtin_like(name)
    if known is not None and not known.startswith(_MLA):
        message = f"TensorRT-LLM's Helix serves models with latent attention only, not {name}"
        yield Finding(file.source.value_span(path), message, "use helixc, or tensor parallelism")
