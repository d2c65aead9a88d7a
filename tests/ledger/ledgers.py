"""Ledgers for the tests of the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from parts import sqlite_of
from stationkey.ledger import Ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger(path)) as opened:
        yield opened


@pytest.fixture
def fast_ledger(ledger: Ledger) -> Ledger:
    """One that does not wait for the disk, for tests of thousands of steps in which no power is lost."""
    sqlite_of(ledger)._connection.execute("PRAGMA synchronous=OFF")  # noqa: SLF001 - nobody else should be able to
    return ledger
