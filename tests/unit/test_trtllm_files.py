"""TensorRT-LLM's published files against the table in their README, which was made without helixc."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from helixc.build import make_plan
from helixc.diagnostics import Severity
from helixc.frontend import Analysis, analyse_input
from helixc.inputs import read_input
from helixc.spec.source import LineTable
from helixc.spec.spec import RoleSpec
from helixc.spec.trtllm.dialect import Dialect, kind_of

DATA = Path(__file__).parents[1] / "data" / "trtllm-configs"


@dataclass(frozen=True)
class Row:
    """A line of the README's table: sizes as written, such as `1x tp2 pp1 ep2 adp`, and remarks."""

    file: str
    kind: str
    context: str
    generation: str
    notes: str


def rows() -> list[Row]:
    found = []
    for text in (DATA / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        if len(cells) == 7 and cells[0].endswith((".yaml", ".yml")):
            found.append(Row(cells[0], *cells[3:]))
    return found


ROWS = rows()
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.file)


def read(row: Row, dialect: Dialect = Dialect.AUTO) -> Analysis:
    return analyse_input(read_input(str(DATA / row.file)), dialect)


def test_the_table_is_whole() -> None:
    assert len(ROWS) == 74
    assert {row.kind for row in ROWS} == {"orchestrator", "worker", "slurm benchmark"}


@each_row
def test_dialect_and_kind_are_recognised(row: Row) -> None:
    source = read(row).source
    assert source is not None
    assert kind_of(source) == row.kind.removeprefix("slurm ")
    assert any(d.code.startswith("HX9") for d in read(row).diagnostics), "not read as TensorRT-LLM's"


@each_row
def test_sizes_are_those_of_the_table(row: Row) -> None:
    spec = read(row).spec
    assert spec is not None
    if row.kind == "worker":
        return
    assert described(spec.context) == wanted(row.context)
    assert described(spec.generation) == wanted(row.generation)


def wanted(sizes: str) -> dict[str, int]:
    """`1x tp2 pp1 ep2 adp` as numbers; {} for no instances."""
    found = {name: int(size) for name, size in re.findall(r"\b(tp|pp|cp|ep)(\d+)", sizes)}
    count = int(sizes.split("x")[0])
    return {"tp": 1, "pp": 1, "cp": 1, "ep": 0, "x": count, "adp": int("adp" in sizes)} | found if count else {}


def described(role: RoleSpec | None) -> dict[str, int]:
    if role is None:
        return {}
    return {
        "x": role.num_instances,
        "tp": role.tensor_parallel_size,
        "pp": role.pipeline_parallel_size,
        "cp": role.context_parallel_size,
        "ep": role.moe_expert_parallel_size or 0,
        "adp": int(role.enable_attention_dp),
    }


@each_row
def test_remarks_of_the_table_are_findings(row: Row) -> None:
    for dialect in (Dialect.AUTO, Dialect.TRTLLM):
        found = read(row, dialect).diagnostics
        codes = {d.code for d in found}
        assert bool(codes & {"HX209", "HX951"}) == ("name disagrees" in row.notes)
        assert ("HX952" in codes) == ("the string None" in row.notes)
        assert ("HX934" in codes) == ("generation only" in row.notes)
        assert ("HX911" in codes) == ("helix, no cp_config" in row.notes)
        assert any("twice" in d.message for d in found) == ("repeated batch size" in row.notes)
        if "old schema" in row.notes:
            assert "HX906" in codes


@each_row
def test_files_that_people_run_have_no_errors(row: Row) -> None:
    assert not [d for d in read(row, Dialect.TRTLLM).diagnostics if d.severity is Severity.ERROR]


@each_row
def test_spans_are_where_the_words_are(row: Row) -> None:
    """Every key that helixc has no use for is noted under its own name."""
    analysis = read(row)
    table = LineTable.of(analysis.file, analysis.text)
    for finding in analysis.diagnostics:
        if finding.code == "HX901":
            assert f"`{table.at(finding.span).strip(chr(34))}`" in finding.message


@each_row
def test_keys_for_the_other_engine_are_notes_only_when_helixc_is_to_run_it(row: Row) -> None:
    linted = {d.code for d in read(row, Dialect.TRTLLM).diagnostics}
    assert not linted & {"HX901", "HX905"}


def test_most_files_can_be_planned_as_they_are() -> None:
    """All but workers' files, models that helixc has no geometry of, and experts that do not divide."""
    planned = 0
    for row in ROWS:
        analysis = read(row)
        if analysis.ok and analysis.is_whole:
            assert analysis.spec is not None and analysis.arch is not None
            plan = make_plan(analysis.spec, analysis.arch, ("sm_90a",))
            roles = [(row.context, "context"), (row.generation, "generation")]
            expected = {role: instances(sizes) for sizes, role in roles if instances(sizes)}
            assert {r: sum(i.role == r for i in plan.instances) for r in expected} == expected
            planned += 1
    assert planned >= 50


def instances(sizes: str) -> int:
    return wanted(sizes).get("x", 0)
