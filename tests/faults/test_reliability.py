"""``docs/reliability.md`` names every fault that tests cause, and no test that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

from named_tests import names_in, names_of

HERE = Path(__file__).parent
DOCUMENT = (HERE.parent.parent / "docs" / "reliability.md").read_text()


def test_the_document_on_reliability_names_the_tests_that_there_are() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    assert names_in(HERE) - names_of(Path(__file__)) - named == set()
    for name in ("kills", "faults"):
        assert names_of(HERE.parent / f"site_faults/test_site_{name}.py") - named == set()
    assert named - names_in(HERE.parent) == set()
