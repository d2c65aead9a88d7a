"""``stationkey serve`` that loses power at one named moment: ``crashing_daemon.py MOMENT COUNT [OPTION ...]``.

The function, or the SQL statement, that a moment lies before or after is wrapped; nothing else of the daemon is
touched. The process kills itself with SIGKILL when the moment comes for the COUNT-th time. ``any statement`` is the
moment before each statement that SQLite is given.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from stationkey import cli
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.ledger import Ledger
from stationkey.ledger.answers import Answers
from stationkey.ledger.keys import Keys
from stationkey.ledger.transitions import Transitions
from stationkey.mqtt.connection import MqttConnection
from stationkey.service import requests
from stationkey.service.active_files import ActiveDirectory
from stationkey.service.pool import KeyPool
from stationkey.system import files

BEFORE: Final = "before"
AFTER: Final = "after"
ANY_STATEMENT: Final = "any statement"

MOMENTS: Final[dict[str, tuple[str, Any, str]]] = {
    # The start.
    "lock taken, no database": (BEFORE, Ledger, "__init__"),
    "database file made, empty": (BEFORE, "sql", "PRAGMA quick_check"),
    "database opened for writing": (BEFORE, "sql", "PRAGMA journal_mode=WAL"),
    "database in WAL mode, no tables": (BEFORE, "sql", "BEGIN IMMEDIATE"),
    "tables of version 1 written, not committed": (BEFORE, "sql", "PRAGMA user_version=1"),
    "tables of version 1 made": (BEFORE, "sql", "ALTER TABLE key ADD COLUMN due"),
    "tables of version 2 written, not committed": (AFTER, "sql", "PRAGMA user_version=2"),
    "tables of version 2 made": (BEFORE, "sql", "ALTER TABLE key RENAME TO key_2"),
    "tables of version 3 written, not committed": (AFTER, "sql", "PRAGMA user_version=3"),
    "tables of version 3 made": (BEFORE, "sql", "ALTER TABLE key ADD COLUMN root"),
    "tables of version 4 written, not committed": (AFTER, "sql", "PRAGMA user_version=4"),
    "tables of version 5 made": (BEFORE, "sql", "ALTER TABLE key ADD COLUMN station"),
    "tables of version 6 written, not committed": (AFTER, "sql", "PRAGMA user_version=6"),
    "client identifier written": (AFTER, Ledger, "client_id"),
    # A request.
    "request received": (BEFORE, requests.StationKeyService, "answer"),
    "key made": (AFTER, SoftwareKeyStore, "generate"),
    "CSR built": (AFTER, requests, "sign_csr"),
    "key written, answer not": (AFTER, "sql", "INSERT INTO key"),
    "answer written, not committed": (AFTER, "sql", "INSERT INTO event"),
    "committed": (AFTER, Answers, "record"),
    "publishing": (BEFORE, MqttConnection, "publish"),
    "published, not confirmed": (AFTER, MqttConnection, "_send_publish"),
    "confirmed, not noted": (BEFORE, Answers, "mark_delivered"),
    "noted, not acknowledged": (BEFORE, MqttConnection, "acknowledge"),
    "acknowledged": (AFTER, MqttConnection, "acknowledge"),
    # A key made ahead.
    "key made ahead, not written": (BEFORE, Transitions, "make_ahead"),
    "key made ahead written, not committed": (AFTER, "sql", "INSERT INTO secret, INSERT INTO meta"),
    "key made ahead committed": (AFTER, Transitions, "make_ahead"),
    "keys made ahead read": (AFTER, Keys, "made_ahead"),
    # A request that is served with one.
    "key taken": (AFTER, KeyPool, "take"),
    "signed with the key taken": (AFTER, requests, "sign_csr"),
    "owner written, answer not": (AFTER, "sql", "UPDATE key SET station"),
    "answer with the key taken written, not committed": (AFTER, "sql", "INSERT INTO answer"),
    "answer with the key taken committed": (AFTER, Answers, "record"),
    "publishing the answer with the key taken": (BEFORE, MqttConnection, "publish"),
    "answer with the key taken published": (AFTER, MqttConnection, "_send_publish"),
    # A certificate installed.
    "key proved": (BEFORE, Transitions, "activate"),
    "activation written, not committed": (AFTER, "sql", "UPDATE key SET chain"),
    "activated": (AFTER, Transitions, "activate"),
    "PEM not written": (BEFORE, ActiveDirectory, "_write"),
    "PEM written, not renamed": (BEFORE, Path, "replace"),
    "PEM renamed": (AFTER, Path, "replace"),
    "PEM renamed, directory synced": (AFTER, files, "sync_directory"),
    # A key restored.
    "restoring": (BEFORE, Transitions, "restore"),
    "restoration written, not committed": (AFTER, "sql", "UPDATE key SET previous = 1"),
    "restored": (AFTER, Transitions, "restore"),
    "restored, PEM not renamed": (BEFORE, Path, "replace"),
    "restored, PEM renamed": (AFTER, Path, "replace"),
    "restored, PEM before written": (BEFORE, Path, "replace"),
    "restored, PEM before renamed": (AFTER, Path, "replace"),
    "restored, directory synced": (AFTER, files, "sync_directory"),
    # A key destroyed.
    "destroying": (BEFORE, Transitions, "apply"),
    "private part wiped, not committed": (AFTER, "sql", "DELETE FROM secret WHERE"),
    "destroyed, write-ahead log not emptied": (BEFORE, "sql", "DELETE FROM secret WHERE, PRAGMA wal_checkpoint"),
    "destroyed, write-ahead log emptied": (AFTER, "sql", "DELETE FROM secret WHERE, PRAGMA wal_checkpoint"),
    "destroyed, PEM not removed": (BEFORE, Path, "unlink"),
    "PEM removed": (AFTER, Path, "unlink"),
}
"""Each moment, by what it lies before or after."""


class _Countdown:
    def __init__(self, count: int) -> None:
        self._left = count

    def tick(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def wrap(call: Callable[..., Any], side: str, countdown: _Countdown) -> Callable[..., Any]:
    """`call`, with the moment before or after it."""

    def crashing(*args: Any, **kwargs: Any) -> Any:
        if side == BEFORE:
            countdown.tick()
        result = call(*args, **kwargs)
        if side == AFTER:
            countdown.tick()
        return result

    return crashing


def wrap_statements(beginning: str, side: str, countdown: _Countdown) -> None:
    """Let the moment lie before or after every SQL statement with this `beginning`.

    Two beginnings, with a comma between them: only after a statement with the first one.
    """
    first, _, beginning = beginning.rpartition(", ")
    seen = not first

    def is_it(statement: str) -> bool:
        nonlocal seen
        seen = seen or statement.lstrip().startswith(first)
        return seen and statement.lstrip().startswith(beginning)

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
            execute = super().execute
            if is_it(statement):
                execute = wrap(execute, side, countdown)
            return execute(statement, *arguments)

        def executemany(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
            execute = super().executemany
            if is_it(statement):
                execute = wrap(execute, side, countdown)
            return execute(statement, *arguments)

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **kwargs: connect(*args, factory=Connection, **kwargs)  # type: ignore[assignment]


def main() -> None:
    """Set the moment, and serve."""
    moment, count, *options = sys.argv[1:]
    countdown = _Countdown(int(count))
    side, place, name = (BEFORE, "sql", "") if moment == ANY_STATEMENT else MOMENTS[moment]
    if place == "sql":
        wrap_statements(name, side, countdown)
    else:
        setattr(place, name, wrap(getattr(place, name), side, countdown))
    cli.main(["serve", "--log-format", "json", *options])


if __name__ == "__main__":
    main()
