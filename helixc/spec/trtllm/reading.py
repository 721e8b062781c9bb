"""A TensorRT-LLM file as a deployment, for helixc itself or for a linter of TensorRT-LLM's files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum

from helixc.diagnostics import Diagnostic
from helixc.model import builtin_names
from helixc.spec.source import Source
from helixc.spec.trtllm import rules
from helixc.spec.trtllm.dialect import Kind
from helixc.spec.trtllm.keys import unknown_keys, unused_keys
from helixc.spec.trtllm.known_models import builtin_like
from helixc.spec.trtllm.servers import TrtllmFile, at
from helixc.spec.trtllm.translate import model_path, translate


class Purpose(StrEnum):
    """DEPLOY: helixc will run it. LINT: TensorRT-LLM will, and what only helixc lacks is not worth a word."""

    DEPLOY = "deploy"
    LINT = "lint"


@dataclass(frozen=True, slots=True)
class Reading:
    """`source` is the deployment under helixc's keys. `is_whole`: it names a model whose geometry can be had."""

    file: TrtllmFile
    source: Source
    is_whole: bool
    findings: list[Diagnostic]


def read(source: Source, purpose: Purpose) -> Reading:
    """Read `source`, a file of TensorRT-LLM, as a deployment."""
    file = TrtllmFile.of(source)
    translated, narrowed = translate(file)
    findings = list(unknown_keys(source, file.kind))
    model, about_model = _model(file, translated)
    if purpose is Purpose.DEPLOY:
        findings += [*unused_keys(source, file.kind), *narrowed]
    if file.kind is Kind.WORKER:
        message = f"this file holds the options of one {'context' if file.context else 'generation'} worker"
        help = "the model and the other role are given elsewhere: give the orchestrator's file to check them too"
        findings.append(rules.ONE_WORKER.at(file.start, message, help))
    findings += about_model
    if model is not None:
        translated = Source(translated.path, translated.text, translated.data | {"model": model}, translated.spans)
    return Reading(file, translated, model is not None, findings)


def _model(file: TrtllmFile, translated: Source) -> tuple[str | None, list[Diagnostic]]:
    """What stands for the model in the deployment, None without a geometry, and what there is to say about it."""
    path, source = model_path(file), file.source
    help = "put its config.json into a folder of that name beside the file to check heads, experts and layers"
    if path is None:
        if file.kind is Kind.WORKER:
            return None, []
        message = "no model is named, so its geometry was not compared with the sizes"
        return None, [rules.NO_GEOMETRY.at(file.start, message, help)]
    name = at(source, path)
    if not isinstance(name, str):
        return None, []  # the schema reports it
    span = source.value_span(path)
    folder = os.path.join(os.path.dirname(source.path), os.path.expanduser(name))
    if os.path.isdir(folder) or name in builtin_names():
        return name, []
    known = builtin_like(name)
    if known is None:
        message = f"the geometry of `{name}` is not known, so it was not compared with the sizes"
        return None, [rules.NO_GEOMETRY.at(span, message, help)]
    message = f"no folder `{name}` here: checked with the built-in geometry {known}"
    return known, [rules.BUILT_IN.at(span, message, "give the checkpoint's folder to launch it")]
