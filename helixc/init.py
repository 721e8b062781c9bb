"""`helixc init`: a commented deployment file to start from, which passes `helixc check`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from pathlib import Path

from helixc.diagnostics import divisors, has_errors, listed
from helixc.frontend import Analysis, analyse_input
from helixc.hardware import DEFAULT_GPUS_PER_NODE, GPUS
from helixc.inputs import STDIN, Input
from helixc.model import is_builtin
from helixc.report import print_findings
from helixc.spec.vllm import from_vllm
from helixc.spec.vllm_flags import VllmError
from helixc_runtime.manifest import ModelArch

_DEFAULT_GPUS = 2
_DEFAULT_LENGTH = 32_768


class NoSizes(ValueError):
    """The GPUs cannot be divided; the message says which numbers can."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asks for. None: chosen from the model and the number of GPUs."""

    model: str
    context: str | None  # sizes in the words of the short form, such as `2x tp4`
    generation: str | None
    gpus: int | None  # of one generation instance
    gpu: str | None
    max_seq_len: int | None
    max_batch_size: int


def start(wishes: Wishes, file: str) -> int:
    """Write the file, or print it if `file` is `-`. Returns the exit code; nothing is overwritten."""
    if file != STDIN and Path(file).exists():
        print(f"helixc init: {file} exists; give another name", file=sys.stderr)
        return 2
    name = "deployment.yaml" if file == STDIN else file
    geometry = analyse_input(
        Input(name, f"model: {json.dumps(wishes.model)}\nload_format: dummy\nparallelism: gen tp1\n")
    )
    if geometry.arch is None:
        return _refused(geometry)
    try:
        text = compose(wishes, geometry.arch)
    except NoSizes as problem:
        print(f"helixc init: {problem}", file=sys.stderr)
        return 2
    analysis = analyse_input(Input(name, text))
    if has_errors(analysis.diagnostics):
        return _refused(analysis)
    print_findings(analysis.diagnostics, [analysis], sys.stderr)
    return _write(text, file)


def start_from_vllm(flags: str, model: str, file: str) -> int:
    """Write what the flags of vLLM come to, with `model` if they name none. Returns the exit code.

    The file is written in spite of findings, which are shown: a model that vLLM downloads is no folder yet.
    """
    if file != STDIN and Path(file).exists():
        print(f"helixc init: {file} exists; give another name", file=sys.stderr)
        return 2
    try:
        text = from_vllm(flags, model)
    except VllmError as problem:
        print(f"helixc init: {problem}", file=sys.stderr)
        return 2
    analysis = analyse_input(Input("deployment.yaml" if file == STDIN else file, text))
    print_findings(analysis.diagnostics, [analysis], sys.stderr)
    return _write(text, file) or int(has_errors(analysis.diagnostics))


def _write(text: str, file: str) -> int:
    if file == STDIN:
        sys.stdout.write(text)
        return 0
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"helixc init: cannot write {file}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"wrote {file}; look at what it means with `helixc plan {file}`")
    return 0


def _refused(analysis: Analysis) -> int:
    """Show why there is no file. The places are those of the file that would have been written."""
    print_findings(analysis.diagnostics, [analysis], sys.stderr)
    print("helixc init: nothing was written", file=sys.stderr)
    return 1


def compose(wishes: Wishes, arch: ModelArch) -> str:
    """The text. Raises NoSizes."""
    return "\n".join(_lines(wishes, arch)) + "\n"


def _lines(wishes: Wishes, arch: ModelArch) -> Iterator[str]:
    generation = wishes.generation or _generation_sizes(arch, wishes.gpus or _DEFAULT_GPUS, wishes.gpu)
    context = wishes.context or f"tp{_context_tp(arch, wishes.gpus or _DEFAULT_GPUS)}"
    length = wishes.max_seq_len or min(_DEFAULT_LENGTH, arch.max_position)
    yield "# A Helix-parallel deployment. `helixc check` finds mistakes, `helixc plan` shows what every rank will do."
    yield ""
    if is_builtin(wishes.model):
        yield f"model: {wishes.model} # a built-in geometry; for real weights, a Hugging Face checkpoint folder"
        yield "load_format: dummy # random weights; remove this line with a checkpoint folder"
    else:
        yield f"model: {json.dumps(wishes.model)} # a checkpoint folder, relative to this file"
    yield "dtype: auto # that of the checkpoint; or bfloat16, float16, float32"
    yield ""
    yield "# Context instances (ctx) prefill, generation instances (gen) decode. `2x` before the sizes makes two."
    yield "# tp splits the heads, cp the KV cache by position (Helix; gen only), pp the layers, ep the experts."
    yield f"# Here tp * cp must divide {arch.num_heads} heads{_kv_heads(arch)}."
    yield f"parallelism: ctx {context} / gen {generation}"
    yield ""
    yield f"max_batch_size: {wishes.max_batch_size} # requests that an instance works on at once"
    yield f"max_seq_len: {length} # prompt and generated tokens of one request; the model knows {arch.max_position}"
    yield ""
    yield "cp_config:"
    yield "  cp_type: HELIX"
    yield "  tokens_per_block: 32 # consecutive tokens on one cp rank; block j of a request is on rank j % cp"
    yield ""
    yield "kv_cache_config:"
    yield "  dtype: auto # that of the model; fp8 (e4m3 with scales) takes half of 16 bits"
    yield "  free_gpu_memory_fraction: 0.9 # of the memory that the weights leave"
    yield "  # max_tokens: 65536 # a limit for one rank; by default what max_batch_size and max_seq_len need"
    yield ""
    yield "hardware:"
    if wishes.gpu:
        yield f"  gpu: {wishes.gpu} # memory and links are checked against it"
    else:
        yield "  # gpu: h200 # h100, h200, b200, gb200 or gb300: memory and links are then checked against it"
    yield "  # nodes: 1 # hosts; by default as many as the instances need"
    yield "  # gpus_per_node: 8"
    yield "  share_gpus: false # true: context and generation ranks sit on the same GPUs"


def _kv_heads(arch: ModelArch) -> str:
    return "" if arch.mla else f", and tp {arch.num_kv_heads} KV heads"


def _generation_sizes(arch: ModelArch, gpus: int, gpu: str | None) -> str:
    """tp and cp for `gpus` ranks: as much tp as KV heads allow while cp still splits the cache.

    MLA has one latent for all heads, which tp only duplicates: as little tp as an NVLink domain asks for.
    """
    if arch.num_heads % gpus:
        choices = listed(divisors(arch.num_heads))
        raise NoSizes(
            f"{arch.num_heads} heads do not divide over {gpus} GPUs: choose --gpus among {choices}, or give --gen"
        )
    most = GPUS[gpu].domain if gpu else DEFAULT_GPUS_PER_NODE  # cp ranks that one NVLink domain holds
    usable = [d for d in divisors(gpus) if arch.mla or arch.num_kv_heads % d == 0]
    near = [d for d in usable if gpus // d <= most] or usable
    splitting = [d for d in near if d < gpus] or near  # so that some cp is left
    tp = splitting[0] if arch.mla else splitting[-1]
    sizes = [f"tp{tp}"] + ([f"cp{gpus // tp}"] if gpus > tp else [])
    if arch.moe and gpus > 1 and arch.moe.experts % gpus == 0:
        sizes.append(f"ep{gpus}")
    return " ".join(sizes)


def _context_tp(arch: ModelArch, gpus: int) -> int:
    return gcd(gpus, arch.num_heads if arch.mla else arch.num_kv_heads)
