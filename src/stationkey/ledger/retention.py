"""Running time, expiry of keys, deletion of old records, wiping of private parts."""

from __future__ import annotations

from typing import Final, NamedTuple

from stationkey.ledger.engine import Engine, Sql
from stationkey.ledger.lifecycle import KeyState
from stationkey.ledger.migrations import LIVING

_BATCH: Final = 25
"""How many keys and answers one call of `Retention.forget` deletes: a request waits for one call at most."""

_DUE: Final = 100
"""How many expired keys `Retention.due` returns at most."""

_STATIONS: Final = 500
"""How many stations one call of `Retention.forget` looks at: a few microseconds for each."""

MAX_OF_NEW_STATIONS: Final = 50_000
"""Pending keys of stations without an active key: more than a shard's stations need when all are commissioned at once.
Whoever may publish for any station can make up their names."""

_CROWDED: Final = (
    "SELECT number FROM key AS pending WHERE state = ? AND pending.station > '' AND due > ?"  # noqa: S608 - `LIVING` is this package's own text
    f" AND {LIVING}{{mine}} AND NOT EXISTS (SELECT 1 FROM key WHERE state = ? AND key.station = pending.station"
    f" AND key.{LIVING}) ORDER BY asked DESC LIMIT ? OFFSET ?"
)

_HISTORIES: Final = (
    "WITH RECURSIVE walk (station, place) AS ("
    " SELECT (SELECT min(station) FROM key WHERE ended IS NOT NULL AND station >= :first), 1 UNION ALL"
    " SELECT (SELECT min(station) FROM key WHERE ended IS NOT NULL AND station > walk.station), place + 1"
    " FROM walk WHERE walk.station IS NOT NULL AND place < :limit)"
    " SELECT station, (SELECT min(ended) FROM key WHERE ended IS NOT NULL AND key.station = walk.station),"
    " (SELECT max(ended) FROM key WHERE ended IS NOT NULL AND key.station = walk.station)"
    " FROM walk WHERE station IS NOT NULL ORDER BY place"
)
"""Two steps in the index `key_ended` for each station, however long its history is."""

_EVERY: Final = 1_000_000_000


class History(NamedTuple):
    """The destroyed keys of a station; `ended` of the first and the last. There are no gaps."""

    station: str
    oldest: int
    newest: int


def histories(sql: Sql, *, first: str = "", limit: int = _EVERY) -> list[History]:
    """Return the stations with destroyed keys, by name, whoever serves them.

    Args:
        sql: in a transaction or outside.
        first: begin with this station.
        limit: how many to return at most.
    """
    return [History(*row) for row in sql.execute(_HISTORIES, {"first": first, "limit": limit}).fetchall()]


class Retention:
    """What expires, and the cleaning up after it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._next = ""

    @property
    def running(self) -> int:
        """The daemon's running time over all runs with this ledger, in milliseconds, as last written.

        Keys expire by running time: a station's clock may be years off until it is set.
        """
        with self._engine.reading() as sql:
            row = sql.execute("SELECT value FROM meta WHERE name = 'running'").fetchone()
        return 0 if row is None else int(row[0])

    def write_running(self, milliseconds: int) -> None:
        """Write the running time, unless a later one is written."""
        with self._engine.transaction() as sql:
            sql.execute(
                "INSERT INTO meta (name, value) VALUES ('running', ?)"
                " ON CONFLICT (name) DO UPDATE SET value = excluded.value"
                " WHERE CAST(meta.value AS BIGINT) < CAST(excluded.value AS BIGINT)",
                (str(milliseconds),),
            )

    def adopt(self, *, pending_due: int, grace_due: int) -> None:
        """Set the expiry of pending and deactivated keys that have none: from an older ledger, or retired by a command.

        Args:
            pending_due: for pending keys with an owner, in milliseconds of running time.
            grace_due: for deactivated keys.
        """
        with self._engine.transaction() as sql:
            sql.executemany(
                "UPDATE key SET due = ? WHERE due IS NULL AND state = ?"  # noqa: S608 - this package's own text
                f" AND certificate_type > '' AND {LIVING}{sql.mine('key')}",
                [(pending_due, KeyState.PRE_ACTIVATION), (grace_due, KeyState.DEACTIVATED)],
            )

    def crowd_out(self, running: int) -> int:
        """Let the oldest pending keys beyond `MAX_OF_NEW_STATIONS` expire now, some at a time.

        Args:
            running: running time in milliseconds.

        Returns:
            How many expire.
        """
        with self._engine.reading() as sql:
            crowded = sql.execute(
                _CROWDED.format(mine=sql.mine("pending")),
                (KeyState.PRE_ACTIVATION, running, KeyState.ACTIVE, _DUE, MAX_OF_NEW_STATIONS),
            ).fetchall()
        if crowded:
            with self._engine.transaction() as sql:
                sql.executemany("UPDATE key SET due = ? WHERE number = ?", [(running, number) for (number,) in crowded])
        return len(crowded)

    def due(self, running: int) -> list[tuple[str, str, str]]:
        """Return id, certificate type and station of the expired keys, the first to expire first."""
        with self._engine.reading() as sql:
            rows = sql.execute(
                "SELECT key_id, certificate_type, station FROM key"  # noqa: S608 - this package's own text
                f" WHERE due <= ? AND {LIVING}{sql.mine('key')} ORDER BY due LIMIT ?",
                (running, _DUE),
            ).fetchall()
        return [(key_id, certificate_type, station) for key_id, certificate_type, station in rows]

    def is_due(self, key_id: str, running: int) -> bool:
        """Return whether a key is expired; an event since `due` may have changed that."""
        with self._engine.reading() as sql:
            row = sql.execute("SELECT 1 FROM key WHERE key_id = ? AND due <= ?", (key_id, running)).fetchone()
        return row is not None

    def next_due(self) -> int | None:
        """Return the next expiry of a key in milliseconds of running time, or None."""
        with self._engine.reading() as sql:
            row = sql.execute(f"SELECT min(due) FROM key WHERE {LIVING}{sql.mine('key')}").fetchone()  # noqa: S608 - `LIVING` is this package's own text
        return None if row[0] is None else int(row[0])

    def forget(self, *, keep: int, answered_before: int) -> int:
        """Delete a batch of old records.

        Args:
            keep: how many destroyed keys of each station to keep, the newest; the others are deleted with their answers
                and events. A call looks at `_STATIONS` stations, the next call at the next ones.
            answered_before: delete answers given before this, in milliseconds of running time, unless their key is
                pending; no request is redelivered so late.

        Returns:
            How many keys and answers were deleted; call again until it is 0.
        """
        with self._engine.transaction() as sql:
            answers = sql.execute(
                "DELETE FROM answer WHERE key_number IN (SELECT key_number FROM answer JOIN key ON number = key_number"  # noqa: S608 - the engine's own text
                f" WHERE delivered IN (0, 1) AND running < ? AND state != ?{sql.mine('answer')} LIMIT ?)",
                (answered_before, KeyState.PRE_ACTIVATION, _BATCH),
            ).rowcount
            *seen, beyond = [*histories(sql, first=self._next, limit=_STATIONS + 1), None][: _STATIONS + 1]
            following = "" if beyond is None else beyond.station
            forgotten: list[tuple[int]] = []
            for one in seen:
                if one is None or one.newest - one.oldest < keep or not self._engine.owns(one.station):
                    continue
                if len(forgotten) == _BATCH:
                    following = one.station
                    break
                forgotten += sql.execute(
                    "SELECT number FROM key WHERE station = ? AND ended <= ? ORDER BY ended LIMIT ?",
                    (one.station, one.newest - keep, _BATCH - len(forgotten)),
                ).fetchall()
            for statement in (
                "DELETE FROM event WHERE key_number = ?",
                "DELETE FROM answer WHERE key_number = ?",
                "DELETE FROM key WHERE number = ?",
            ):
                sql.executemany(statement, forgotten)
        self._next = following
        return len(forgotten) + answers

    def wipe(self) -> bool:
        """Remove the traces of private parts destroyed since the last call; see `Engine.wipe`.

        Returns:
            Whether a key was destroyed since the last call.
        """
        return self._engine.wipe()
