"""The command line: reads arguments, calls one function a verb, prints, and turns the outcome into an exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from helixc import __version__
from helixc.arguments import parser

OK, FINDINGS, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0 for success, 1 for findings or a failure, 2 for wrong usage."""
    _accept_any_text()
    try:
        arguments = parser().parse_args(argv)
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


def _accept_any_text() -> None:
    """File names and messages may hold what the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check(arguments: argparse.Namespace) -> int:
    from helixc import annotations, report
    from helixc.frontend import all_rules, analyse

    analyses = [analyse(file) for file in dict.fromkeys(arguments.files)]
    found = [diagnostic for analysis in analyses for diagnostic in analysis.diagnostics]
    if arguments.format == "text":
        report.print_findings(analyses)
        print(report.summary(found, len(analyses)))
    elif arguments.format == "json":
        sys.stdout.write(report.as_json(found))
    elif arguments.format == "github":
        sys.stdout.write(annotations.as_github(found))
    else:
        sys.stdout.write(annotations.as_sarif(found, all_rules(), __version__))
    return OK if all(analysis.ok for analysis in analyses) else FINDINGS


def _explain(arguments: argparse.Namespace) -> int:
    from helixc.diagnostics import closest
    from helixc.frontend import all_rules

    rules = {rule.code: rule for rule in all_rules()}
    rule = rules.get(arguments.code.upper())
    if rule is None:
        meant = closest(arguments.code, rules)
        hint = f"did you mean {meant}?" if meant else f"the codes are {', '.join(rules)}"
        print(f"helixc explain: there is no code {arguments.code}; {hint}", file=sys.stderr)
        return USAGE
    print(f"{rule.code} ({rule.severity.value}): {rule.title}\n\n{rule.explanation}")
    return OK


def _compile(arguments: argparse.Namespace) -> int:
    from helixc.commands import compile_file

    arches = tuple(dict.fromkeys(arguments.arch or ("sm_90a",)))
    return compile_file(arguments.file, arguments.output, arches, arguments.format)


def _plan(arguments: argparse.Namespace) -> int:
    from helixc.commands import plan_path

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


_VERBS = {"check": _check, "compile": _compile, "plan": _plan, "launch": _launch, "explain": _explain}
