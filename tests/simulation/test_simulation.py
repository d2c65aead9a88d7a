"""Two thousand seeds break no truth; a seed is always the same run; what is found is shrunk."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from simulation.processes import outcomes, simulate

SEEDS: Final = 2000
PART: Final = 125


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_no_seed_breaks_a_truth(folder: Path, first: int) -> None:
    found = outcomes(folder, first, PART)
    assert [one for one in found if one["broken"]] == []
    assert len(found) == PART
    assert sum(one["steps"] for one in found) > PART * 250


def test_a_seed_is_the_same_run_whenever_and_after_whatever_it_is_run(folder: Path) -> None:
    alone = [outcomes(folder, seed, 1) for seed in (7, 8, 9)]
    assert [one for (one,) in alone] == outcomes(folder, 5, 5)[2:]


def test_what_is_found_is_replayed_and_shrunk(folder: Path) -> None:
    *_, found = outcomes(folder, 0, 100, "--mutant", "no-fsync")
    said = simulate(folder, "--seed", found["seed"], "--mutant", "no-fsync")
    assert said.endswith(f"{found['broken']}: {said.rpartition(found['broken'] + ': ')[2]}")
    replayed, _, shrunk = said.partition(f"seed {found['seed']}, step {found['steps']}: {found['words']}\n")
    before, after = (text.count(" step ") for text in (replayed, shrunk))
    assert 0 < after < before
