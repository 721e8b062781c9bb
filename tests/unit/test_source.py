"""Reading YAML: types by the core schema, a span for everything, and a finding instead of a traceback."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helixc.diagnostics import Diagnostic
from helixc.spec.document import parse_yaml
from helixc.spec.source import MAX_BYTES, LineTable, Source, load


def read(text: str) -> tuple[Source, list[Diagnostic]]:
    source, findings = parse_yaml("f.yaml", text)
    assert source is not None, findings
    return source, findings


def fails(text: str) -> Diagnostic:
    """The only finding of a text that is no deployment file at all."""
    source, findings = parse_yaml("f.yaml", text)
    assert source is None
    (finding,) = findings
    return finding


def quoted(source: Source, *path: str | int) -> str:
    """The characters of the value at a path."""
    return LineTable.of(source.path, source.text).at(source.spans[path].value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-3", -3),
        ("8:30", "8:30"),
        ("1_000", "1_000"),
        ("1e-3", 1e-3),
        (".5", 0.5),
        ("3.", 3.0),
        ("-.inf", float("-inf")),
        ("~", None),
        ("", None),
        ("2001-01-01", "2001-01-01"),
        ('"2"', "2"),
        ("!!str 2", "2"),
        ("!!float 2", 2.0),
        ("=", "="),
    ],
)
def test_plain_scalars_follow_the_core_schema(text: str, value: object) -> None:
    found = read(f"key: {text}")[0].data["key"]
    assert found == value
    assert type(found) is type(value)


def test_every_value_has_its_span() -> None:
    source, findings = read("a:\n  b: [1, 'two']   # comment\n\n  c: |\n    text\n# end\nd: {e: f}\n")
    assert not findings
    assert quoted(source, "a", "b", 1) == "'two'"
    assert quoted(source, "a", "c") == "|\n    text"
    assert quoted(source, "d", "e") == "f"
    span = source.spans["a", "b", 0].value
    assert (span.line, span.column, span.end_line, span.end_column) == (2, 7, 2, 8)
    key = source.spans["a", "c"].key
    assert key is not None
    assert (key.line, key.column) == (4, 3)


def test_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\n\r\nb: \xc3\xa9 # c\r\nc: 2\r\n")
    source, findings = load(path)
    assert source is not None and not findings
    assert source.data == {"a": 1, "b": "é", "c": 2}
    assert [source.value_span((key,)).line for key in "abc"] == [1, 3, 4]
    assert source.value_span(("a",)).column == 4


def test_anchors_and_merge_keys() -> None:
    source, findings = read("x: &x {a: 1, b: 2}\ny: &y {b: 3, c: 3}\nz:\n  <<: [*x, *y]\n  a: 9\nw: *x\n")
    assert not findings
    assert source.data["z"] == {"a": 9, "b": 2, "c": 3}
    assert source.data["w"] == {"a": 1, "b": 2}
    assert quoted(source, "z", "c") == "3"
    assert source.value_span(("z", "b")).line == 1


def test_duplicate_keys_show_both_places() -> None:
    source, findings = read("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 4\n")
    assert source.data == {"a": 1, "b": {"c": 1, "d": 2}}
    places = [(f.code, f.span.line, f.span.column, f.related[0].span.line) for f in findings]
    assert sorted(places) == [("HX004", 5, 3, 3), ("HX004", 6, 1, 1)]


@pytest.mark.parametrize("key", ["1", "true", "~", "1.5", "? [a, b]\n", "? {a: b}\n"])
def test_keys_are_text(key: str) -> None:
    source, findings = read(f"{key}: 2\nok: 3\n")
    assert source.data == {"ok": 3}
    assert [(f.code, f.span.line) for f in findings] == [("HX005", 1)]


@pytest.mark.parametrize(
    ("text", "code", "line", "column"),
    [
        ("a: [1, 2", "HX003", 1, 9),
        ("a: 1\n\tb: 2", "HX003", 2, 1),
        ("a: 1\nb: c: d", "HX003", 2, 5),
        ('a: 1\nb: "open\nc: 2\n', "HX003", 2, 4),
        ("a: *missing", "HX003", 1, 4),
        ("a: &x 1\nb: &x 2", "HX003", 2, 4),
        ("a: 1\nb: \x02", "HX002", 2, 4),
        ("a: 1\n---\nb: 2", "HX007", 3, 1),
        ("- a\n", "HX006", 1, 1),
        ("word", "HX006", 1, 1),
        ("", "HX006", 1, 1),
        ("# only a comment\n", "HX006", 1, 1),
        ('a: "\\U00110000"', "HX003", 1, 1),
        ("a: " + "[" * 4000, "HX003", 1, 1),
    ],
)
def test_texts_that_are_no_deployment_file(text: str, code: str, line: int, column: int) -> None:
    finding = fails(text)
    assert (finding.code, finding.span.line, finding.span.column) == (code, line, column)
    assert "\t" not in finding.message


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("&x [*x]", "HX009"),
        ("{<<: 3}", "HX009"),
        ("!python/object:os.system 1", "HX008"),
        ("!!int two", "HX008"),
        ("!mine {a: 1}", "HX008"),
        ("9" * 5000, "HX104"),
        ('"\\ud800"', "HX002"),
    ],
)
def test_values_that_cannot_be_read(value: str, code: str) -> None:
    source, findings = read(f"before: 1\nkey: {value}\n")
    assert source.data["before"] == 1
    assert [(f.code, f.span.line) for f in findings] == [(code, 2)]


def test_escapes_as_json_writes_them_are_characters() -> None:
    source, findings = read('{"\\ud83d\\ude00": "a\\ud83d\\ude00b", "c": "\\ude00\\ud83d"}')
    assert source.data == {"\N{GRINNING FACE}": "a\N{GRINNING FACE}b", "c": "\ufffd\ufffd"}
    assert [f.code for f in findings] == ["HX002"]


def test_alias_bombs_are_bounded() -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert fails("\n".join(["l0: &l0 [1]", *levels])).code == "HX009"


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "deploy.yaml").write_text("a: 1")
    (tmp_path / "latin.yaml").write_bytes("a: 1\nb: é".encode("latin-1"))
    (tmp_path / "big.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    found = {name: load(tmp_path / name) for name in ("", "latin.yaml", "big.yaml", "deplyo.yaml", "no/such.yaml")}
    assert all(source is None for source, _ in found.values())
    codes = {name: findings[0].code for name, (_, findings) in found.items()}
    assert codes == {
        "": "HX001",
        "latin.yaml": "HX002",
        "big.yaml": "HX001",
        "deplyo.yaml": "HX001",
        "no/such.yaml": "HX001",
    }
    assert (found["latin.yaml"][1][0].span.line, found["latin.yaml"][1][0].span.column) == (2, 4)
    assert "deploy.yaml" in str(found["deplyo.yaml"][1][0].help)


def test_the_data_is_what_another_reader_sees() -> None:
    """On text, integers, lists and mappings YAML 1.1 and 1.2 agree."""
    chooser = random.Random()

    def tree(depth: int) -> Any:
        kind = chooser.randrange(4 if depth else 2)
        if kind == 0:
            return chooser.randrange(10**9)
        if kind == 1:
            return "".join(chooser.choices("abc é'\"#:-{}[],&*!|>%@`\t\n", k=chooser.randrange(12)))
        if kind == 2:
            return [tree(depth - 1) for _ in range(chooser.randrange(4))]
        return {f"k{n}": tree(depth - 1) for n in range(chooser.randrange(4))}

    for _ in range(30):
        data = {"root": tree(3)}
        text = yaml.safe_dump(data, allow_unicode=True, default_flow_style=chooser.choice([True, False, None]))
        source, findings = read(text)
        assert not findings, text
        assert source.data == data, text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*"ab:-[]{}&*!|>%@#'\",? \t\n", "<<", "1", "\r\n", "é", "---", "..."]), max_size=30))
def test_no_text_makes_the_reader_fail(pieces: list[str]) -> None:
    source, findings = parse_yaml("f.yaml", "".join(pieces))
    assert source is not None or findings
    if source is not None:
        assert all(span.value.line >= 1 and span.value.column >= 1 for span in source.spans.values())
