"""The ledger: requests, answers and keys in one database: SQLite, or PostgreSQL for a site.

A key and the answer with its CSR are committed in one transaction before the answer is published. So a redelivered
request gets the same CSR, also after a restart, and no key exists without a record of its request.
With SQLite, ``synchronous=FULL`` makes a commit survive a loss of power; write-ahead logging lets the ``keys`` commands
read while the daemon writes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from stationkey.errors import LedgerError
from stationkey.ledger.answers import Answers
from stationkey.ledger.database import Database
from stationkey.ledger.engine import Engine
from stationkey.ledger.hints import Hints
from stationkey.ledger.keys import Keys
from stationkey.ledger.records import Answered, EventRecord, Figures, KeyRecord, content_digest, read_key_type
from stationkey.ledger.rejections import MAX_REJECTIONS, Rejections
from stationkey.ledger.retention import Retention
from stationkey.ledger.transitions import Transitions

__all__ = [
    "MAX_REJECTIONS",
    "Answered",
    "EventRecord",
    "Figures",
    "KeyRecord",
    "Ledger",
    "content_digest",
    "read_key_type",
]

MAX_FILTERS: Final = 256
"""Topic filters that are remembered, the newest first."""
_FILTERS: Final = "mqtt_filters"


class Ledger:
    """One database and its operations, grouped by duty. Only one thread may use it at a time.

    Args:
        path: the SQLite database file; for details of this and the other arguments see `Database`.
        read_only: write nothing.
        make: create a missing database and migrate an older one.
        alone: no other process has it open.

    Attributes:
        database: the connection, its transactions, its size.
        answers: accepted answers, each with its key.
        rejections: rejected requests.
        keys: queries of keys.
        transitions: changes of keys.
        retention: running time, expiry, cleaning up.
        hints: the last hint that a key's certificate is due.

    Raises:
        LedgerError: the database cannot be opened, is damaged, or has another version.
    """

    def __init__(self, path: Path, *, read_only: bool = False, make: bool = True, alone: bool = False) -> None:
        self._use(Database(path, read_only=read_only, make=make, alone=alone))

    @classmethod
    def on(cls, engine: Engine) -> Ledger:
        """Return the ledger in an open database, which it closes."""
        ledger = cls.__new__(cls)
        ledger._use(engine)  # noqa: SLF001 - of this class
        return ledger

    def _use(self, engine: Engine) -> None:
        self.database = engine
        self.answers = Answers(engine)
        self.rejections = Rejections(engine)
        self.keys = Keys(engine)
        self.transitions = Transitions(engine)
        self.retention = Retention(engine)
        self.hints = Hints(engine)

    def client_id(self) -> str:
        """Return the MQTT client identifier of this state directory, which names the broker's session; made once."""
        with self.database.transaction() as sql:
            sql.execute(
                "INSERT INTO meta (name, value) VALUES ('mqtt_client_id', ?) ON CONFLICT (name) DO NOTHING",
                (f"stationkey-{uuid.uuid4().hex[:12]}",),
            )
            (value,) = sql.execute("SELECT value FROM meta WHERE name = 'mqtt_client_id'").fetchone()
        return str(value)

    def stale_filters(self, filters: Sequence[str], *, site: bool) -> list[str]:
        """Return the topic filters of earlier runs that the broker's session may still have.

        Args:
            filters: of this run.
            site: whether they are a site's, to be remembered. A single station has one topic, from which the daemon
                unsubscribes when it gets a message on it that it does not expect; a wildcard it could not guess.
        """
        with self.database.reading() as sql:
            row = sql.execute("SELECT value FROM meta WHERE name = ?", (_FILTERS,)).fetchone()
        earlier = [] if row is None else [str(known) for known in json.loads(row[0])]
        known = list(dict.fromkeys([*(filters if site else ()), *earlier]))[:MAX_FILTERS]
        if known != earlier:
            with self.database.transaction() as sql:
                sql.execute(
                    "INSERT INTO meta (name, value) VALUES (?, ?)"
                    " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                    (_FILTERS, json.dumps(known)),
                )
        return [earlier_filter for earlier_filter in known if earlier_filter not in filters]

    def close(self) -> None:
        """Write what is pending and close the database.

        Raises:
            LedgerError: a mark of delivery was not written. The database is closed.
        """
        with suppress(LedgerError):  # rejections are a record for people; closing goes on without them
            while self.rejections.write():
                pass
        self.database.close()
