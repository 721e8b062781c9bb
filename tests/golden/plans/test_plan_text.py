"""Deployment files beside this one against the plans beside them. HELIXC_UPDATE_GOLDEN=1 writes the plans anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helixc.build import make_plan
from helixc.frontend import analyse
from helixc.plan.show import to_text
from helixc_runtime.manifest import Plan, to_json

_HERE = Path(__file__).parent
_SPECS = sorted(_HERE.glob("*.yaml"))


def _plan(spec: Path) -> Plan:
    analysis = analyse(spec)
    assert analysis.ok, analysis.diagnostics
    assert analysis.spec and analysis.arch
    return make_plan(analysis.spec, analysis.arch, ("sm_90a",))


@pytest.mark.parametrize("spec", _SPECS, ids=lambda spec: spec.stem)
@pytest.mark.parametrize("kind", ["txt", "json"])
def test_plan(spec: Path, kind: str) -> None:
    text = to_text(_plan(spec)) if kind == "txt" else to_json(_plan(spec)).replace("},{", "},\n{")
    golden = spec.with_suffix(f".plan.{kind}")
    if os.environ.get("HELIXC_UPDATE_GOLDEN") == "1":
        golden.write_text(text)
    assert text == golden.read_text()


def test_no_golden_plan_is_stale() -> None:
    assert {p.name.split(".")[0] for p in _HERE.glob("*.plan.*")} == {spec.stem for spec in _SPECS}
