"""``docs/reliability.md`` names every test of this directory, and none that does not exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = (HERE.parent.parent / "docs" / "reliability.md").read_text()


def test_the_document_on_reliability_names_the_tests_that_there_are() -> None:
    there = {
        node.name
        for path in HERE.glob("test_*.py")
        if path != Path(__file__)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert set(re.findall(r"\| `(test_\w+)` \|", DOCUMENT)) == there
