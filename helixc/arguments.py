"""The command line's grammar: verbs, flags and their types."""

from __future__ import annotations

import argparse
from pathlib import Path

from helixc import __version__
from helixc.hardware import GPUS

ARCHES = ("sm_90a", "sm_100a", "sm_103a")
GPU_NAMES = tuple(GPUS)
DIAGNOSTIC_FORMATS = ("text", "json", "github", "sarif")
DATA_FORMATS = ("text", "json")
DIALECTS = ("auto", "helixc", "trtllm")


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs. Its result has `verb` and that verb's flags."""
    top = argparse.ArgumentParser(
        prog="helixc", description="Compiles a YAML description of a Helix-parallel deployment, and launches it."
    )
    top.add_argument("--version", action="version", version=f"helixc {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    _check(verbs.add_parser("check", help="report everything that is wrong with deployment files"))
    _compile(verbs.add_parser("compile", help="write the artifact: the plan and the compiled kernels"))
    _plan(verbs.add_parser("plan", help="print the plan, as it will run, or the difference of two"))
    _launch(verbs.add_parser("launch", help="run the deployment on this machine"))
    _explain(verbs.add_parser("explain", help="explain the code of a finding, such as HX301"))
    _init(verbs.add_parser("init", help="write a commented deployment file to start from"))
    verbs.add_parser("schema", help="print the JSON Schema of deployment files, for editors")
    return top


def _check(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="deployment files, patterns such as 'configs/**/*.yaml', or - for stdin",
    )
    verb.add_argument("--strict", action="store_true", help="warnings are errors")
    verb.add_argument("--format", choices=DIAGNOSTIC_FORMATS, help="default: text; github under GitHub Actions")
    verb.add_argument(
        "--dialect",
        choices=DIALECTS,
        default="auto",
        help="whose files they are; trtllm lints for TensorRT-LLM's users",
    )


def _compile(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("file", type=Path, metavar="FILE", help="deployment file")
    verb.add_argument("-o", "--output", type=Path, metavar="DIR", help="the artifact's folder")
    verb.add_argument(
        "--arch",
        action="append",
        choices=ARCHES,
        help="GPU architecture, repeatable; default: that of hardware.gpu, or sm_90a",
    )
    verb.add_argument("--format", choices=DATA_FORMATS, default="text", help="default: %(default)s")


def _plan(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("path", type=Path, metavar="FILE|DIR", help="deployment file or artifact")
    verb.add_argument("other", type=Path, nargs="?", metavar="FILE|DIR", help="another: print what changes on the way")
    verb.add_argument("--format", choices=DATA_FORMATS, default="text", help="default: %(default)s")


def _explain(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("code", metavar="CODE")


def _init(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "file", nargs="?", default="deployment.yaml", metavar="FILE", help="default: %(default)s; - prints"
    )
    verb.add_argument("--model", default="llama-3.1-8b", help="folder or built-in geometry; default: %(default)s")
    verb.add_argument(
        "--from-vllm", metavar="FLAGS", help="translate the flags of `vllm serve`, quoted as one text: '-tp 8 -dcp 8'"
    )
    verb.add_argument("--gpus", type=_count, metavar="N", help="GPUs of the generation instance; sizes follow from it")
    verb.add_argument("--gen", metavar="SIZES", help="sizes of the generation instances, such as 'tp2 cp4 ep8'")
    verb.add_argument("--ctx", metavar="SIZES", help="sizes of the context instances, such as '2x tp4'")
    verb.add_argument("--gpu", choices=GPU_NAMES, help="kind of GPU, so that memory and links are checked")
    verb.add_argument("--max-seq-len", type=_count, metavar="N", help="prompt and generated tokens of one request")
    verb.add_argument("--max-batch-size", type=_count, default=8, metavar="N", help="default: %(default)s")


def _launch(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("path", type=Path, metavar="FILE|DIR", help="deployment file or artifact")
    verb.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where this host has what the plan needs")
    verb.add_argument("--checkpoint", type=Path, metavar="DIR", help="the weights' folder, if not the compiled one")
    source = verb.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="prompts as JSON lines")
    verb.add_argument("--chat", action="store_true", help="put each prompt into the checkpoint's chat template")
    _sampling(verb.add_argument_group("generation (what a line of --prompts says wins)"))
    verb.add_argument("--verify", action="store_true", help="compare with one unsharded process")
    verb.add_argument("--dry-run", action="store_true", help="print what would be started")
    verb.add_argument("--format", choices=DATA_FORMATS, default="text", help="default: %(default)s")
    verb.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="logs and job file; default: a new one in .helixc/runs"
    )
    verb.add_argument(
        "--deadline",
        type=_positive,
        default=60.0,
        metavar="SECONDS",
        help="end everything when a rank is silent for so long; default: %(default)s",
    )


def _sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-tokens", type=_count, default=64, metavar="N", help="default: %(default)s")
    group.add_argument("--temperature", type=_not_negative, default=0.0, help="0: greedy; default: %(default)s")
    group.add_argument("--top-p", type=_fraction, default=1.0, help="default: %(default)s")
    group.add_argument("--seed", type=_not_negative_int, default=0, help="default: %(default)s")
    group.add_argument("--ignore-eos", action="store_true", help="generate up to --max-tokens whatever comes")


def _count(text: str) -> int:
    number = _int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def _not_negative_int(text: str) -> int:
    number = _int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, not {text}")
    return number


def _not_negative(text: str) -> float:
    number = _float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of 0 or more, not {text}")
    return number


def _positive(text: str) -> float:
    number = _float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return number


def _fraction(text: str) -> float:
    number = _float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return number


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
