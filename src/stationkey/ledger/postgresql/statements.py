"""SQL of the ledger, written once for SQLite, as PostgreSQL takes it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

from psycopg import Cursor
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.types.string import StrDumperUnknown

from stationkey.ledger.engine import Arguments
from stationkey.ledger.postgresql.connection import Connection

_PART: Final = re.compile(r"'(?:[^']|'')*'|\?|(?<!:):([a-z_]\w*)|%")


@lru_cache(maxsize=512)
def translated(statement: str) -> bytes:
    """Return a statement with psycopg's placeholders instead of SQLite's, ``?`` and ``:name``."""

    def placeholder(part: re.Match[str]) -> str:
        if part[1]:
            return f"%({part[1]})s"
        return "%s" if part[0] == "?" else part[0].replace("%", "%%")

    return _PART.sub(placeholder, statement).encode()


class _Text(StrDumperUnknown):
    """Writes a text as SQLite would take it: a message that is on record may quote anything."""

    def dump(self, obj: str) -> Buffer:
        return obj.replace("\0", "\ufffd").encode(errors="replace")


class _Whole(Loader):
    """Reads a sum of integers, a ``numeric`` of PostgreSQL, as an integer."""

    def load(self, data: Buffer) -> int:
        return int(bytes(data))


class PostgresqlSql:
    """Statements on a connection to PostgreSQL; see `stationkey.ledger.engine.Sql`.

    Args:
        connection: one that is not used otherwise.
        slots: of the stations that are served.
    """

    next_event: Final = "nextval('event_seq_seq')"

    def __init__(self, connection: Connection, slots: range) -> None:
        self._connection = connection
        self._slots = slots
        connection.adapters.register_dumper(str, _Text)
        connection.adapters.register_loader("numeric", _Whole)

    def execute(self, statement: str, arguments: Arguments = (), /) -> Cursor[tuple[Any, ...]]:
        """Execute a statement."""
        return self._connection.execute(translated(statement), arguments)

    def executemany(self, statement: str, arguments: Iterable[Arguments], /) -> None:
        """Execute a statement with each of several sets of arguments.

        Without psycopg's pipeline: the server does not count a transaction as idle in the middle of one, and would keep
        the locks of a daemon that is stopped there.
        """
        for each in arguments:
            self.execute(statement, each)

    def mine(self, table: str, /) -> str:
        """Return the condition for the rows of this shard."""
        return f" AND {table}.slot >= {self._slots.start} AND {table}.slot < {self._slots.stop}"

    def destroy_private(self, key_number: int, /) -> None:
        """Delete the private part of a key and the CSR of its answer, which then counts as delivered."""
        self.execute("DELETE FROM secret WHERE key_number = ?", (key_number,))
        self.execute("UPDATE answer SET csr = '', delivered = 1 WHERE key_number = ?", (key_number,))
