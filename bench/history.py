"""Fills a ledger with keys that were, without making them: a key that is on record is copied row by row."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

KEPT: Final = frozenset({"key_id", "canonical_id", "request_id", "public", "message_id"})
"""Columns that tell one key or request from another."""
NUMBER: Final = "seq"
"""What SQLite numbers by itself."""


def fill(database: Path, key_id: str, count: int) -> None:
    """Copy a destroyed key, with its answer and its events, until there are `count` of it, in one transaction.

    What the columns are is asked of the database, so that this need not know which version of the schema it is.

    Args:
        database: the ledger; no daemon runs on it.
        key_id: the key to copy.
        count: keys on record like it, itself included.
    """
    with closing(sqlite3.connect(database)) as connection, connection:
        for table in ("key", "answer", "event"):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})") if row[1] != NUMBER]
            names = ", ".join(columns)
            rows = connection.execute(
                f"SELECT {names} FROM {table} WHERE key_id = ?",  # noqa: S608 - the names are the database's own
                (key_id,),
            ).fetchall()
            connection.executemany(
                f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(columns))})",  # noqa: S608 - same
                (
                    tuple(_changed(column, value, number) for column, value in zip(columns, row, strict=True))
                    for number in range(1, count)
                    for row in rows
                ),
            )


def _changed(column: str, value: object, number: int) -> object:
    """A value of copy `number`: of the same length, so that the copy takes the same room on disk."""
    if column not in KEPT or value is None:
        return value
    if isinstance(value, bytes):
        return value[:-4] + number.to_bytes(4, "big")
    text = str(value)
    return f"{text[:-8]}{number:08x}"
