"""The ledger: what was asked, what was answered, and the keys, in one SQLite database.

A key and the answer that carries its CSR are written in one transaction, on disk before the answer is published. So an
id that comes again, also after a restart, gets the CSR it got before; and there is no key without the record of why it
was made. ``synchronous=FULL`` makes a commit survive a loss of power; write-ahead logging lets the ``keys`` commands
read while the daemon writes.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path

from stationkey.errors import LedgerError
from stationkey.ledger.answers import Answers
from stationkey.ledger.database import Database
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


class Ledger:
    """One database, and what is done with it, by duty. Use it from one thread at a time.

    Args:
        path: the database file; see `Database` for it and the other arguments.
        read_only: write nothing.
        make: create a missing database, and migrate an older one.
        alone: nobody else has it open.

    Attributes:
        database: the connection, its transactions, and the space that the file takes.
        answers: accepted answers, each with its key.
        rejections: refused requests.
        keys: queries about keys.
        transitions: changes to keys.
        retention: running time, and what it ends.

    Raises:
        LedgerError: it cannot be opened, is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path, *, read_only: bool = False, make: bool = True, alone: bool = False) -> None:
        self.database = Database(path, read_only=read_only, make=make, alone=alone)
        self.answers = Answers(self.database)
        self.rejections = Rejections(self.database)
        self.keys = Keys(self.database)
        self.transitions = Transitions(self.database)
        self.retention = Retention(self.database)

    def client_id(self) -> str:
        """The MQTT client identifier of this state directory, made at first use: the broker keeps a session by it."""
        with self.database.transaction() as sql:
            sql.execute(
                "INSERT OR IGNORE INTO meta (name, value) VALUES ('mqtt_client_id', ?)",
                (f"stationkey-{uuid.uuid4().hex[:12]}",),
            )
            (value,) = sql.execute("SELECT value FROM meta WHERE name = 'mqtt_client_id'").fetchone()
        return str(value)

    def close(self) -> None:
        """Write down what is still to be, and close."""
        with suppress(LedgerError):  # not worth more trouble than whoever closes has already
            while self.rejections.write():
                pass
        self.database.close()
