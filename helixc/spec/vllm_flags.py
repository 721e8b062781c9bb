"""The flags of `vllm serve`: which there are, and what a command line gives."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from helixc.diagnostics import closest, one_line

TP, PP, DCP, DP = (
    "tensor-parallel-size",
    "pipeline-parallel-size",
    "decode-context-parallel-size",
    "data-parallel-size",
)
DCP, PCP = "decode-context-parallel-size", "prefill-context-parallel-size"
EP = "enable-expert-parallel"
INTERLEAVE = "cp-kv-cache-interleave-size"
_SHORT = {
    "-tp": TP,
    "-pp": PP,
    "-dcp": DCP,
    "-pcp": PCP,
    "-dp": DP,
    "-ep": EP,
    "-q": "quantization",
    "--dcp-kv-cache-interleave-size": INTERLEAVE,
}
_SIZES = frozenset((TP, PP, DCP, PCP, DP, INTERLEAVE, "block-size", "max-model-len", "max-num-seqs", "seed"))
_OTHER = frozenset(("model", "dtype", "kv-cache-dtype", "load-format", "gpu-memory-utilization", "quantization"))
# Nothing to translate; the value says what to tell.
LEFT_OUT: Mapping[str, str] = {
    "enable-prefix-caching": "Helix shards cannot share prefixes",
    "enable-chunked-prefill": "a context instance computes a prompt in one step",
    "max-num-batched-tokens": "helixc has no budget of tokens a step",
    "kv-transfer-config": "helixc hands prompts over by itself",
    "speculative-config": "helixc does not speculate",
    "enforce-eager": "helixc compiles its kernels ahead",
    "compilation-config": "helixc compiles its kernels ahead",
    "cuda-graph-sizes": "helixc does not capture CUDA graphs",
    "attention-backend": "helixc has its own kernels",
    "all2all-backend": "helixc has its own exchange",
    "enable-eplb": "helixc places experts in order",
    "distributed-executor-backend": "helixc starts its own processes",
    "api-server-count": "this is about the server",
    "dcp-comm-backend": "helixc exchanges partials by one all-to-all",
    "data-parallel-backend": "helixc starts its own processes",
    "data-parallel-address": "helixc starts its own processes",
    "data-parallel-rpc-port": "helixc starts its own processes",
    "data-parallel-size-local": "say how many GPUs a node has by `hardware: {gpus_per_node: ...}`",
    "data-parallel-start-rank": "helixc starts its own processes",
    "data-parallel-hybrid-lb": "this is about the server",
    "data-parallel-external-lb": "this is about the server",
    "swap-space": "helixc does not swap",
    "cpu-offload-gb": "helixc does not offload",
    "host": "this is about the server",
    "port": "this is about the server",
    "api-key": "this is about the server",
    "served-model-name": "this is about the server",
    "chat-template": "this is about the server",
    "tool-call-parser": "this is about the server",
    "reasoning-parser": "this is about the server",
    "enable-auto-tool-choice": "this is about the server",
    "uvicorn-log-level": "this is about the server",
    "max-log-len": "this is about the server",
    "tokenizer": "helixc takes the checkpoint's",
    "tokenizer-mode": "helixc takes the checkpoint's",
    "trust-remote-code": "helixc runs no code of checkpoints",
    "hf-overrides": "helixc takes the checkpoint's config.json",
    "revision": "helixc downloads nothing",
    "download-dir": "helixc downloads nothing",
    "disable-log-requests": "this is about the server",
    "disable-log-stats": "this is about the server",
    "no-enable-prefix-caching": "helixc has none",
    "async-scheduling": "helixc schedules in its own way",
    "nnodes": "write `hardware: {nodes: ...}`",
    "node-rank": "helixc starts its own processes",
    "master-addr": "helixc starts its own processes",
    "master-port": "helixc starts its own processes",
    "headless": "helixc starts its own processes",
}
_SWITCHES = frozenset(
    (
        *(EP, "enable-prefix-caching", "enable-chunked-prefill", "enforce-eager", "trust-remote-code", "headless"),
        *("enable-eplb", "enable-auto-tool-choice", "disable-log-requests", "disable-log-stats", "async-scheduling"),
        *("no-enable-prefix-caching", "data-parallel-hybrid-lb", "data-parallel-external-lb"),
    )
)
_KNOWN = (*_SIZES, *_OTHER, *LEFT_OUT, EP)
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG]?)")
_SCALE = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}


class VllmError(ValueError):
    """The flags cannot be translated; the message says which and what to do."""


@dataclass(slots=True)
class Flags:
    """What the command line gives."""

    sizes: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)

    def size(self, name: str) -> int:
        """A parallel size, 1 where it is not given."""
        return self.sizes.get(name, 1)


def parse(command: str) -> Flags:
    """The flags of a command line, with or without `vllm serve` in front. Raises VllmError."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise VllmError(f"the flags cannot be split into words: {error}") from None
    flags = Flags()
    if words[:1] == ["vllm"]:
        words = words[1:]
    if words[:1] == ["serve"]:
        words = words[1:]
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            if "model" in flags.texts:
                raise VllmError(f"`{word}` stands alone: is a flag missing before it?")
            flags.texts["model"] = one_line(word)
            continue
        name, equals, value = word.partition("=")
        key = _key(name)
        if key in _SWITCHES:
            flags.switches.add(key)
            continue
        given = value if equals else next(rest, "")
        if not given or (given.startswith("-") and not equals):
            raise VllmError(f"`{name}` needs a value")
        if key in _SIZES:
            flags.sizes[key] = _size(name, given)
        else:
            flags.texts[key] = one_line(given)  # comments quote it
    _check(flags)
    return flags


def _key(flag: str) -> str:
    """The long name of a flag, without dashes in front."""
    long = "--" + flag.removeprefix("--").replace("_", "-") if flag.startswith("--") else flag
    key = _SHORT.get(long) or (long.removeprefix("--") if long.startswith("--") else None)
    if key in _KNOWN:
        assert key is not None
        return key
    meant = closest(long, (*_SHORT, *(f"--{name}" for name in _KNOWN)))
    raise VllmError(f"`{flag}` is not known; " + (f"did you mean `{meant}`?" if meant else "leave it out"))


def _size(flag: str, text: str) -> int:
    match = _NUMBER.fullmatch(text)
    size = int(float(match[1]) * _SCALE[match[2]]) if match and len(text) < 16 else -1
    if size < (0 if flag.endswith("seed") else 1):
        raise VllmError(f"`{flag} {text}`: a whole number of 1 or more is needed")
    return size


def _check(flags: Flags) -> None:
    tp, dcp = flags.size(TP), flags.size(DCP)
    if tp % dcp:
        raise VllmError(f"-dcp {dcp} does not divide -tp {tp}: vLLM's dcp ranks are taken from the tp ranks")
