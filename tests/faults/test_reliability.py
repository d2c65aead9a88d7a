"""``docs/reliability.md`` names every test of this directory, and no test that does not exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = (HERE.parent.parent / "docs" / "reliability.md").read_text()


def _tests_in(directory: Path) -> set[str]:
    return {
        node.name
        for path in directory.rglob("test_*.py")
        if path != Path(__file__)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def test_the_document_on_reliability_names_the_tests_that_there_are() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    assert _tests_in(HERE) - named == set()
    assert named - _tests_in(HERE.parent) == set()
