"""The command line: reads arguments, calls one function a verb, prints, and turns the outcome into an exit code."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from helixc import __version__
from helixc.arguments import parser
from helixc_runtime.switches import read_switches

OK, FINDINGS, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0 for success, 1 for findings or a failure, 2 for wrong usage."""
    _accept_any_text()
    try:
        arguments = parser().parse_args(argv)
        if problem := _wrong_switch():
            print(f"helixc: {problem}", file=sys.stderr)
            return USAGE
        code = _VERBS[arguments.verb](arguments)
        sys.stdout.flush()
        return code
    except SystemExit as usage:  # argparse has printed what is wrong
        return usage.code if isinstance(usage.code, int) else USAGE
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINDINGS
    except KeyboardInterrupt:
        return 130


def _wrong_switch() -> str | None:
    """What is wrong with the environment variables of docs/debugging.md: better said here than by every rank."""
    try:
        read_switches()
    except ValueError as error:
        return str(error)
    return None


def _accept_any_text() -> None:
    """File names and messages may hold what the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check(arguments: argparse.Namespace) -> int:
    from helixc import annotations, report
    from helixc.diagnostics import has_errors, strictly
    from helixc.frontend import all_rules, analyse_input
    from helixc.inputs import inputs
    from helixc.spec.trtllm.dialect import Dialect

    dialect = Dialect(arguments.dialect)
    analyses = [analyse_input(given, dialect) for given in inputs(arguments.files)]
    found = [diagnostic for analysis in analyses for diagnostic in analysis.diagnostics]
    if arguments.strict:
        found = strictly(found)
    format = arguments.format or default_format()
    if format == "text":
        report.print_findings(found, analyses)
        print(report.summary(found, len(analyses)))
    elif format == "json":
        sys.stdout.write(report.as_json(found))
    elif format == "github":
        sys.stdout.write(annotations.as_github(found))
    else:
        sys.stdout.write(annotations.as_sarif(found, all_rules(), __version__))
    return FINDINGS if has_errors(found) else OK


def default_format() -> str:
    """Annotations where GitHub Actions reads the output, else text."""
    return "github" if os.environ.get("GITHUB_ACTIONS") == "true" else "text"


def _explain(arguments: argparse.Namespace) -> int:
    from helixc.diagnostics import closest
    from helixc.error_pages import page
    from helixc.frontend import all_rules

    codes = [rule.code for rule in all_rules()]
    code = arguments.code.upper()
    if code not in codes:
        meant = closest(code, codes)
        hint = f"did you mean {meant}?" if meant else f"the codes are {', '.join(codes)}"
        print(f"helixc explain: there is no code {arguments.code}; {hint}", file=sys.stderr)
        return USAGE
    sys.stdout.write(page(code))
    return OK


def _schema(arguments: argparse.Namespace) -> int:
    from helixc.spec.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))
    return OK


def _compile(arguments: argparse.Namespace) -> int:
    from helixc.commands import compile_file

    arches = tuple(dict.fromkeys(arguments.arch or ()))
    return compile_file(arguments.file, arguments.output, arches, arguments.format)


def _plan(arguments: argparse.Namespace) -> int:
    from helixc.commands import plan_difference, plan_path

    if arguments.other is not None:
        return plan_difference(arguments.path, arguments.other, arguments.format)
    return plan_path(arguments.path, arguments.format)


def _launch(arguments: argparse.Namespace) -> int:
    """An artifact needs the standard library only; a file needs the compiler."""
    from helixc.launch import LaunchOptions, launch

    artifact: Path | int = arguments.path
    if not arguments.path.is_dir():
        from helixc.commands import artifact_for_launch

        artifact = artifact_for_launch(arguments.path, needs_kernels=arguments.device == "cuda")
    if isinstance(artifact, int):
        return artifact
    options = LaunchOptions(
        prompts=tuple(arguments.prompt),
        prompts_file=arguments.prompts,
        device=arguments.device,
        checkpoint=arguments.checkpoint,
        chat=arguments.chat,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
        verify=arguments.verify,
        dry_run=arguments.dry_run,
        format=arguments.format,
        run_dir=arguments.run_dir,
        deadline_s=arguments.deadline,
    )
    return launch(artifact, options)


def _init(arguments: argparse.Namespace) -> int:
    from helixc.init import Wishes, start, start_from_vllm

    if arguments.from_vllm is not None:
        return start_from_vllm(arguments.from_vllm, arguments.model, arguments.file)
    wishes = Wishes(
        model=arguments.model,
        context=arguments.ctx,
        generation=arguments.gen,
        gpu=arguments.gpu,
        gpus=arguments.gpus,
        max_seq_len=arguments.max_seq_len,
        max_batch_size=arguments.max_batch_size,
    )
    return start(wishes, arguments.file)


_VERBS = {
    "check": _check,
    "compile": _compile,
    "plan": _plan,
    "launch": _launch,
    "explain": _explain,
    "init": _init,
    "schema": _schema,
}
