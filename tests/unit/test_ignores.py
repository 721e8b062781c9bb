"""`# helixc: ignore[HX305] reason`: what it silences, and what is wrong with it."""

from __future__ import annotations

import pytest

from helixc.frontend import analyse_input
from helixc.inputs import Input

HEAD = "model: llama-3.1-8b\nload_format: dummy\n"
LONG = "max_seq_len: 131073"  # HX404, once a role


def codes(text: str) -> list[str]:
    return [d.code for d in analyse_input(Input("f.yaml", text)).diagnostics]


@pytest.mark.parametrize(
    "comment",
    [
        "# helixc: ignore[HX404] measured",
        "#helixc:ignore[hx404] measured",
        "# helixc: ignore[HX404]: measured",
        "# helixc: ignore[ HX404 ] # measured",
    ],
)
def test_a_warning_of_the_line_is_silenced(comment: str) -> None:
    rest = "parallelism: gen\n"
    assert codes(f"{HEAD}{LONG}\n{rest}") == ["HX404"]
    assert codes(f"{HEAD}{LONG} {comment}\n{rest}") == []
    assert codes(f"{HEAD}{comment}\n\n# more\n{LONG}\n{rest}") == []
    assert codes(f"{HEAD}{LONG}\n{comment}\n{rest}") == ["HX404", "HX121"]


def test_several_codes_and_one_of_them_idle() -> None:
    text = f"{HEAD}{LONG} # helixc: ignore[HX404, HX306] measured\nparallelism: gen\n"
    assert codes(text) == ["HX121"]


@pytest.mark.parametrize(
    ("comment", "words"),
    [
        ("# helixc: ignore[HX404]", "reason is missing"),
        ("# helixc: ignore[HX404] -- ", "reason is missing"),
        ("# helixc: ignore HX404 measured", "not understood"),
        ("# helixc: ignore[] measured", "no code"),
        ("# helixc: ignore[HX44] measured", "there is no code HX44"),
        ("# helixc: ignore[HX301] measured", "HX301 is an error"),
        ("# helixc: ignroe[HX404] measured", "not understood"),
    ],
)
def test_a_comment_that_is_not_understood_silences_nothing(comment: str, words: str) -> None:
    analysis = analyse_input(Input("f.yaml", f"{HEAD}{LONG} {comment}\nparallelism: gen\n"))
    assert [d.code for d in analysis.diagnostics] == ["HX404", "HX120"]
    assert words in analysis.diagnostics[1].message
    assert not analysis.ok


def test_errors_are_not_silenced_and_hide_idle_comments() -> None:
    text = f"{HEAD}parallelism: gen tp3 # helixc: ignore[HX305] later\n"
    assert codes(text) == ["HX301", "HX304"]


@pytest.mark.parametrize(
    "line",
    ['model: "a # helixc: ignore[HX404]"', "model: 'a # helixc: no'", "model: a# helixc: no", "# about helixc: no"],
)
def test_only_comments_that_begin_so_count(line: str) -> None:
    assert "HX120" not in codes(f"{line}\nparallelism: gen\n")
