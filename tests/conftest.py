"""For all tests: a seed, no output format guessed from CI, and the planted bugs listed in the terminal summary."""

from __future__ import annotations

import random

import pytest


@pytest.fixture(autouse=True)
def not_on_github(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under GitHub Actions `check` prints annotations; tests of its text must not depend on where they run."""
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)


@pytest.fixture
def seed() -> int:
    """Another one each run, shown where a test fails."""
    value = random.randrange(1 << 30)
    print("seed", value)
    return value


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the planted bugs among the tests that ran."""
    reports = [
        (outcome, dict(report.user_properties))
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if getattr(report, "when", None) == "call"
    ]
    planted = [(outcome, found) for outcome, found in reports if "planted" in found]
    if not planted:
        return
    terminalreporter.section("planted bugs")
    for outcome, found in planted:
        mark = "named " if outcome == "passed" else "MISSED"
        terminalreporter.write_line(f"{mark} {found['planted']}: {found['named by']}")
    named = sum(outcome == "passed" for outcome, _ in planted)
    terminalreporter.write_line(f"{named} of {len(planted)} planted bugs named ({named / len(planted):.0%})")
