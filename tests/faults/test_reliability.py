"""``docs/reliability.md`` names every fault that tests cause, and no test that does not exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = (HERE.parent.parent / "docs" / "reliability.md").read_text()


def _tests_of(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def _tests_in(directory: Path) -> set[str]:
    return {name for path in directory.rglob("test_*.py") if path != Path(__file__) for name in _tests_of(path)}


def test_the_document_on_reliability_names_the_tests_that_there_are() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    assert _tests_in(HERE) - named == set()
    for name in ("kills", "faults"):
        assert _tests_of(HERE.parent / f"site_faults/test_site_{name}.py") - named == set()
    assert named - _tests_in(HERE.parent) == set()
