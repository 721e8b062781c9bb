"""HX916: what releases of TensorRT-LLM have computed wrong without a word, where a file brings it about."""

from __future__ import annotations

from collections.abc import Iterator

from helixc.checks.check import Finding, warning
from helixc.diagnostics import Related
from helixc.spec.trtllm.servers import Servers, TrtllmFile, at, truth

_TP, _CP = "tensor_parallel_size", "context_parallel_size"
_GRAPHS = ("cuda_graph_config", "enable_padding")
_OVERLAP = "disable_overlap_scheduler"
_PROMPT = ("benchmark", "input_length")
_DEFAULT_BLOCK = 32
_WIDE = 64
_COMPARE = "use a release with the fix, and compare its answers with those of `context_parallel_size: 1`"


@warning("HX916")
def was_once_wrong(file: TrtllmFile) -> Iterator[Finding]:
    """A combination that releases of TensorRT-LLM have computed wrong, silently.

    Each of these answered, and answered wrong, in some release that has Helix:

    - tp and cp both above 1: the first releases numbered ranks with tp innermost, so that every rank multiplied by
      another rank's rows of o_proj (fixed by #10350);
    - padded CUDA graphs: the padding rows of a batch wrote their keys and values into the cache;
    - the overlap scheduler: it prepared the next step before the last one's token was known, and took a position twice
      (reported where `disable_overlap_scheduler: false` is written; it is the default too);
    - 64 cp ranks or more: a stride in the exchange's workspace overflowed 32 bits;
    - prompts so short that a cp rank gets no block: its empty shard brought NaN into the sum.

    helixc tests each of them.
    """
    helix = file.helix
    if helix is None:
        return
    tp, cp = helix.size(_TP), helix.cp
    if tp > 1:
        related = (Related("with this cp", helix.span(_CP)),)
        message = f"tp {tp} with cp {cp} of {helix.name}: some releases give ranks the wrong rows of o_proj"
        yield Finding(helix.span(_TP), message, _COMPARE, related)
    if helix.is_on(*_GRAPHS):
        message = (
            f"padded CUDA graphs with Helix on {helix.name}: in some releases padding rows write into the KV cache"
        )
        yield Finding(helix.span(*_GRAPHS), message, _COMPARE)
    if truth(helix.value(_OVERLAP)) is False:
        message = f"the overlap scheduler of {helix.name} with Helix: some releases take a position twice"
        yield Finding(helix.span(_OVERLAP), message, "write `disable_overlap_scheduler: true`, or compare the answers")
    if cp >= _WIDE:
        message = f"cp {cp} of {helix.name}: some releases overflow a 32-bit stride in the exchange's workspace"
        yield Finding(helix.span(_CP), message, _COMPARE)
    yield from _empty_shards(file, helix)


def _empty_shards(file: TrtllmFile, helix: Servers) -> Iterator[Finding]:
    block = helix.count("cp_config", "tokens_per_block") or helix.count("kv_cache_config", "tokens_per_block")
    block = block or _DEFAULT_BLOCK
    prompt = at(file.source, _PROMPT) if _PROMPT in file.source.spans else None
    if isinstance(prompt, int) and 0 < prompt <= (helix.cp - 1) * block:
        message = f"prompts of {prompt} tokens in blocks of {block} leave some of the {helix.cp} cp ranks without any"
        related = (Related("the prompts' length", file.source.value_span(_PROMPT)),)
        help = "use a release that masks empty shards, smaller blocks or fewer cp ranks"
        yield Finding(helix.span(_CP), message, help, related)
