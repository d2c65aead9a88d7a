"""Fill a ledger with keys without making them: a key that is on record is copied row by row."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyEvent

NAMES: Final = frozenset({"key_id", "canonical_id", "request_id", "public", "message_id"})
"""Columns that tell one key or request from another."""
COUNTED: Final = frozenset({"number", "key_number", "ended"})
"""Columns that count keys; see `stationkey.ledger.migrations`."""
EVENTS: Final = frozenset({"seq", "asked", "installed", "deleted"})
"""Columns that count events."""


def fill_with_destroyed(database: Path, count: int) -> None:
    """Destroy the only key of a ledger, and copy it until there are `count` of it."""
    with closing(Ledger(database)) as ledger:
        (key,) = ledger.keys.all()
        ledger.transitions.apply(key.key_id, KeyEvent.EXPIRED, reason="its period has ended", now=key.created_at)
    fill(database, key.key_id, count)


def fill(database: Path, key_id: str, count: int) -> None:
    """Copy a key, with its answer, events and private part if it has one, until there are `count` of it.

    Args:
        database: the ledger; no daemon runs on it.
        key_id: the key to copy, the youngest on record.
        count: keys on record like it, itself included.
    """
    with closing(sqlite3.connect(database)) as connection, connection:
        (key,) = connection.execute("SELECT number FROM key WHERE key_id = ?", (key_id,)).fetchone()
        (events,) = connection.execute("SELECT count(*) FROM event WHERE key_number = ?", (key,)).fetchone()
        for table in ("key", "secret", "answer", "event"):
            name = "number" if table == "key" else "key_number"
            cursor = connection.execute(f"SELECT * FROM {table} WHERE {name} = ?", (key,))  # noqa: S608 - names of ours
            columns = [column[0] for column in cursor.description]
            rows = cursor.fetchall()
            connection.executemany(
                f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})",  # noqa: S608 - same
                (
                    tuple(_changed(column, value, copy, events) for column, value in zip(columns, row, strict=True))
                    for copy in range(1, count)
                    for row in rows
                ),
            )


def _changed(column: str, value: object, copy: int, events: int) -> object:
    """Return a value of a copy. A name keeps its length, so that the copy takes the same room on disk."""
    if isinstance(value, int):
        return value + copy * (column in COUNTED) + copy * events * (column in EVENTS)
    if column not in NAMES or value is None:
        return value
    if isinstance(value, bytes):
        return value[:-4] + copy.to_bytes(4, "big")
    text = str(value)
    return f"{text[:-8]}{copy:08x}"
