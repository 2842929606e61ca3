"""docs/reliability/peer-bugs.md names a test for each bug of another trainer: it exists, and plants the bug."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability" / "peer-bugs.md").read_text()
TESTS = ROOT / "tests" / "unit" / "trainer"
PLACED = re.compile(r"`((?:unit|integration)/[\w/]+\.py)::(test_\w+)`")
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def rows(page: str) -> list[str]:
    """Return the rows of the tables of bugs that have a test."""
    tables = page.partition("## Objectives against")[0]
    return [
        line for line in tables.splitlines() if line.startswith("| ") and not line.startswith("| bug (trainer, issues)")
    ]


def functions(file: Path) -> dict[str, str]:
    """Return the source of each function of a file; nothing where there is no such file."""
    tree = ast.parse(file.read_text() if file.exists() else "")
    return {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)}


def planting(file: Path) -> set[str]:
    """Return the tests of a file in which a check is expected to fail."""
    return {name for name, source in functions(file).items() if "pytest.raises(AssertionError)" in source}


def faults(page: str) -> list[str]:
    """Return what is wrong with the tables."""
    found: list[str] = []
    for row in rows(page):
        names = NAMED.findall(row)
        if not names:
            found.append(f"no test: {row}")
        for file, name in names:
            if name not in planting(TESTS / file):
                found.append(f"{file}::{name} is no test that plants a bug")
    placed = PLACED.findall(page)
    return found + [
        f"{file}::{name} is no test" for file, name in placed if name not in functions(ROOT / "tests" / file)
    ]


def test_each_bug_has_a_test_that_plants_it() -> None:
    assert len(rows(PAGE)) > 30
    assert len(PLACED.findall(PAGE)) > 15
    assert faults(PAGE) == []


def test_each_test_of_a_peers_bug_stands_in_the_tables() -> None:
    named = set(NAMED.findall(PAGE))
    files = sorted(TESTS.glob("test_peer_bugs_of_*.py"))
    assert {(file.name, test) for file in files for test in planting(file)} <= named


@pytest.mark.parametrize(
    "row",
    [
        "| D #1 | did something | no test |",
        "| D #1 | did something | `test_stepping.py::test_that_is_not_there` |",
        "| D #1 | did something | `test_nothing.py::test_that_is_not_there` |",
        "| D #1 | did something | `test_stepping.py::test_the_average_follows_every_step` |",
        "## Objectives against\n| Prior loss | `unit/trainer/test_data_prior.py::test_that_is_not_there` |",
    ],
)
def test_a_planted_row_without_a_test_is_found(row: str) -> None:
    assert faults(row)
