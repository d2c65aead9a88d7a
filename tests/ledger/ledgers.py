"""Ledgers for the tests of the ledger.

A test that is true of every engine takes `ledger`, or `place` to open it again, beside itself, or to look behind it.
One of SQLite's own takes `sqlite_ledger` or `path`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import pytest

from parts import dump, sqlite_of
from stationkey.ledger import Ledger


class Place(Protocol):
    """Where the ledger of a test is."""

    def open(self) -> Ledger:
        """Open it, also beside one that is open."""

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Execute a statement behind the ledger's back, and commit; its rows."""

    def rows(self) -> list[str]:
        """All that is in it, but for the running time."""


class SqlitePlace:
    """A database file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> Ledger:
        return Ledger(self._path)

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self._path)) as connection, connection:
            return connection.execute(statement).fetchall()

    def rows(self) -> list[str]:
        return dump(self._path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite3"


@pytest.fixture(params=["sqlite"])
def place(request: pytest.FixtureRequest, path: Path) -> Place:
    assert request.param == "sqlite"
    return SqlitePlace(path)


@pytest.fixture
def ledger(place: Place) -> Iterator[Ledger]:
    with closing(place.open()) as opened:
        yield opened


@pytest.fixture
def sqlite_ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger(path)) as opened:
        yield opened


@pytest.fixture
def fast_ledger(sqlite_ledger: Ledger) -> Ledger:
    """One that does not wait for the disk, for tests of thousands of steps in which no power is lost."""
    sqlite_of(sqlite_ledger)._connection.execute("PRAGMA synchronous=OFF")  # noqa: SLF001 - nobody else should be able to
    return sqlite_ledger
