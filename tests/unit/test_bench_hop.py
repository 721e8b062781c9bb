"""bench/hop.py on the CPU: two processes over gloo, and what the estimate says beside it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench import hop
from bench.decode import Measured
from tests.deployments import plan_of, role


def test_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hop.VARIANTS, "tiny", replace(hop.VARIANTS["tiny"], groups=(1, 2)))
    out = tmp_path / "hop.json"
    assert hop.main(["--only", "tiny", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["groups"]) for row in rows] == [(4, 1), (4, 2), (3, 1), (3, 2)]
    for row in rows:
        alone = next(r for r in rows if r["batch"] == row["batch"])
        assert row["step_us"] > 0
        assert row["saved_us"] == pytest.approx((alone["step_us"] - row["step_us"]) / 2, abs=0.2)
        assert (row["estimated_us"] == 0) == (row["groups"] == 1)


def test_layouts_differ_in_their_groups_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And variants in the transport, whatever the environment says; it is as before afterwards."""
    for before in (None, "1"):
        monkeypatch.delenv("HELIXC_COLLECTIVES", raising=False)
        if before:
            monkeypatch.setenv("HELIXC_COLLECTIVES", before)
        for transport in ("one_sided", "collective"):
            with hop.by(transport):  # type: ignore[arg-type]
                plans = [plan_of("deepseek-v3", None, role(cp=2, hop_groups=groups)) for groups in (1, 2)]
            assert [plan.instances[0].exchange for plan in plans] == [transport] * 2
            assert [plan.instances[0].hop.groups for plan in plans] == [1, 2]
        assert os.environ.get("HELIXC_COLLECTIVES") == before


def test_what_is_saved() -> None:
    assert hop.saved(Measured(9.0, 8.0, 1.0), Measured(9.5, 6.5, 1.0)) == 1.5
    with hop.by("collective"):
        plan = plan_of(
            "deepseek-v3", None, role(cp=2, batch=64, hop_groups=2, exchange_space="latent"), dtype="bfloat16"
        )
    nccl, ours = (hop.VARIANTS[name] for name in ("NCCL latents", "one-sided latents"))
    assert hop.estimated(plan, nccl, 64, 8192) > 10e-6
    assert hop.estimated(plan, ours, 64, 8192) < 0
