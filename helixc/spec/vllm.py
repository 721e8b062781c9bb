"""vLLM's command line as a deployment file: `-tp 8 -dcp 8` and its neighbours, with what changes on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import get_args

from helixc.diagnostics import one_line
from helixc.spec.schema import DTYPE_ALIASES, DtypeName, KvDtypeName
from helixc.spec.trtllm.known_models import builtin_like
from helixc.spec.vllm_flags import DCP, DP, EP, INTERLEAVE, LEFT_OUT, PCP, PP, TP, Flags, parse

_SUPPORTED = {"dtype": get_args(DtypeName), "kv-cache-dtype": get_args(KvDtypeName)}
_WIDTH = 116


def from_vllm(command: str, model: str) -> str:
    """The text of a deployment file for the flags of `vllm serve`. `model` is taken where they name none.

    The comments say what is different in Helix and what was left out. Raises VllmError.
    """
    flags = parse(command)
    return "\n".join(_lines(command, flags, model)) + "\n"


def _lines(command: str, flags: Flags, model: str) -> Iterator[str]:
    yield from _comment(f"Translated from vLLM: {one_line(' '.join(command.split()))}")
    tp, dcp, pp = flags.size(TP), flags.size(DCP), flags.size(PP)
    if tp > 1:
        yield "#"
    if dcp > 1:
        yield from _comment(
            f"vLLM's decode context parallelism reuses tensor-parallel ranks: -tp {tp} -dcp {dcp} is {tp} GPUs a stage,"
            f" and each group of {dcp} of them splits the KV cache by tokens. Helix counts the two apart and multiplies"
            f" them: the same {tp} GPUs are tp{tp // dcp} cp{dcp}. Writing tp{tp} cp{dcp} would ask for {tp * dcp}."
            f" For the FFN all {tp} ranks are tensor-parallel in both."
        )
    elif tp > 1:
        yield from _comment(
            f"Without -dcp vLLM keeps all tokens of a request on each of the {tp} tp ranks that need them. To let Helix"
            f" split them, move a factor from tp to cp: tp1 cp{tp} is the same {tp} GPUs."
        )
    yield ""
    yield from _model(flags, model)
    yield from _settings(flags)
    yield ""
    yield "# Prefill and decoding are separate instances here; vLLM does both on the same GPUs, so they share them."
    yield f"parallelism: {_context(tp, pp)} / {_generation(flags, tp, dcp, pp)}"
    if "kv-transfer-config" not in flags.texts:
        yield "share_gpus: true"
    yield from _block(flags)
    yield from _left_out(flags)


def _model(flags: Flags, otherwise: str) -> Iterator[str]:
    name = flags.texts.get("model")
    if name is None:
        yield f"model: {otherwise} # the flags name none: write yours here"
        name = otherwise
    elif (known := builtin_like(name)) is not None:
        yield f"model: {known} # built-in geometry; for the weights, give the folder of {name}"
    else:
        yield f"model: {json.dumps(name)} # the checkpoint's folder, relative to this file"
    if "load-format" in flags.texts:
        yield f"load_format: {'dummy' if flags.texts['load-format'] == 'dummy' else 'auto'}"
    elif builtin_like(name) is not None:
        yield "load_format: dummy # random weights, until the folder is given"


def _context(tp: int, pp: int) -> str:
    return f"ctx tp{tp}" + (f" pp{pp}" if pp > 1 else "")


def _generation(flags: Flags, tp: int, dcp: int, pp: int) -> str:
    dp, experts = flags.size(DP), EP in flags.switches
    spread = dp > 1 and experts and tp == 1  # attention data parallelism: the experts span all dp ranks
    parts = ["gen"]
    if dp > 1 and not spread:
        parts.append(f"{dp}x")
    parts.append(f"tp{dp if spread else tp // dcp}")
    parts += [f"cp{dcp}"] * (dcp > 1) + [f"pp{pp}"] * (pp > 1)
    if experts:
        parts.append(f"ep{dp if spread else tp}")
    return " ".join(parts + ["dp"] * spread)


def _settings(flags: Flags) -> Iterator[str]:
    for key, ours in (("max-model-len", "max_seq_len"), ("max-num-seqs", "max_batch_size"), ("seed", "seed")):
        if key in flags.sizes:
            yield f"{ours}: {flags.sizes[key]}"
    if "dtype" in flags.texts and (dtype := _dtype(flags, "dtype")):
        yield f"dtype: {dtype}"


def _block(flags: Flags) -> Iterator[str]:
    interleave, page = flags.sizes.get(INTERLEAVE, 1), flags.sizes.get("block-size")
    inner = []
    if interleave > 1 or page is not None:
        yield ""
        yield from _comment(
            "A block is both the page of the KV cache and the run of tokens that one cp rank owns; vLLM has a number"
            f" for each (--block-size {page or 'by default'}, --{INTERLEAVE} {interleave})."
        )
        inner.append(f"tokens_per_block: {interleave if interleave > 1 else page}")
    if (dtype := _dtype(flags, "kv-cache-dtype")) not in (None, "auto"):
        inner.append(f"dtype: {dtype}")
    fraction = flags.texts.get("gpu-memory-utilization")
    if fraction is not None and re.fullmatch(r"0?\.\d+|1(?:\.0*)?", fraction):
        yield ""
        yield "# vLLM's is of the whole GPU, weights included; this is of what the weights leave."
        inner.append(f"free_gpu_memory_fraction: {float(fraction):g}")
    if inner:
        yield f"kv_cache_config: {{{', '.join(inner)}}}"


def _dtype(flags: Flags, key: str) -> str | None:
    """The element type that flag `key` asks for, auto if it is not given; None if there are no kernels for it."""
    written = flags.texts.get(key, "auto")
    name = DTYPE_ALIASES.get(written, written)
    return name if name in _SUPPORTED[key] else None


def _left_out(flags: Flags) -> Iterator[str]:
    reasons = {key: LEFT_OUT[key] for key in (*flags.texts, *flags.switches) if key in LEFT_OUT}
    if flags.size(PCP) > 1:
        reasons[PCP] = "context instances split prompts by tp and pp, or use more instances"
    if flags.size(DP) > 1:
        reasons[DP] = "read as instances, or with experts as attention data parallelism"
        if EP in flags.switches and flags.size(TP) > 1:
            reasons[EP] = f"the experts of one instance span its {flags.size(TP)} ranks, not those of all"
    for key in _SUPPORTED:
        if _dtype(flags, key) is None:
            reasons[key] = f"helixc has no kernels for {flags.texts[key]}; this is planned in the model's dtype"
    if "quantization" in flags.texts:
        reasons["quantization"] = "helixc has no kernels for quantised weights"
    if reasons:
        yield ""
        yield "# Not translated:"
        for key, reason in sorted(reasons.items()):
            yield f"#   --{key}: {reason}"


def _comment(text: str) -> Iterator[str]:
    line = "#"
    for word in text.split():
        if len(line) + len(word) + 1 > _WIDTH and line != "#":
            yield line
            line = "#"
        line += f" {word}"
    yield line
