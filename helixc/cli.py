"""The command line: reads arguments, calls one function a verb, prints, and turns the outcome into an exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from helixc import __version__
from helixc.arguments import parser

if TYPE_CHECKING:
    from helixc.frontend import Analysis

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
    from helixc.frontend import all_rules, analyse

    analyses = {file: analyse(file) for file in arguments.files}
    found = [diagnostic for analysis in analyses.values() for diagnostic in analysis.diagnostics]
    if arguments.format == "text":
        print_findings(list(analyses.values()))
        from helixc.report import summary

        print(summary(found, len(analyses)))
    else:
        from helixc import report

        printers = {
            "json": lambda: report.as_json(found),
            "github": lambda: report.as_github(found),
            "sarif": lambda: report.as_sarif(found, all_rules(), __version__),
        }
        sys.stdout.write(printers[arguments.format]())
    return OK if all(analysis.ok for analysis in analyses.values()) else FINDINGS


def print_findings(analyses: Sequence[Analysis]) -> None:
    """Print diagnostics as text, in colour on a terminal."""
    from helixc.report import as_text, coloured, plain

    diagnostics = [diagnostic for analysis in analyses for diagnostic in analysis.diagnostics]
    texts = {analysis.file: analysis.text for analysis in analyses}
    if diagnostics:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(as_text(diagnostics, texts, coloured if colour else plain))


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
    from helixc.build import compile_verb

    arches = tuple(dict.fromkeys(arguments.arch or ("sm_90a",)))
    return compile_verb(arguments.file, output=arguments.output, arches=arches, format=arguments.format)


def _plan(arguments: argparse.Namespace) -> int:
    from helixc.build import plan_verb

    return plan_verb(arguments.path, format=arguments.format)


def _launch(arguments: argparse.Namespace) -> int:
    from helixc.launch import LaunchOptions, launch

    directory = arguments.path
    if not directory.is_dir():
        from helixc.build import artifact_for_launch

        directory = artifact_for_launch(arguments.path)
        if directory is None:
            return FINDINGS
    options = LaunchOptions(
        prompts=tuple(arguments.prompt),
        prompts_file=arguments.prompts,
        device=arguments.device,
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
    return launch(directory, options)


_VERBS = {"check": _check, "compile": _compile, "plan": _plan, "launch": _launch, "explain": _explain}
