"""SQLite: open the file, check, migrate, explain errors. Every transaction begins and ends here."""

from __future__ import annotations

import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from stationkey.errors import LedgerError
from stationkey.ledger.engine import Sql, T
from stationkey.ledger.migrations import MIGRATIONS, SCHEMA_VERSION
from stationkey.ledger.records import DAMAGED

_INCREMENTAL: Final = 2
"""``PRAGMA auto_vacuum`` of a database whose unused pages can be removed."""

_REWRITE: Final = "VACUUM"

_SHRUNK: Final = 128
"""Pages that one call of `Database.shrink` removes: a millisecond or two."""

_SPARE: Final = 256
"""Unused pages that `Database.shrink` leaves, a quarter of a MiB: they are soon used again."""

_CHECKED_WHOLE: Final = 16 * 1024 * 1024
"""Bytes. A larger database is checked whole only after an unclean shutdown."""

_PATIENCE: Final = 5000
"""Milliseconds to wait for another process that writes; a command takes a few."""

_IMPATIENCE: Final = 50
"""Milliseconds to wait after such a timeout, until a write succeeds again. Calls queue behind each other: with seconds
for each, a request would be answered minutes late."""

_CONNECTION: Final = (
    "PRAGMA foreign_keys=ON",
    # Of a new database; an older one keeps its 4 KiB. An answer changes 19 pages of 1 KiB, or 12 of 4.
    "PRAGMA page_size=1024",
    "PRAGMA auto_vacuum=INCREMENTAL",  # of a new database; `_migrate` rewrites an older one
    "PRAGMA journal_mode=WAL",
    "PRAGMA wal_autocheckpoint=4000",  # pages
    "PRAGMA synchronous=FULL",
    "PRAGMA secure_delete=ON",  # deleted content is overwritten with zeros
    "PRAGMA cache_size=-512",  # KiB; an answer touches some 30 pages of one
    "PRAGMA temp_store=MEMORY",  # no private part in a temporary file
)
"""Set on a connection that writes, before anything is written."""

_REASONS: Final = {
    "SQLITE_FULL": ("disk_full", "free some space; requests are then served again", True),
    "SQLITE_IOERR_SHMSIZE": ("disk_full", "free some space; requests are then served again", True),
    "SQLITE_BUSY": ("ledger_busy", "does a stationkey keys command hold a lock on it?", True),
    "SQLITE_READONLY": ("ledger_read_only", "the state directory must be writable", True),
    "SQLITE_CANTOPEN": ("ledger_unusable", "does the state directory exist, and may this user write there?", False),
    "SQLITE_NOTADB": (*DAMAGED, False),
    "SQLITE_CORRUPT": (*DAMAGED, False),
}
"""SQLite's error name to reason, hint and whether the error is transient."""


class SqliteSql:
    """Statements on a connection to SQLite; see `Sql`. Every station is served."""

    next_event: Final = "(SELECT coalesce(max(seq), 0) + 1 FROM event)"

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.execute = connection.execute
        self.executemany = connection.executemany

    def mine(self, _table: str, /) -> str:
        """Return no condition."""
        return ""

    def destroy_private(self, key_number: int, /) -> None:
        """Delete the private part of a key and its CSR; `Database.wipe` then removes what SQLite leaves of the former.

        secure_delete zeroes the row where it is, but not the copies that SQLite left when it moved rows.
        """
        self.execute("DELETE FROM secret WHERE key_number = ?", (key_number,))
        self.execute("INSERT OR IGNORE INTO meta (name, value) VALUES ('unwiped', 'yes')")
        # REPLACE rather than UPDATE: SQLite then merges the page, now almost empty, with its neighbours, and the
        # history takes a third less space.
        self.execute(
            "REPLACE INTO answer"
            " (key_number, station, canonical_id, request_id, digest, csr, answered_at, running, delivered)"
            " SELECT key_number, station, canonical_id, request_id, digest, '', answered_at, running, 1 FROM answer"
            " WHERE key_number = ?",
            (key_number,),
        )


class Database:
    """One SQLite connection, an `Engine`. May move between threads, but only one may use it at a time.

    Args:
        path: the database file; created with mode 0600 if it is missing and `make` is set.
        read_only: write nothing; implies not `make`.
        make: create a missing database and migrate an older one. For the daemon, which owns the state directory; a
            command must not migrate while a daemon of the older version runs.
        alone: with `read_only`: no other process has it open and it has no write-ahead log, so SQLite creates no file
            beside it.

    Attributes:
        path: the database file.
        trouble: reason of the last failure until the next successful write, or an empty text. Any thread may read it.

    Raises:
        LedgerError: the database cannot be opened, is damaged, or has another version.
    """

    def __init__(self, path: Path, *, read_only: bool = False, make: bool = True, alone: bool = False) -> None:
        self.path = path
        self._names = tuple(f"{path}{suffix}" for suffix in ("", "-wal", "-shm"))
        self._deferred: deque[tuple[str, tuple[object, ...]]] = deque()
        self._patient = True
        self.trouble = ""
        make = make and not read_only
        with self._explained("opened"):
            if make:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            elif not path.exists():
                raise LedgerError(
                    f"no ledger at {path}",
                    reason="ledger_missing",
                    hint="is it the --state-dir of the daemon?",
                )
            if make and Path(f"{path}-journal").exists():
                self._roll_back()
            clean = not Path(f"{path}-wal").exists()
            # Checked over a read-only connection, so that a refused database stays as it is, byte for byte: a
            # connection that can write empties the write-ahead log when it closes.
            self._connection = self._connect("ro&immutable=1" if alone and read_only else "ro")
            try:
                version = self._check(migrate=make, whole=make and not clean)
                if not read_only:
                    self._connection.close()
                    self._connection = self._connect("rw")
                    for pragma in _CONNECTION:
                        self._connection.execute(pragma)
                    self._connection.execute("SELECT 1 FROM sqlite_schema").fetchone()  # opens the files
                    self._refuse_without_log()
                self._own = self._found()
                self._sql = SqliteSql(self._connection)
                if not read_only:
                    self._migrate(version)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Execute the deferred statements and close the connection.

        Raises:
            LedgerError: a deferred statement was not written. The connection is closed.
        """
        try:
            if self._deferred:
                with self.transaction("closed"):
                    pass
        finally:
            self._connection.close()

    @property
    def directory(self) -> Path:
        """The state directory, which the database file is in."""
        return self.path.parent

    @property
    def local(self) -> bool:
        """Return True: the database is a file in the state directory."""
        return True

    def own_files(self) -> frozenset[tuple[int, int]]:
        """Return device and inode of the database, its write-ahead log and that log's index.

        This process must not open them another way: closing such a descriptor releases all locks that SQLite holds on
        the file [fcntl(2); sqlite.org/howtocorrupt.html 2.2].
        """
        return self._own

    def owns(self, _station: str) -> bool:
        """Return True: every station is served."""
        return True

    def size(self) -> int:
        """Return the size of the database and its write-ahead log in bytes."""
        with self._explained("read"):
            return sum(file.stat().st_size for file in (self.path, Path(f"{self.path}-wal")) if file.exists())

    @contextmanager
    def reading(self) -> Iterator[Sql]:
        """Give the connection for queries, inside a transaction or outside.

        Raises:
            LedgerError: the database cannot be read.
        """
        with self._explained("read"):
            yield self._sql

    @contextmanager
    def transaction(self, act: str = "written") -> Iterator[Sql]:
        """Give the connection for changes, and commit them, durably, with the deferred statements.

        Args:
            act: what failed, for the error's message.

        Raises:
            LedgerError: nothing was written.
        """
        with self._explained(act):
            try:
                self._connection.execute("BEGIN IMMEDIATE")
            except sqlite3.Error:
                self._be_patient(False)
                raise
            try:
                self._refuse_moved()
                yield self._sql
                while self._deferred:
                    self._connection.execute(*self._deferred.popleft())
                self._connection.execute("COMMIT")
                self._be_patient(True)
                self.trouble = ""
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def attempt(self, call: Callable[[], T]) -> T:
        """Make a call: no connection is lost here."""
        return call()

    def defer(self, statement: str, *arguments: object) -> None:
        """Add a statement to the next transaction. Any thread may call this; it does not block.

        Only for changes that may be lost: a crash or a failed transaction loses them.
        """
        self._deferred.append((statement, arguments))

    def wipe(self) -> bool:
        """Rewrite the private parts if a key was destroyed since the last call, so that no trace of it is left.

        secure_delete zeroes a deleted row where it is. But when SQLite moved the row between pages before, pieces of it
        may be left in the unused part of a page. So the table is emptied, which zeroes all its pages, and filled again:
        the cost depends on the number of living keys, not on the history.

        Returns:
            Whether a key was destroyed since the last call.
        """
        with self.reading() as sql:
            if sql.execute("SELECT 1 FROM meta WHERE name = 'unwiped'").fetchone() is None:
                return False
        with self.transaction() as sql:
            living = sql.execute("SELECT key_number, private FROM secret").fetchall()
            # Without WHERE, foreign key and trigger SQLite frees and zeroes whole pages, not row by row.
            sql.execute("DELETE FROM secret")
            sql.executemany("INSERT INTO secret (key_number, private) VALUES (?, ?)", living)
            sql.execute("DELETE FROM meta WHERE name = 'unwiped'")
        self.checkpoint()
        return True

    def checkpoint(self) -> bool:
        """Move the write-ahead log into the database and empty it, so that it keeps no trace of a wiped private part.

        It does not wait for readers: SQLite would hold the write lock meanwhile.

        Returns:
            Whether the log is empty. Another process that reads or writes may prevent that; try again later.
        """
        with self._explained("written"):
            if os.stat(f"{self.path}-wal").st_size == 0:  # noqa: PTH116 - as in `_found`
                return True  # SQLite would cut the empty file, and so write the time of that to the disk
            self._wait(0)
            try:
                (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self._wait(_PATIENCE if self._patient else _IMPATIENCE)
        return not busy

    def shrink(self) -> bool:
        """Remove some unused pages, so that a flood of requests leaves no large file. `checkpoint` cuts the file.

        Returns:
            Whether there are more.
        """
        with self._explained("written"):
            (unused,) = self._connection.execute("PRAGMA freelist_count").fetchone()
            if unused <= _SPARE:
                return False
            pages = min(unused - _SPARE, _SHRUNK)
            # Not execute(): the pragma returns a row without columns for each page, and execute() stops at the first.
            self._connection.executescript(f"PRAGMA incremental_vacuum({pages})")
            return bool(unused - pages > _SPARE)

    def _connect(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=_PATIENCE / 1000,
        )
        # A tampered database may contain triggers and views: they must not call functions with side effects.
        connection.execute("PRAGMA trusted_schema=OFF")
        return connection

    def _refuse_without_log(self) -> None:
        """Refuse a database that was not switched to write-ahead logging: SQLite may keep silent when a sync failed.

        The next process to open it would switch it, and its log would look like files that were put in their place.
        """
        (mode,) = self._connection.execute("PRAGMA journal_mode").fetchone()
        if mode != "wal":
            raise LedgerError(
                f"the ledger {self.path} cannot be switched to write-ahead logging",
                reason="ledger_unusable",
                hint="does the disk have errors, and may this user write there?",
            )

    def _roll_back(self) -> None:
        """Undo a change that a loss of power cut short before write-ahead logging began; only a writer can.

        SQLite does it by the rollback journal when it first reads. Without that, no connection can read the database.
        """
        connection = self._connect("rw")
        try:
            connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
        finally:
            connection.close()

    def _check(self, *, migrate: bool, whole: bool) -> int:
        """Return the schema version, after a look for damage and before anything is written.

        With the usual bounds a database is a few MiB, and all pages are checked in milliseconds. A larger one is
        checked whole only if `whole` is set. Otherwise a damaged header, a wrong length, and damage to the schema or
        the private parts are found here; other damage is found by the query that reads it.
        """
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (size,) = self._connection.execute(
            "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
        ).fetchone()
        table = "" if whole or size <= _CHECKED_WHOLE or version != SCHEMA_VERSION else "(secret)"
        complaints = [row[0] for row in self._connection.execute(f"PRAGMA quick_check{table}")]
        if complaints != ["ok"]:
            reason, hint = DAMAGED
            raise LedgerError(f"the ledger {self.path} is damaged: {complaints[0]}", reason=reason, hint=hint)
        if version > SCHEMA_VERSION:
            raise LedgerError(
                f"the ledger {self.path} has version {version}; this stationkey supports up to {SCHEMA_VERSION}",
                reason="ledger_newer",
                hint="a newer stationkey wrote it: run that one. Nothing was changed",
            )
        if version < SCHEMA_VERSION and not migrate:
            raise LedgerError(
                f"the ledger {self.path} has version {version}; this stationkey needs {SCHEMA_VERSION}",
                reason="ledger_older",
                hint="start this version's daemon once: it migrates the ledger",
            )
        return int(version)

    def _migrate(self, version: int) -> None:
        for number in range(version, SCHEMA_VERSION):
            with self.transaction("opened"):
                for statement in MIGRATIONS[number].split(";\n"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version={number + 1}")
        (auto_vacuum,) = self._connection.execute("PRAGMA auto_vacuum").fetchone()
        if auto_vacuum != _INCREMENTAL:
            # Older versions kept the private parts in the table `key`, and could not remove unused pages. The rewrite
            # removes every trace of the former and enables the latter. The condition is read from the database, so
            # that after a loss of power between migration and rewrite the next start makes up for it.
            self._connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            self._connection.execute(_REWRITE)
            self.checkpoint()

    def _found(self) -> frozenset[tuple[int, int]]:
        """Return device and inode of the files that have the names of the database and its companions now."""
        found = set()
        for name in self._names:  # before every write, so os.stat: it takes a fifth of the time of Path.stat
            try:
                status = os.stat(name)  # noqa: PTH116 - see above
            except FileNotFoundError:
                continue
            found.add((status.st_dev, status.st_ino))
        return frozenset(found)

    def _refuse_moved(self) -> None:
        """Refuse to write to a database that the next start would not find; SQLite does not notice."""
        if self._found() == self._own:
            return
        self.trouble = "ledger_moved"
        raise LedgerError(
            f"the ledger {self.path} was moved, removed or replaced while in use",
            reason="ledger_moved",
            hint="put it back, or stop the daemon before another takes its place",
            transient=True,
        )

    def _be_patient(self, patient: bool) -> None:
        """Set how long to wait for other processes; see `_IMPATIENCE`."""
        if patient is not self._patient:
            self._patient = patient
            self._wait(_PATIENCE if patient else _IMPATIENCE)

    def _wait(self, milliseconds: int) -> None:
        """Set how long a statement waits for a lock."""
        self._connection.execute(f"PRAGMA busy_timeout={milliseconds}")

    @contextmanager
    def _explained(self, act: str) -> Iterator[None]:
        """Turn an error of SQLite or the file system into a `LedgerError`."""
        try:
            yield
        except OSError as error:
            self.trouble = "ledger_unusable"
            raise LedgerError(
                f"the ledger {self.path} cannot be {act}: {error.strerror}",
                reason="ledger_unusable",
                hint="run this with sudo" if isinstance(error, PermissionError) else "",
            ) from None
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            reason, hint, transient = _REASONS.get(name, ("ledger_error", "", False))
            self.trouble = reason
            raise LedgerError(
                f"the ledger {self.path} cannot be {act}: {error}",
                reason=reason,
                hint=hint,
                transient=transient,
            ) from None
