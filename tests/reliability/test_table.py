"""The table of docs/reliability.md and the tests agree."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [
    line
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith(("| fault |", "| input |"))
]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", "\n".join(ROWS))


@functools.cache
def names_in(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_a_rows_tests_are_there(row):
    fault, holds, tests = (cell.strip() for cell in row.strip("|").split("|"))
    assert fault
    assert holds
    named = [cell.strip().strip("`").split("::") for cell in tests.split(",")]
    for path, name in named:
        assert name in names_in(REPOSITORY / path), name


def test_every_test_has_a_row():
    here = Path(__file__).parent
    for path in sorted(here.glob("test_*.py")):
        if path != Path(__file__):
            own = {name for file, name in NAMED if file == f"tests/reliability/{path.name}"}
            assert names_in(path) == own, path.name
