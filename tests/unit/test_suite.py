"""The suite itself: pytest and git both leave out folders by their names, `dist` among them, without a word."""

from __future__ import annotations

import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FOLDERS = [path for path in TESTS.rglob("*") if path.is_dir() and path.name != "__pycache__"]


def test_pytest_enters_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    patterns = pytestconfig.getini("norecursedirs")
    assert [path for path in FOLDERS for pattern in patterns if fnmatch(path.name, pattern)] == []


def test_what_is_sanitized_exists() -> None:
    """pytest fails on a name that it does not find."""
    names = (TESTS / "gpu" / "sanitized.txt").read_text().splitlines()
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_git_ignores_no_test() -> None:
    if shutil.which("git") is None or not (TESTS.parent / ".git").exists():
        pytest.skip("not a git checkout")
    files = [str(path) for path in TESTS.rglob("*.py")]
    command = ["git", "-C", str(TESTS.parent), "check-ignore", "--no-index", *files]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == ""
