"""Each planted fault is found, and ``docs/reliability.md`` says by how many seeds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from simulation.mutants import MUTANTS
from simulation.processes import outcomes

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "reliability.md"
MOST: Final = 500
"""Seeds in which each must be found; in how many it was is in the document."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_found(folder: Path, name: str) -> None:
    *_, last = outcomes(folder, 0, MOST, "--mutant", name)
    assert last["broken"]
    print(f"| `{name}` | {MUTANTS[name].words} | {last['seed'] + 1} | {last['broken']} |")  # noqa: T201 - a row of the table


def test_the_document_names_each_planted_fault() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (.+) \| (\d+) \| .+ \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert {name: words for name, words, _ in rows} == {name: mutant.words for name, mutant in MUTANTS.items()}
    assert all(int(seeds) <= MOST for _, _, seeds in rows)
