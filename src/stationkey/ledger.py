"""The ledger: what was asked, what was answered, and the keys, in one SQLite database.

A key and the answer that carries its CSR are written in one transaction, on disk before the answer is published. So an
id that comes again, also after a restart, gets the CSR it got before; and there is no key without the record of why it
was made. ``synchronous=FULL`` makes a commit survive a loss of power; write-ahead logging lets the ``keys`` commands
read while the daemon writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from stationkey.errors import ConfigurationError, LedgerError
from stationkey.messages import GenerateCsrRequest

if TYPE_CHECKING:
    from stationkey.keystore import KeyRef

DATABASE_NAME: Final = "ledger.sqlite3"
LOCK_NAME: Final = "lock"
SCHEMA_VERSION: Final = 1
"""``user_version`` of the database that this code reads and writes."""

MAX_REJECTIONS: Final = 10_000
"""How many refused requests are remembered: the oldest go first. A few hundred bytes each, so some MiB at the most."""

_SCHEMA: Final = """
CREATE TABLE key (
    key_id            TEXT PRIMARY KEY,
    scheme            TEXT NOT NULL,
    key_type          TEXT NOT NULL,
    certificate_type  TEXT NOT NULL,
    evse_id           TEXT NOT NULL DEFAULT '',
    algorithm         TEXT NOT NULL,
    common_name       TEXT NOT NULL,
    organization_name TEXT NOT NULL,
    country_name      TEXT NOT NULL,
    state             TEXT NOT NULL,
    created_at        INTEGER NOT NULL,
    public            BLOB NOT NULL,
    private           BLOB
) STRICT;
CREATE INDEX key_by_owner ON key (certificate_type, evse_id, state, created_at);
CREATE TABLE answer (
    canonical_id TEXT PRIMARY KEY,
    request_id   TEXT NOT NULL,
    digest       BLOB NOT NULL,
    key_id       TEXT NOT NULL REFERENCES key (key_id),
    csr          TEXT NOT NULL,
    answered_at  INTEGER NOT NULL,
    delivered    INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX answer_undelivered ON answer (answered_at) WHERE delivered = 0;
CREATE TABLE rejection (
    seq        INTEGER PRIMARY KEY,
    request_id TEXT NOT NULL,
    reason     TEXT NOT NULL,
    message    TEXT NOT NULL,
    at         INTEGER NOT NULL
) STRICT;
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Answered:
    """An accepted answer on record.

    Attributes:
        request_id: the id as it first came.
        digest: of the request's content, see `content_digest`.
        csr: the PEM that was answered.
        key_id: the key that the CSR is for.
    """

    request_id: str
    digest: bytes
    csr: str
    key_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """A key on record, without its private part.

    Attributes:
        created_at: Unix time in milliseconds, by the station's clock, which may have been wrong.
        evse_id: the EVSE that the key is for, or None.
        public: subjectPublicKeyInfo in DER.
        request_ids: the requests that were answered with this key, as their ids came.
    """

    key_id: str
    scheme: str
    key_type: str
    certificate_type: str
    evse_id: str | None
    algorithm: str
    common_name: str
    organization_name: str
    country_name: str
    state: str
    created_at: int
    public: bytes
    request_ids: tuple[str, ...]


def content_digest(request: GenerateCsrRequest) -> bytes:
    """Fingerprint of what a request asks for, its id left out and its default algorithm filled in.

    Two requests with the same fingerprint ask for the same; fields unknown to this version do not count (decision 5).
    """
    data = request.data
    content = [
        data.certificate_type,
        data.common_name,
        data.organization_name,
        data.country_name,
        request.evse_id,
        request.algorithm,
    ]
    return hashlib.sha256(msgspec.json.encode(content)).digest()


class StateDirectory:
    """The directory that holds all of the station's state, for the one process that may write there.

    Made with mode 0700 where it is missing. One that others can enter is closed to them if it is ours alone to close:
    empty, or holding a ledger.

    Raises:
        ConfigurationError: it cannot be made or entered, or should not be taken over.
        LedgerError: another process uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                entries = {entry.name for entry in path.iterdir()}
                if entries and DATABASE_NAME not in entries:
                    raise ConfigurationError(
                        f"the state directory {path} is open to others (mode {mode:04o}) and has other files in it",
                        reason="state_dir_open",
                        hint="name a directory of its own",
                    )
                path.chmod(0o700)
            self._lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigurationError(
                f"the state directory {path} cannot be used: {error.strerror}",
                reason="state_dir_unusable",
                hint="name one with --state-dir that this user may write",
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise LedgerError(
                f"another stationkey uses the state directory {path}",
                reason="state_dir_in_use",
                hint="stop it first, or name another directory with --state-dir",
            ) from None

    @property
    def database(self) -> Path:
        """Where the ledger is."""
        return self.path / DATABASE_NAME

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._lock)


class Ledger:
    """One connection to the database. May be handed from thread to thread, but used by one at a time.

    Args:
        path: the database file; made, with mode 0600, where it is missing.
        read_only: open what is there, and write nothing.

    Raises:
        LedgerError: it cannot be opened, is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path = path
        self._delivered: list[str] = []
        if read_only and not path.exists():
            raise LedgerError(
                f"there is no ledger at {path}",
                reason="ledger_missing",
                hint="is it the --state-dir of the daemon, and may this user read it?",
            )
        with self._explained("opened"):
            if not read_only:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=5.0,
            )
            self._connection.execute("PRAGMA foreign_keys=ON")
            if not read_only:
                self._connection.execute("PRAGMA journal_mode=WAL")
                self._connection.execute("PRAGMA synchronous=FULL")
            self._prepare(read_only=read_only)

    def _prepare(self, *, read_only: bool) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise LedgerError(
                f"the ledger {self._path} is of version {version}, and this stationkey knows versions up to "
                f"{SCHEMA_VERSION}",
                reason="ledger_newer",
                hint="a newer stationkey wrote it: run that one. Nothing was changed",
            )
        if version == 0 and not read_only:
            with self._transaction():
                for statement in _SCHEMA.split(";\n"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def close(self) -> None:
        """Write down what is still to be, and close."""
        with self._explained("closed"):
            if self._delivered:
                with self._transaction():
                    self._write_delivered()
            self._connection.close()

    # Answers.

    def find_answer(self, request_id: str) -> Answered | None:
        """The accepted answer to `request_id` in any letter case, or None."""
        with self._explained("read"):
            row = self._connection.execute(
                "SELECT request_id, digest, csr, key_id FROM answer WHERE canonical_id = ?", (request_id.lower(),)
            ).fetchone()
        return None if row is None else Answered(*row)

    def record_answer(self, request: GenerateCsrRequest, key: KeyRef, csr: str, *, state: str, now: int) -> None:
        """Write down a key and the answer that carries its CSR, durably and both or neither.

        Args:
            request: the request answered.
            key: the key made for it, wrapped private part included.
            csr: the PEM.
            state: the key's state from now on.
            now: Unix time in milliseconds.

        Raises:
            LedgerError: nothing was written.
        """
        data = request.data
        with self._explained("written"), self._transaction():
            self._connection.execute(
                "INSERT INTO key (key_id, scheme, key_type, certificate_type, evse_id, algorithm, common_name,"
                " organization_name, country_name, state, created_at, public, private)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    key.key_id,
                    key.scheme,
                    str(key.key_type),
                    data.certificate_type,
                    request.evse_id or "",
                    request.algorithm,
                    data.common_name,
                    data.organization_name,
                    data.country_name,
                    state,
                    now,
                    key.public,
                    key.private,
                ),
            )
            self._connection.execute(
                "INSERT INTO answer (canonical_id, request_id, digest, key_id, csr, answered_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (request.id.lower(), request.id, content_digest(request), key.key_id, csr, now),
            )
            self._write_delivered()

    def record_rejection(self, request_id: str, *, reason: str, message: str, now: int) -> None:
        """Write down why a request was refused. The oldest beyond `MAX_REJECTIONS` are forgotten."""
        with self._explained("written"), self._transaction():
            cursor = self._connection.execute(
                "INSERT INTO rejection (request_id, reason, message, at) VALUES (?, ?, ?, ?)",
                (request_id, reason, message, now),
            )
            self._connection.execute(
                "DELETE FROM rejection WHERE seq <= ?", ((cursor.lastrowid or 0) - MAX_REJECTIONS,)
            )
            self._write_delivered()

    def mark_delivered(self, request_id: str) -> None:
        """Note that the broker has the answer.

        Written with the next transaction: forgotten in a crash, the same answer is only published once more.
        """
        self._delivered.append(request_id.lower())

    def undelivered(self) -> list[Answered]:
        """The accepted answers that no broker has confirmed, oldest first."""
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT request_id, digest, csr, key_id FROM answer WHERE delivered = 0 ORDER BY answered_at"
            ).fetchall()
        return [Answered(*row) for row in rows]

    def _write_delivered(self) -> None:
        # Left in the list until the transaction is through would be safer still, but repeating an answer is harmless.
        delivered, self._delivered = self._delivered, []
        self._connection.executemany(
            "UPDATE answer SET delivered = 1 WHERE canonical_id = ?", [(request_id,) for request_id in delivered]
        )

    # Keys.

    def keys(self, prefix: str = "") -> list[KeyRecord]:
        """The keys whose name begins with `prefix`, oldest first."""
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT key_id, scheme, key_type, certificate_type, evse_id, algorithm, common_name,"
                " organization_name, country_name, state, created_at, public,"
                " (SELECT group_concat(request_id, ' ') FROM answer WHERE answer.key_id = key.key_id)"
                " FROM key WHERE substr(key_id, 1, ?) = ? ORDER BY created_at, key_id",
                (len(prefix), prefix.lower()),
            ).fetchall()
        return [
            KeyRecord(
                key_id=row[0],
                scheme=row[1],
                key_type=row[2],
                certificate_type=row[3],
                evse_id=row[4] or None,
                algorithm=row[5],
                common_name=row[6],
                organization_name=row[7],
                country_name=row[8],
                state=row[9],
                created_at=row[10],
                public=row[11],
                request_ids=tuple((row[12] or "").split()),
            )
            for row in rows
        ]

    def client_id(self) -> str:
        """The MQTT client identifier of this state directory, made at first use: the broker keeps a session by it."""
        with self._explained("written"), self._transaction():
            self._connection.execute(
                "INSERT OR IGNORE INTO meta (name, value) VALUES ('mqtt_client_id', ?)",
                (f"stationkey-{uuid.uuid4().hex[:12]}",),
            )
            (value,) = self._connection.execute("SELECT value FROM meta WHERE name = 'mqtt_client_id'").fetchone()
        return str(value)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self, act: str) -> Iterator[None]:
        """Turn what SQLite and the file system say into the words of this project."""
        try:
            yield
        except OSError as error:
            raise LedgerError(
                f"the ledger {self._path} cannot be {act}: {error.strerror}", reason="ledger_unusable"
            ) from None
        except sqlite3.Error as error:
            reason, hint = _REASONS.get(getattr(error, "sqlite_errorname", ""), ("ledger_error", ""))
            raise LedgerError(f"the ledger {self._path} cannot be {act}: {error}", reason=reason, hint=hint) from None


_DAMAGED: Final = (
    "ledger_damaged",
    "nothing was overwritten; restore a backup of the state directory, or move the file away to begin anew",
)
_REASONS: Final = {
    "SQLITE_FULL": ("disk_full", "make room; requests are served again as soon as there is some"),
    "SQLITE_READONLY": ("ledger_read_only", "the state directory must be writable"),
    "SQLITE_CANTOPEN": ("ledger_unusable", "does the state directory exist, and may this user write there?"),
    "SQLITE_NOTADB": _DAMAGED,
    "SQLITE_CORRUPT": _DAMAGED,
}
