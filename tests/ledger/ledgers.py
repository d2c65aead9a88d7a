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
from depots import open_engine, take
from postgresql import Database

from parts import dump, sqlite_of
from stationkey.ledger import Ledger

pytest_plugins = ["depots"]


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


class PostgresqlPlace:
    """A database of a site with one shard, which this daemon holds."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder
        self._shard = take(database)

    def open(self) -> Ledger:
        return Ledger.on(open_engine(self._database, self._folder, shard=self._shard))

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        return self._database.admin(statement)

    def rows(self) -> list[str]:
        tables = ("key", "secret", "answer", "event", "rejection")
        queries = [f"SELECT '{table} ' || r::text FROM {table} AS r" for table in tables]
        queries.append("SELECT 'meta ' || r::text FROM meta AS r WHERE name != 'running'")
        return sorted(str(row) for (row,) in self.execute(" UNION ALL ".join(queries)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite3"


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, path: Path) -> Place:
    if request.param == "sqlite":
        return SqlitePlace(path)
    return PostgresqlPlace(request.getfixturevalue("depot"), path.parent)  # only these tests start a server


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
