"""Whatever comes: the corpus, and some hundred new inputs each time. `fuzz.py` makes more; see ``make fuzz``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import CORPUS, TARGETS, Target

unhurried = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
"""How fast it is on a busy machine is no part of what these state."""

KEPT = [
    pytest.param(target, path, id=f"{target.name}/{path.name}") for target in TARGETS.values() for path in target.corpus
]


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    """What `targets.check_private_key_path` made is taken away."""
    yield
    targets.close_world()


@pytest.mark.parametrize(("target", "path"), KEPT)
def test_what_was_found_once_holds_for_good(target: Target, path: Path) -> None:
    target.check(path.read_bytes())


@pytest.mark.parametrize("target", [pytest.param(target, id=name) for name, target in TARGETS.items()])
def test_whatever_comes_is_read_or_refused_in_words(target: Target) -> None:
    @unhurried
    @given(target.likely)
    def hold(content: bytes) -> None:
        target.check(content)

    hold()


@unhurried
@given(st.sampled_from(list(TARGETS)), st.binary(max_size=512))
def test_no_bytes_break_a_reader(name: str, content: bytes) -> None:
    TARGETS[name].check(content)


def test_the_corpus_is_small_and_of_known_targets() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)
    assert all(path.stat().st_size <= 72 * 1024 for path in CORPUS.rglob("*"))
    assert len(list(CORPUS.rglob("*"))) < 1000
