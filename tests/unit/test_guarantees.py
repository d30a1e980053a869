"""`docs/guarantees.md` names tests that exist, and leaves no known loss out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()

QUOTED = re.compile(r"`([^`]+)`")
LOSSES = 30


@cache
def functions_of(path: Path) -> frozenset[str]:
    """Names of all functions of a file."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))


def named_tests() -> Iterator[tuple[str, str]]:
    """File pattern and function (or nothing) of each test that the page names; `::name` stands
    for a function of the file named before it."""
    pattern = ""
    for quoted in QUOTED.findall(PAGE):
        file, _, function = quoted.partition("::")
        if file.startswith("tests/"):
            pattern = file
        elif file or not function:
            continue
        yield pattern, function


def test_every_test_that_the_page_names_exists() -> None:
    named = list(named_tests())
    assert len(named) > 2 * LOSSES
    for pattern, function in named:
        files = list(ROOT.glob(pattern))
        assert files, f"docs/guarantees.md names {pattern}: there is no such file"
        if function:
            assert any(function in functions_of(file) for file in files), (
                f"docs/guarantees.md names {pattern}::{function}: there is no such function"
            )


def test_every_invariant_that_the_page_names_exists() -> None:
    named = {
        text.removeprefix("checkers.")
        for text in QUOTED.findall(PAGE)
        if text.startswith("checkers.")
    }
    assert named
    assert named - functions_of(ROOT / "chaos" / "checkers.py") == set()


def test_every_known_loss_has_a_row_with_a_test_or_says_why_not() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0]) for row in rows] == list(range(1, LOSSES + 1))
    for number, _, here, test in rows:
        excused = "does not apply" in here or "not yet" in here
        assert "`" in test or excused, f"row {number.strip()} has neither a test nor a reason"
