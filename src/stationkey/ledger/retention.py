"""Running time, expiry of keys, deletion of old records, wiping of private parts."""

from __future__ import annotations

from typing import Final

from stationkey.ledger.database import Database
from stationkey.ledger.lifecycle import KeyState
from stationkey.ledger.migrations import LIVING

_BATCH: Final = 25
"""How many keys and answers one call of `Retention.forget` deletes: a request waits for one call at most."""

_DUE: Final = 100
"""How many expired keys `Retention.due` returns at most."""


class Retention:
    """What expires, and the cleaning up after it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def running(self) -> int:
        """The daemon's running time over all runs with this ledger, in milliseconds, as last written.

        Keys expire by running time: a station's clock may be years off until it is set.
        """
        with self._database.reading() as sql:
            row = sql.execute("SELECT value FROM meta WHERE name = 'running'").fetchone()
        return 0 if row is None else int(row[0])

    def write_running(self, milliseconds: int) -> None:
        """Write the running time, unless a later one is written."""
        with self._database.transaction() as sql:
            sql.execute(
                "INSERT INTO meta (name, value) VALUES ('running', ?)"
                " ON CONFLICT (name) DO UPDATE SET value = max(CAST(value AS INTEGER), ?)",
                (str(milliseconds), milliseconds),
            )

    def adopt(self, *, pending_due: int, grace_due: int) -> None:
        """Set the expiry of pending and deactivated keys that have none: from an older ledger, or retired by a command.

        Args:
            pending_due: for pending keys with an owner, in milliseconds of running time.
            grace_due: for deactivated keys.
        """
        with self._database.transaction() as sql:
            sql.executemany(
                f"UPDATE key SET due = ? WHERE due IS NULL AND state = ? AND certificate_type > '' AND {LIVING}",  # noqa: S608 - `LIVING` is this package's own text
                [(pending_due, KeyState.PRE_ACTIVATION), (grace_due, KeyState.DEACTIVATED)],
            )

    def due(self, running: int) -> list[tuple[str, str]]:
        """Return the ids and certificate types of expired keys, the first to expire first."""
        with self._database.reading() as sql:
            rows = sql.execute(
                f"SELECT key_id, certificate_type FROM key WHERE due <= ? AND {LIVING} ORDER BY due LIMIT ?",  # noqa: S608 - `LIVING` is this package's own text
                (running, _DUE),
            ).fetchall()
        return [(key_id, certificate_type) for key_id, certificate_type in rows]

    def is_due(self, key_id: str, running: int) -> bool:
        """Return whether a key is expired; an event since `due` may have changed that."""
        with self._database.reading() as sql:
            row = sql.execute("SELECT 1 FROM key WHERE key_id = ? AND due <= ?", (key_id, running)).fetchone()
        return row is not None

    def next_due(self) -> int | None:
        """Return the next expiry of a key in milliseconds of running time, or None."""
        with self._database.reading() as sql:
            row = sql.execute(f"SELECT min(due) FROM key WHERE {LIVING}").fetchone()  # noqa: S608 - `LIVING` is this package's own text
        return None if row[0] is None else int(row[0])

    def forget(self, *, keep: int, answered_before: int) -> int:
        """Delete a batch of old records.

        Args:
            keep: how many destroyed keys to keep, the newest; the others are deleted with their answers and events.
            answered_before: delete answers given before this, in milliseconds of running time, unless their key is
                pending; no request is redelivered so late.

        Returns:
            How many keys and answers were deleted; call again until it is 0.
        """
        with self._database.transaction() as sql:
            answers = sql.execute(
                "DELETE FROM answer WHERE key_number IN (SELECT key_number FROM answer JOIN key ON number = key_number"
                " WHERE delivered IN (0, 1) AND running < ? AND state != ? LIMIT ?)",
                (answered_before, KeyState.PRE_ACTIVATION, _BATCH),
            ).rowcount
            # `ended` has no gaps, so this needs no count.
            forgotten = sql.execute(
                "SELECT number FROM key WHERE ended <= (SELECT max(ended) FROM key WHERE ended IS NOT NULL) - ?"
                " ORDER BY ended LIMIT ?",
                (keep, _BATCH),
            ).fetchall()
            for statement in (
                "DELETE FROM event WHERE key_number = ?",
                "DELETE FROM answer WHERE key_number = ?",
                "DELETE FROM key WHERE number = ?",
            ):
                sql.executemany(statement, forgotten)
        return len(forgotten) + answers

    def wipe(self) -> bool:
        """Rewrite the private parts if a key was destroyed since the last call, so that no trace of it is left.

        secure_delete zeroes a deleted row where it is. But when SQLite moved the row between pages before, pieces of it
        may be left in the unused part of a page. So the table is emptied, which zeroes all its pages, and filled again:
        the cost depends on the number of living keys, not on the history.

        Returns:
            Whether a key was destroyed since the last call.
        """
        with self._database.reading() as sql:
            if sql.execute("SELECT 1 FROM meta WHERE name = 'unwiped'").fetchone() is None:
                return False
        with self._database.transaction() as sql:
            living = sql.execute("SELECT key_number, private FROM secret").fetchall()
            # Without WHERE, foreign key and trigger SQLite frees and zeroes whole pages, not row by row.
            sql.execute("DELETE FROM secret")
            sql.executemany("INSERT INTO secret (key_number, private) VALUES (?, ?)", living)
            sql.execute("DELETE FROM meta WHERE name = 'unwiped'")
        self._database.checkpoint()
        return True
