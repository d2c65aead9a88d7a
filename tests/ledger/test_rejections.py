"""Rejections: noted in memory, written in batches."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from ledgers import Place, SqlitePlace
from recording import (
    answer,
)

from parts import sqlite_of
from stationkey.errors import LedgerError
from stationkey.ledger import Ledger

pytest_plugins = ["ledgers"]


def note(ledger: Ledger, *names: str) -> None:
    for name in names:
        ledger.rejections.note(name, reason="r", message="m", now=0)


def rejected(place: Place) -> list[str]:
    """Whose rejections are on disk."""
    return [row[0] for row in place.execute("SELECT request_id FROM rejection ORDER BY seq")]


def test_a_rejection_is_noted_at_once_and_written_with_the_others(ledger: Ledger, place: Place) -> None:
    note(ledger, "a", "b")
    answer(ledger)
    assert rejected(place) == []
    assert not ledger.rejections.write()
    assert rejected(place) == ["a", "b"]
    assert not ledger.rejections.write()
    note(ledger, "c")
    ledger.close()
    assert rejected(place) == ["a", "b", "c"]


def test_one_step_of_writing_rejections_is_small(ledger: Ledger, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stationkey.ledger.rejections._PART", 2)
    note(ledger, *"abcde")
    assert [ledger.rejections.write() for _ in range(3)] == [True, True, False]
    assert rejected(place) == list("abcde")


def test_of_rejections_the_newest_are_kept_in_memory_and_on_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stationkey.ledger.rejections.MAX_REJECTIONS", 3)
    with closing(place.open()) as ledger:
        note(ledger, *"abcde")
        ledger.rejections.write()
        assert rejected(place) == list("cde")
        note(ledger, *"fg")
        ledger.rejections.write()
        assert rejected(place) == list("efg")


def test_rejections_that_cannot_be_written_are_kept_and_the_oldest_make_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = SqlitePlace(path)
    monkeypatch.setattr("stationkey.ledger.rejections.MAX_REJECTIONS", 4)
    with closing(Ledger(path)) as ledger:
        note(ledger, *"ab")
        with closing(sqlite3.connect(path)) as other:
            sqlite_of(ledger)._connection.execute("PRAGMA busy_timeout=0")  # noqa: SLF001 - or it would be waited for
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerError) as failure:
                ledger.rejections.write()
            assert failure.value.reason == "ledger_busy"
            note(ledger, *"cde")
            with pytest.raises(LedgerError):
                ledger.rejections.write()
        ledger.rejections.write()
        assert rejected(place) == list("bcde")


def test_a_ledger_that_takes_no_rejections_any_more_is_closed_all_the_same(sqlite_ledger: Ledger, path: Path) -> None:
    place, ledger = SqlitePlace(path), sqlite_ledger
    note(ledger, "a")
    with closing(sqlite3.connect(path)) as other:
        sqlite_of(ledger)._connection.execute("PRAGMA busy_timeout=0")  # noqa: SLF001 - or it would be waited for
        other.execute("BEGIN IMMEDIATE")
        ledger.close()
    assert rejected(place) == []
