"""The threat model and the checklist name tests that exist, and every test of this directory is named in the former."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from named_tests import names_in

TESTS = Path(__file__).parent.parent
DOCS = TESTS.parent / "docs"
THREAT_MODEL = (DOCS / "threat-model.md").read_text()


@pytest.mark.parametrize("name", ["threat-model.md", "security-checklist.md"])
def test_every_test_that_a_document_names_is_there(name: str) -> None:
    named = set(re.findall(r"`(test_\w+)`", (DOCS / name).read_text()))

    assert len(named) > 20
    assert sorted(named - names_in(TESTS)) == []


def test_no_promise_is_without_a_test() -> None:
    """Each row of the tables of promises has one, in its last column."""
    tables = re.findall(r"^\| (?:Promise|When) .*\n\|[-|]+\n((?:\|.*\n)+)", THREAT_MODEL, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]

    assert len(rows) > 40
    assert [row for row in rows if not re.fullmatch(r"\|.*\| (`test_\w+`(?: |\|))+\|?", row)] == []


@pytest.mark.parametrize("attacker", re.findall(r"\[[^\]]+\]\((#[a-z-]+)\) \|$", THREAT_MODEL, re.MULTILINE))
def test_every_attacker_has_a_section_that_says_what_is_not_promised_or_what_to_do(attacker: str) -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"): heading
        for heading in re.findall(r"^## (.+)$", THREAT_MODEL, re.MULTILINE)
    }
    section = THREAT_MODEL.partition(f"## {headings[attacker[1:]]}\n")[2].partition("\n## ")[0]

    assert "promised" in section
    assert "**Not promised.**" in section or "**Nothing" in section
