"""Running time, and what it ends: keys whose time is over, records of no more use, traces of private parts."""

from __future__ import annotations

from typing import Final

from stationkey.ledger.database import Database
from stationkey.ledger.lifecycle import KeyState
from stationkey.ledger.migrations import LIVING

_BATCH: Final = 25
"""How many keys or answers one step of cleaning up takes: a request waits for no more than one step."""

_DUE: Final = 100
"""How many keys whose time is over are named at a time."""


class Retention:
    """What ends by itself, and what is cleaned up after it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def running(self) -> int:
        """How long the daemon has run with this ledger, all its runs together, in milliseconds, as last written down.

        Keys expire by this and not by the clock: a station's clock may be hours or years off until it has been set.
        """
        with self._database.reading() as sql:
            row = sql.execute("SELECT value FROM meta WHERE name = 'running'").fetchone()
        return 0 if row is None else int(row[0])

    def write_running(self, milliseconds: int) -> None:
        """Write down the running time. It never goes back."""
        with self._database.transaction() as sql:
            sql.execute(
                "INSERT INTO meta (name, value) VALUES ('running', ?)"
                " ON CONFLICT (name) DO UPDATE SET value = max(CAST(value AS INTEGER), ?)",
                (str(milliseconds), milliseconds),
            )

    def adopt(self, *, pending_due: int, grace_due: int) -> None:
        """Give an end to pending and deactivated keys that have none: of an older ledger, or retired by hand.

        A key made ahead is not pending, and was given its end when it was made.
        """
        with self._database.transaction() as sql:
            sql.executemany(
                f"UPDATE key SET due = ? WHERE due IS NULL AND state = ? AND certificate_type > '' AND {LIVING}",  # noqa: S608 - `LIVING` is this package's own text
                [(pending_due, KeyState.PRE_ACTIVATION), (grace_due, KeyState.DEACTIVATED)],
            )

    def due(self, running: int) -> list[str]:
        """The keys whose time is over."""
        with self._database.reading() as sql:
            rows = sql.execute(
                f"SELECT key_id FROM key WHERE due <= ? AND {LIVING} ORDER BY due LIMIT ?",  # noqa: S608 - `LIVING` is this package's own text
                (running, _DUE),
            ).fetchall()
        return [row[0] for row in rows]

    def is_due(self, key_id: str, running: int) -> bool:
        """Whether a key's time is over: another event may have changed that since `due` said so."""
        with self._database.reading() as sql:
            row = sql.execute("SELECT 1 FROM key WHERE key_id = ? AND due <= ?", (key_id, running)).fetchone()
        return row is not None

    def next_due(self) -> int | None:
        """When the next key's time is over, in milliseconds of running time; None where there is none."""
        with self._database.reading() as sql:
            row = sql.execute(f"SELECT min(due) FROM key WHERE {LIVING}").fetchone()  # noqa: S608 - `LIVING` is this package's own text
        return None if row[0] is None else int(row[0])

    def forget(self, *, keep: int, answered_before: int) -> int:
        """Take off the record what is of no use any more, a batch at a time.

        Args:
            keep: how many destroyed keys stay on record, the youngest; the others go with their answers and events.
            answered_before: answers given before this, in milliseconds of running time, go too, unless their key is
                still pending: nobody asks again for so long.

        Returns:
            How many keys and answers were taken off; call again until it is none.
        """
        with self._database.transaction() as sql:
            answers = sql.execute(
                "DELETE FROM answer WHERE key_number IN (SELECT key_number FROM answer JOIN key ON number = key_number"
                " WHERE delivered IN (0, 1) AND running < ? AND state != ? LIMIT ?)",
                (answered_before, KeyState.PRE_ACTIVATION, _BATCH),
            ).rowcount
            # `ended` has no gaps, and so nothing has to be counted.
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
        """Write the private parts anew, if a key was destroyed since the last time, so that no trace of one is left.

        secure_delete zeroes what is deleted where it is. But where rows were moved from page to page before, SQLite may
        leave pieces of them in the unused part of a page. So the table is emptied, which zeroes all of its pages, and
        filled again with the keys that live: what that costs goes by their number and not by the history.

        Returns:
            Whether there was something to do.
        """
        with self._database.reading() as sql:
            if sql.execute("SELECT 1 FROM meta WHERE name = 'unwiped'").fetchone() is None:
                return False
        with self._database.transaction() as sql:
            living = sql.execute("SELECT key_number, private FROM secret").fetchall()
            # No WHERE, no foreign key, no trigger: so SQLite frees the pages as they are, each zeroed, and does not
            # go from row to row.
            sql.execute("DELETE FROM secret")
            sql.executemany("INSERT INTO secret (key_number, private) VALUES (?, ?)", living)
            sql.execute("DELETE FROM meta WHERE name = 'unwiped'")
        self._database.checkpoint()
        return True
