"""The database file: opening, checks, migration, transactions, and what SQLite's errors mean.

Transactions begin and end here, and nowhere else.
"""

from __future__ import annotations

import os
import sqlite3
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from stationkey.errors import LedgerError
from stationkey.ledger.migrations import MIGRATIONS, SCHEMA_VERSION
from stationkey.ledger.records import DAMAGED

_INCREMENTAL: Final = 2
"""What ``PRAGMA auto_vacuum`` says of a database that unused pages can be taken off."""

_REWRITE: Final = "VACUUM"

_SHRUNK: Final = 32
"""How many pages one step of making the file smaller takes off it: a millisecond or two."""

_SPARE: Final = 64
"""How many unused pages are left in the file, a quarter of a MiB: they would soon be wanted again."""

_CHECKED_WHOLE: Final = 4096
"""A database of more pages than this, 16 MiB, is only checked as a whole after an end that was not in order."""

_PATIENCE: Final = 5000
"""Milliseconds that another process is waited for which writes: a command takes a few."""

_IMPATIENCE: Final = 50
"""The same once that was in vain, until something is written again: what waits behind one another must not wait for
seconds each, or a request is answered minutes late."""

_REASONS: Final = {
    "SQLITE_FULL": ("disk_full", "make room; requests are served again as soon as there is some", True),
    "SQLITE_IOERR_SHMSIZE": ("disk_full", "make room; requests are served again as soon as there is some", True),
    "SQLITE_BUSY": ("ledger_busy", "does a stationkey keys command hold it?", True),
    "SQLITE_READONLY": ("ledger_read_only", "the state directory must be writable", True),
    "SQLITE_CANTOPEN": ("ledger_unusable", "does the state directory exist, and may this user write there?", False),
    "SQLITE_NOTADB": (*DAMAGED, False),
    "SQLITE_CORRUPT": (*DAMAGED, False),
}
"""Reason, hint and whether it is transient, by SQLite's name of the error."""


class Database:
    """One connection to the database. May be handed from thread to thread, but used by one at a time.

    Args:
        path: the database file; made, with mode 0600, where it is missing.
        read_only: write nothing; implies not `make`.
        make: make the database where it is missing, and bring one of an older version up to date. For the daemon, which
            has the state directory to itself; a command beside it must not do so under a daemon of the older version.
        alone: nobody else has it open, and it has no write-ahead log: so no file is made beside it even to read. With
            `read_only`.

    Attributes:
        path: the database file.
        trouble: reason of the last failure, until something is written again. May be looked at from any thread.

    Raises:
        LedgerError: it cannot be opened, is damaged, or was written by a newer version.
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
                    f"there is no ledger at {path}",
                    reason="ledger_missing",
                    hint="is it the --state-dir of the daemon, and may this user read it?",
                )
            orderly = not Path(f"{path}-wal").exists()
            # Looked at by a connection that cannot write, so that one that is refused stays as it is, byte for byte:
            # a connection that can write empties the write-ahead log as it closes.
            self._connection = self._connect("ro&immutable=1" if alone and read_only else "ro")
            try:
                version = self._check(migrate=make, whole=make and not orderly)
                if not read_only:
                    self._connection.close()
                    self._connection = self._connect("rw")
                    self._connection.execute("PRAGMA foreign_keys=ON")
                    # Before anything is written; for an older database `_migrate` makes it true.
                    self._connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
                    self._connection.execute("PRAGMA journal_mode=WAL")
                    self._connection.execute("PRAGMA synchronous=FULL")
                    self._connection.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten with zeros
                    self._connection.execute("PRAGMA cache_size=-512")  # KiB: an answer touches a dozen pages of four
                    self._connection.execute("PRAGMA temp_store=MEMORY")  # no copy of it in a temporary file
                    # From the first look on it has its files open.
                    self._connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
                self._own = self._found()
                if not read_only:
                    self._migrate(version)
            except BaseException:
                self._connection.close()
                raise

    def _connect(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=_PATIENCE / 1000,
        )
        # A database that somebody tampered with may have triggers and views: they get no function that does anything.
        connection.execute("PRAGMA trusted_schema=OFF")
        return connection

    def _check(self, *, migrate: bool, whole: bool) -> int:
        """Look for damage, and at the version, before anything is written.

        A database with the usual bounds is a few MiB, and every page of it is looked at, in milliseconds. A larger one
        is looked at whole only where `whole` says so. Else what is seen is damage to the header, a length that does not
        fit, and damage to the schema or to the private parts; damage elsewhere is met by the query that comes upon it.
        """
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        table = "" if whole or pages <= _CHECKED_WHOLE or version != SCHEMA_VERSION else "(secret)"
        complaints = [row[0] for row in self._connection.execute(f"PRAGMA quick_check{table}")]
        if complaints != ["ok"]:
            reason, hint = DAMAGED
            raise LedgerError(f"the ledger {self.path} is damaged: {complaints[0]}", reason=reason, hint=hint)
        if version > SCHEMA_VERSION:
            raise LedgerError(
                f"the ledger {self.path} is of version {version}, and this stationkey knows versions up to "
                f"{SCHEMA_VERSION}",
                reason="ledger_newer",
                hint="a newer stationkey wrote it: run that one. Nothing was changed",
            )
        if version < SCHEMA_VERSION and not migrate:
            raise LedgerError(
                f"the ledger {self.path} is of version {version}, and this stationkey wants {SCHEMA_VERSION}",
                reason="ledger_older",
                hint="start this version's daemon once: it brings the ledger up to date",
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
            # Older versions had the private parts in the table `key`, and no way to take unused pages off the file.
            # Written anew, the database has no trace of the former and is ready for the latter. Asked of the database
            # itself, so that a loss of power between the migration and this is made good by the next start.
            self._connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            self._connection.execute(_REWRITE)
            self.checkpoint()

    def close(self) -> None:
        """Execute what was deferred, and close."""
        try:
            if self._deferred:
                with self.transaction("closed"):
                    pass
        finally:
            self._connection.close()

    @property
    def directory(self) -> Path:
        """The directory of the database: the state directory."""
        return self.path.parent

    def size(self) -> int:
        """The size of the database and its write-ahead log, in bytes."""
        with self._explained("read"):
            return sum(file.stat().st_size for file in (self.path, Path(f"{self.path}-wal")) if file.exists())

    def own_files(self) -> frozenset[tuple[int, int]]:
        """Device and inode of the database, and of what SQLite keeps beside it.

        This process must open none of them by another way: as soon as it closes one, all locks on it are given up that
        SQLite holds [fcntl(2); sqlite.org/howtocorrupt.html 2.2].
        """
        return self._own

    def _found(self) -> frozenset[tuple[int, int]]:
        """Device and inode of what has the names of the database and of the files beside it now."""
        found = set()
        for name in self._names:  # looked at before every write: os.stat takes a fifth of the time of Path.stat
            try:
                status = os.stat(name)  # noqa: PTH116 - see above
            except FileNotFoundError:
                continue
            found.add((status.st_dev, status.st_ino))
        return frozenset(found)

    def _refuse_elsewhere(self) -> None:
        """Write nothing to a database that the next start would not find: SQLite does not notice, and goes on."""
        if self._found() == self._own:
            return
        self.trouble = "ledger_moved"
        raise LedgerError(
            f"the ledger {self.path} was moved, removed or exchanged while it was in use",
            reason="ledger_moved",
            hint="put it back where it was, or stop the daemon before another takes its place",
            transient=True,
        )

    def checkpoint(self) -> bool:
        """Move everything out of the write-ahead log and empty it, so that nothing wiped is left in there.

        Returns:
            Whether it is empty; a reader may be in the way, and then it is to be tried again.
        """
        with self._explained("written"):
            (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    def shrink(self) -> bool:
        """Take some unused pages off the file, but for a few: a flood of requests leaves no large file behind.

        The file itself is cut by the next `checkpoint`.

        Returns:
            Whether there are more.
        """
        with self._explained("written"):
            (unused,) = self._connection.execute("PRAGMA freelist_count").fetchone()
            if unused <= _SPARE:
                return False
            pages = min(unused - _SPARE, _SHRUNK)
            # Not execute(): this gives a row without a column for each page, and Python stops after the first of those.
            self._connection.executescript(f"PRAGMA incremental_vacuum({pages})")
            return bool(unused - pages > _SPARE)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give the connection to read with; inside a `transaction`, or for one query.

        Raises:
            LedgerError: it cannot be read.
        """
        with self._explained("read"):
            yield self._connection

    @contextmanager
    def transaction(self, act: str = "written") -> Iterator[sqlite3.Connection]:
        """Give the connection to write with: on disk as a whole, or not at all.

        Args:
            act: what cannot be done to the ledger where it fails, for the error's message.

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
                self._refuse_elsewhere()
                yield self._connection
                while self._deferred:
                    self._connection.execute(*self._deferred.popleft())
                self._connection.execute("COMMIT")
                self._be_patient(True)
                self.trouble = ""
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def defer(self, statement: str, *arguments: object) -> None:
        """Note a statement that the next transaction is to execute. May be called from any thread; waits for nothing.

        Only for what may be lost: a crash takes it, and so may a transaction that fails.
        """
        self._deferred.append((statement, arguments))

    def _be_patient(self, patient: bool) -> None:
        """Wait for other processes, or not any more: see `_IMPATIENCE`."""
        if patient is not self._patient:
            self._patient = patient
            self._connection.execute(f"PRAGMA busy_timeout={_PATIENCE if patient else _IMPATIENCE}")

    @contextmanager
    def _explained(self, act: str) -> Iterator[None]:
        """Turn what SQLite and the file system say into the words of this project."""
        try:
            yield
        except OSError as error:
            self.trouble = "ledger_unusable"
            raise LedgerError(
                f"the ledger {self.path} cannot be {act}: {error.strerror}", reason="ledger_unusable"
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
