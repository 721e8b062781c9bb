"""The debugging switches: how they are read, HELIXC_PORTABLE and HELIXC_CHECK_NAN. tests/driver has the others."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helixc.cli import main
from helixc.codegen.problem import problems
from helixc_runtime.checked_ops import CheckedOps
from helixc_runtime.ops import GqaProjections, LayerCache
from helixc_runtime.ops_torch import TorchOps
from helixc_runtime.switches import Switches, read_switches
from tests.gpu.kernel_cases import Case, check_append, check_attend, check_combine, gqa, mla, random_case

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "docs" / "debugging.md"


def tensors(case: Case) -> list[torch.Tensor]:
    """The projections."""
    found = (getattr(case.new, name) for name in case.new.__slots__)
    return [tensor for tensor in found if tensor is not None]


def test_reading() -> None:
    assert read_switches({}) == Switches() == read_switches({"HELIXC_SYNC": "0", "HELIXC_PORTABLE": ""})
    names = [field.name for field in dataclasses.fields(Switches)]
    for name in names:
        assert dataclasses.asdict(read_switches({f"HELIXC_{name.upper()}": "1"})) == {n: n == name for n in names}
    with pytest.raises(ValueError, match="HELIXC_SYNC is 'yes', expected 1 or 0"):
        read_switches({"HELIXC_SYNC": "yes"})


def test_the_page_has_every_switch() -> None:
    documented = set(re.findall(r"^\| `HELIXC_(\w+)=1`", PAGE.read_text(), re.MULTILINE))
    assert documented == {field.name.upper() for field in dataclasses.fields(Switches)}


def test_a_wrong_value_is_a_wrong_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HELIXC_CHECK_NAN", "on")
    assert main(["explain", "HX001"]) == 2
    assert capsys.readouterr().err == "helixc: HELIXC_CHECK_NAN is 'on', expected 1 or 0\n"


def test_portable_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in (mla(128, 64), gqa(64, 8, 128, 64)):
        monkeypatch.delenv("HELIXC_PORTABLE", raising=False)
        assert {"partial", "merge"}.isdisjoint(spec.template for spec in problems(shape, 2, "sm_90a"))
        monkeypatch.setenv("HELIXC_PORTABLE", "1")
        templates = [spec.template for spec in problems(shape, 2, "sm_90a")]
        assert templates == ["append", "partial", "merge", "combine"]


@pytest.mark.parametrize("shape", [mla(3, 4, "float32"), gqa(4, 2, 8, 4, "float32")], ids=["mla", "gqa"])
def test_what_may_hold_anything_is_not_looked_at(shape: object, seed: int) -> None:
    """The cases are full of NaN that nobody may read, and those of combine have empty parts."""
    case = random_case(shape, [5, 0, 9, 1], CPU, seed)  # type: ignore[arg-type]
    assert case.cache.k.isnan().any()
    for rows in tensors(case):
        if rows.dim() > 1:
            rows[case.batch.lengths == 0] = torch.nan
    ops = CheckedOps(TorchOps(case.shape), 0, 0)
    ops.begin_step(case.batch)
    ops.attend(ops.append(case.new, case.cache, case.batch), case.cache, case.batch)
    check_combine(ops, case.shape, 3, CPU, seed, 1e-5)


def test_results_are_those_of_the_ops_inside(seed: int) -> None:
    case = random_case(gqa(4, 2, 8, 4, "float32"), [5, 0, 9, 1], CPU, seed)
    ops = CheckedOps(TorchOps(case.shape), 0, 0)
    ops.begin_step(case.batch)
    check_append(ops, case, 1e-5)
    check_attend(ops, case, 1e-5)


def gqa_of(case: Case) -> GqaProjections:
    assert isinstance(case.new, GqaProjections)
    return case.new


def _q(case: Case) -> None:
    gqa_of(case).q[0, 1, 2] = torch.nan


def _k(case: Case) -> None:
    gqa_of(case).k[3] = torch.nan


def _v(case: Case) -> None:
    gqa_of(case).v[2, 0, 7] = torch.nan


def _norm(case: Case) -> None:
    weight = gqa_of(case).k_norm
    assert weight is not None
    weight[5] = torch.nan


def _old_v(case: Case) -> None:
    assert case.cache.v is not None
    case.cache.v[case.batch.page_table[2, 0], :, 0] = torch.nan


def _old_k(case: Case) -> None:
    case.cache.k[case.batch.page_table[2, 0], :, 0] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_q, r"q given to append is NaN at 1 of 128 places, first at \(0, 1, 2\) of \[4, 4, 8\]"),
        (_k, r"k given to append is NaN at 16 of 64 places, first at \(3, 0, 0\)"),
        (_v, r"v given to append is NaN at 1 of 64 places, first at \(2, 0, 7\)"),
        (_norm, r"k_norm given to append is NaN at 1 of 8 places, first at \(5,\) of \[8\]"),
        (_old_v, r"o of attend is NaN at 32 of 128 places, first at \(2, 0, 0\)"),
        (_old_k, r"lse of attend is NaN at 4 of 16 places, first at \(2, 0\)"),
    ],
)
def test_nan_is_named(spoil: Callable[[Case], None], message: str, seed: int) -> None:
    """In the third layer of a second step."""
    case = random_case(replace(gqa(4, 2, 8, 4, "float32"), qk_norm=True), [5, 4, 9, 1], CPU, seed)
    ops = CheckedOps(TorchOps(case.shape), 6, 20)

    def layer(cache: LayerCache) -> None:
        ops.attend(ops.append(case.new, cache, case.batch), cache, case.batch)

    def clean() -> LayerCache:
        assert case.cache.v is not None
        return LayerCache(case.cache.k.clone(), case.cache.v.clone())

    for layers in (3, 2):
        ops.begin_step(case.batch)
        for _ in range(layers):
            layer(clean())
    spoil(case)
    with pytest.raises(FloatingPointError, match=f"^rank 6, layer 22: {message}"):
        layer(case.cache)


def test_nan_between_the_ranks_is_named(seed: int) -> None:
    shape, generator = gqa(4, 2, 8, 4, "float32"), torch.Generator().manual_seed(seed)
    o, lse = torch.randn(2, 3, 4, 8, generator=generator), torch.randn(2, 3, 4, generator=generator)
    ops = CheckedOps(TorchOps(shape), 1, 0)
    lse[1, 2, 3], o[1, 2, 3] = -torch.inf, torch.nan
    ops.combine(o, lse)
    o[1, 0, 2, 5] = torch.nan
    with pytest.raises(FloatingPointError, match=r"o given to combine is NaN at 1 .* first at \(1, 0, 2, 5\)"):
        ops.combine(o, lse)
