"""The geometry of a deployment's model, or a finding that says why there is none."""

from __future__ import annotations

from helixc.checks.model import MODEL_UNREADABLE
from helixc.diagnostics import Diagnostic
from helixc.model import ModelError, native_dtype, read_model
from helixc.spec.source import Source
from helixc.spec.spec import Spec
from helixc_runtime.manifest import ModelArch


def read_geometry(source: Source, spec: Spec) -> tuple[ModelArch | None, list[Diagnostic]]:
    """The model's geometry, or the reason why there is none."""
    try:
        if spec.dtype == "auto":
            native_dtype(spec.model)  # the checkpoint's, which must be one that helixc has
        return read_model(spec.model), []
    except ModelError as error:
        return None, [MODEL_UNREADABLE.at(source.value_span(("model",)), str(error), error.help)]
