"""The ledger's database on PostgreSQL: one connection, kept, checked and reconnected; and the fence of a shard."""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg
from psycopg.pq import TransactionStatus

from stationkey.config.secrets import SecretReference
from stationkey.errors import LedgerError, ShardLost
from stationkey.ledger.engine import Sql, T
from stationkey.ledger.postgresql import schema
from stationkey.ledger.postgresql.connection import Connection, connect, is_lost, of_error
from stationkey.ledger.postgresql.slots import SLOTS, shard_of, slots_of
from stationkey.ledger.postgresql.statements import PostgresqlSql

PATIENCE: Final = 20.0
"""Seconds to reconnect, while a request waits. After that, calls fail at once until a connection works again."""
_PAUSE: Final = 0.25
"""Seconds between two attempts."""
_REST: Final = 1.0
"""Seconds without an attempt after a failed one, once `PATIENCE` is used up; or as long as that took, if longer."""


class Shard(NamedTuple):
    """A shard that this daemon holds.

    Attributes:
        number: from 0.
        of: how many there are.
        epoch: of this holder: another has a higher one.
        holder: who it is; empty if that need not be compared. In a database that was restored, or fell back to a
            standby that lacks something, an epoch may come again.
    """

    number: int
    of: int
    epoch: int
    holder: str = ""

    def is_of(self, epoch: int, holder: str | None) -> bool:
        """Return whether this holder is the one on record."""
        return epoch == self.epoch and self.holder in {"", holder}


class PostgresqlDatabase:
    """A connection to the ledger of a site, an `Engine`. May move between threads, but only one may use it at a time.

    A transaction begins by locking its shard's row and comparing the epoch. So a daemon whose shard another one has
    taken writes nothing any more, and the one that takes it waits for a transaction that has begun. A command has no
    shard, and locks the rows of all.

    Args:
        uri: of the database.
        password: its password.
        directory: the state directory of this daemon.
        name: who this is, for ``pg_stat_activity``.
        shard: the shard whose stations are served; None for a command.
        on_lost: called once, by any thread, when a transaction finds that another daemon holds the shard.

    Attributes:
        trouble: reason of the last failure until the next successful write, or an empty text. Any thread may read it.

    Raises:
        LedgerError: the database cannot be opened; see `connect` and `schema.check`.
    """

    def __init__(
        self,
        uri: str,
        password: SecretReference | None,
        *,
        directory: Path,
        name: str,
        shard: Shard | None = None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = directory
        self.trouble = ""
        self._where = (uri, password, name)
        self._shard = shard
        self._slots = range(SLOTS) if shard is None else slots_of(shard.number, shard.of)
        self._on_lost = on_lost
        self._deferred: deque[tuple[str, tuple[object, ...]]] = deque()
        self._over = threading.Event()
        self._commits = 0
        self._rest_until = 0.0  # no attempt before; 0 while patient
        self._connection: Connection | None = None
        self._inside = False
        """Whether a transaction has begun: it must not go on over another connection."""
        self._sql: Sql
        self._connect()

    def close(self) -> None:
        """Execute the deferred statements and close the connection.

        Raises:
            LedgerError: a deferred statement was not written. The connection is closed.
        """
        try:
            if self._deferred and not self._over.is_set():
                with self.transaction("closed"):
                    pass
        finally:
            self._over.set()
            self._drop()

    def abandon(self) -> None:
        """End the running call, and let every later one fail at once. Any thread may call this; it does not block."""
        self._over.set()
        if connection := self._connection:
            connection.hang_up()

    @property
    def local(self) -> bool:
        """Return False: other machines have it too."""
        return False

    def own_files(self) -> frozenset[tuple[int, int]]:
        """Return nothing: the database is not among the files of this machine."""
        return frozenset()

    def owns(self, station: str) -> bool:
        """Return whether a station belongs to this shard."""
        return self._shard is None or shard_of(station, self._shard.of) == self._shard.number

    def size(self) -> int:
        """Return the size of the database in bytes."""
        with self.reading() as sql:
            (size,) = sql.execute("SELECT pg_database_size(current_database())").fetchone()
        return int(size)

    def wipe(self) -> bool:
        """Return False: what a destroyed key leaves in the database is the name of an object in a token."""
        return False

    def checkpoint(self) -> bool:
        """Return True: see `wipe`."""
        return True

    def shrink(self) -> bool:
        """Return False: autovacuum does that."""
        return False

    def attempt(self, call: Callable[[], T]) -> T:
        """Make a call, and again if its connection was lost before it committed anything.

        Raises:
            LedgerError: by the call; when PostgreSQL stays away, after `PATIENCE`.
        """
        end = time.monotonic() + PATIENCE
        while True:
            commits = self._commits
            try:
                return call()
            except LedgerError as error:
                lost = error.reason == "ledger_unreachable" and self._connection is None and not self._rest_until
                if not lost or commits != self._commits or time.monotonic() >= end:
                    raise

    def defer(self, statement: str, *arguments: object) -> None:
        """Add a statement to the next transaction. Any thread may call this; it does not block."""
        self._deferred.append((statement, arguments))

    @contextmanager
    def reading(self) -> Iterator[Sql]:
        """Give the connection for queries, inside a transaction or outside.

        Raises:
            LedgerError: the database cannot be read.
        """
        with self._explained("read"):
            if not self._inside:
                self._connected(time.monotonic() + PATIENCE)
            yield self._sql

    @contextmanager
    def transaction(self, act: str = "written") -> Iterator[Sql]:
        """Give the connection for changes, and commit them, durably, with the deferred statements.

        Args:
            act: what failed, for the error's message.

        Raises:
            LedgerError: nothing was written; or with reason ``commit_unknown`` that is not known.
        """
        assert not self._inside
        with self._explained(act):
            number = self._begin(time.monotonic() + PATIENCE)
            self._inside = True
            try:
                yield self._sql
                deferred = len(self._deferred)
                self._execute_deferred(deferred)
            except BaseException:
                self._roll_back()
                raise
            finally:
                self._inside = False
            self._commit(number)
            self._commits += 1
            for _ in range(deferred):
                self._deferred.popleft()
            self.trouble = ""

    def _execute_deferred(self, count: int) -> None:
        """Execute the first deferred statements. A lost connection keeps them; one that fails goes with the others."""
        try:
            for place in range(count):  # not an iteration: another thread may add to them meanwhile
                self._sql.execute(*self._deferred[place])
        except psycopg.Error as error:
            if not is_lost(error):
                self._deferred.clear()
            raise

    def _begin(self, end: float) -> str:
        """Begin a transaction, reconnecting until `end`; return its number."""
        while True:
            connection = self._connected(end)
            try:
                cursor = connection.execute(self._beginning(), prepare=False)
                number = self._fenced(cursor)
            except psycopg.Error as error:
                if not is_lost(error) or time.monotonic() >= end:
                    self._roll_back()
                    raise
                self._drop()
            except BaseException:
                self._roll_back()
                raise
            else:
                return number

    def _beginning(self) -> bytes:
        """Return the statements that begin a transaction: one round trip.

        Without a timeout of the server: it would cut short a commit's wait for a synchronous standby, and confirm it.
        """
        rows = "" if self._shard is None else f" WHERE number = {self._shard.number}"
        return (
            f"BEGIN; SET LOCAL statement_timeout = 0; SELECT epoch, holder FROM shard{rows} ORDER BY number FOR UPDATE;"  # noqa: S608 - a number
            " SELECT pg_current_xact_id()::text"
        ).encode()

    def _fenced(self, cursor: psycopg.Cursor[tuple[Any, ...]]) -> str:
        """Return the transaction's number, or raise if another daemon holds the shard."""
        cursor.nextset()
        cursor.nextset()
        holders = cursor.fetchall()
        cursor.nextset()
        number = cursor.fetchone()
        assert number is not None
        if self._shard is not None and not any(self._shard.is_of(*one) for one in holders):
            if not self._over.is_set():
                self._over.set()
                self._on_lost()
            raise self._noted(_lost_shard())
        return str(number[0])

    def _commit(self, number: str) -> None:
        """Commit; if the connection is lost meanwhile, find out what became of it.

        Args:
            number: of the transaction.
        """
        connection = self._connection
        if connection is None:  # lost earlier; the caller suppressed the error
            raise self._noted(_away())
        try:
            cursor = connection.execute("COMMIT")
        except psycopg.Error as error:
            if not is_lost(error):
                self._roll_back()
                raise
            self._drop()
            if not self._was_committed(number, run=connection.run):
                raise
            return
        if cursor.statusmessage != "COMMIT":  # an error before, which nobody let through
            raise LedgerError("the ledger on PostgreSQL rolled a transaction back", reason="ledger_error")

    def _was_committed(self, number: str, *, run: str) -> bool:
        """Return whether a transaction was committed, by a new connection.

        A server that has been restarted after a crash, or a standby that took its place, gives the numbers again that
        it has not heard of: one that is committed there may be another transaction's.

        Args:
            number: of the transaction.
            run: of the server that it was begun on.

        Raises:
            LedgerError: it is not known (``commit_unknown``).
        """
        end = time.monotonic() + PATIENCE
        status: str | None = None
        with suppress(LedgerError, psycopg.Error):
            while time.monotonic() < end:
                connection = self._connected(end)
                row = connection.execute("SELECT pg_xact_status(%s::xid8)", (number,)).fetchone()
                status = row[0] if row else None
                if status == "committed" and connection.run != run:
                    status = None
                if status != "in progress":
                    break
                self._over.wait(_PAUSE)  # for its backend, which has not noticed yet
        if status in {"committed", "aborted"}:
            return status == "committed"
        unknown = LedgerError(
            "the connection to the ledger was lost at a commit",
            reason="commit_unknown",
            hint="the id is looked up again before it is answered",
            transient=True,
        )
        raise self._noted(unknown)

    def _roll_back(self) -> None:
        if connection := self._connection:
            try:
                if not connection.closed and connection.info.transaction_status is not TransactionStatus.IDLE:
                    connection.execute("ROLLBACK")
            except psycopg.Error:
                self._drop()

    def _connected(self, end: float) -> Connection:
        """Return the connection; connect again if it is lost, until `end`, or once if that has failed before."""
        while not self._over.is_set():
            if self._connection is not None:
                if self._is_silent(self._connection):
                    return self._connection
                self._drop()
            now = time.monotonic()
            if now < self._rest_until:
                raise self._noted(_away())
            try:
                self._connect()
            except LedgerError as error:
                if error.transient and not self._rest_until and time.monotonic() < end:
                    self._over.wait(_PAUSE)
                    continue
                took = time.monotonic() - now
                self._rest_until = time.monotonic() + max(_REST, took)
                self._noted(error)
                raise
        raise self._noted(_lost_shard())

    def _connect(self) -> None:
        uri, password, name = self._where
        connection = connect(uri, password, name=name)
        try:
            schema.check(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._sql = connection, PostgresqlSql(connection, self._slots)
        self._rest_until = 0.0
        if self._over.is_set():  # abandoned while it connected
            connection.hang_up()

    @staticmethod
    def _is_silent(connection: Connection) -> bool:
        """Return whether the server has said nothing since the last call: the end of the connection, most likely."""
        if connection.closed:
            return False
        poll = select.poll()
        poll.register(connection.pgconn.socket, select.POLLIN)
        if not poll.poll(0):
            return True
        try:
            connection.execute("SELECT 1")
        except psycopg.Error:
            return False
        return True

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _explained(self, act: str) -> Iterator[None]:
        """Turn an error of psycopg into a `LedgerError`."""
        try:
            yield
        except psycopg.Error as error:
            if is_lost(error):
                self._drop()
            raise self._noted(of_error(act, error)) from None

    def _noted(self, error: LedgerError) -> LedgerError:
        """Note an error as the trouble, and return it."""
        self.trouble = error.reason
        return error


def _lost_shard() -> ShardLost:
    return ShardLost(
        "another daemon has taken over this shard of the ledger", reason="shard_lost", hint="it answers instead"
    )


def _away() -> LedgerError:
    return LedgerError(
        "the ledger on PostgreSQL is still away",
        reason="ledger_unreachable",
        hint="is PostgreSQL running, and does the network lead there?",
        transient=True,
    )
