"""The ledger: what was asked, what was answered, and the keys, in one SQLite database.

A key and the answer that carries its CSR are written in one transaction, on disk before the answer is published. So an
id that comes again, also after a restart, gets the CSR it got before; and there is no key without the record of why it
was made. ``synchronous=FULL`` makes a commit survive a loss of power; write-ahead logging lets the ``keys`` commands
read while the daemon writes.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from stationkey.errors import LedgerError
from stationkey.lifecycle import INITIAL, KeyEvent, KeyState, step
from stationkey.messages import GenerateCsrRequest
from stationkey.migrations import MIGRATIONS, SCHEMA_VERSION
from stationkey.profiles import EllipticCurve, KeyType, RsaModulus
from stationkey.terms import Bounds

if TYPE_CHECKING:
    from stationkey.keystore import KeyRef

DATABASE_NAME: Final = "ledger.sqlite3"

MAX_REJECTIONS: Final = 10_000
"""How many refused requests are remembered: the oldest go first. A few hundred bytes each, so some MiB at the most."""

_BATCH: Final = 100
"""How many keys one step of cleaning up takes, so that a request waits for no more than that."""


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

    @property
    def destroyed(self) -> bool:
        """Whether the key is gone; the CSR then is, too."""
        return not self.csr


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """A key on record, without its private part.

    Attributes:
        created_at: Unix time in milliseconds, by the station's clock, which may have been wrong.
        evse_id: the EVSE that the key is for, or None.
        public: subjectPublicKeyInfo in DER.
        due: when its time is over, in milliseconds of the station's running time (see `Ledger.running`); None where it
            has no end.
        failed: whether an installation of its certificate failed.
        chain: the installed certificate and its chain in PEM, or None where they are not known.
        not_after: when the certificate expires, Unix time in seconds, or None.
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
    state: KeyState
    created_at: int
    public: bytes
    due: int | None
    failed: bool
    chain: str | None
    not_after: int | None
    request_ids: tuple[str, ...]

    @property
    def owner(self) -> tuple[str, str]:
        """Certificate type and EVSE ID (or an empty text): what there is one active key for."""
        return self.certificate_type, self.evse_id or ""


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something that happened to a key.

    Attributes:
        at: Unix time in milliseconds, by the station's clock, which may have been wrong; the order is that of `seq`.
        event: a `KeyEvent`, or ``CSR answered``.
        state: the key's state after it.
        message_id: of the message that brought it, or None.
    """

    seq: int
    at: int
    event: str
    state: str
    reason: str
    message_id: str | None


def read_key_type(text: str) -> KeyType:
    """A key type, from the text that it is written down as."""
    return RsaModulus(int(text.removeprefix("RSA-"))) if text.startswith("RSA-") else EllipticCurve(text)


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


class Ledger:
    """One connection to the database. May be handed from thread to thread, but used by one at a time.

    Args:
        path: the database file; made, with mode 0600, where it is missing.
        read_only: write nothing; implies not `make`.
        make: make the database where it is missing, and bring one of an older version up to date. For the daemon, which
            has the state directory to itself; a command beside it must not do so under a daemon of the older version.

    Raises:
        LedgerError: it cannot be opened, is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path, *, read_only: bool = False, make: bool = True) -> None:
        self.path = path
        self._delivered: list[str] = []
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
            # Looked at by a connection that cannot write, so that one that is refused stays as it is, byte for byte:
            # a connection that can write empties the write-ahead log as it closes.
            self._connection = self._connect("ro")
            try:
                version = self._check(migrate=make)
                if not read_only:
                    self._connection.close()
                    self._connection = self._connect("rw")
                    self._connection.execute("PRAGMA foreign_keys=ON")
                    self._connection.execute("PRAGMA journal_mode=WAL")
                    self._connection.execute("PRAGMA synchronous=FULL")
                    self._connection.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten with zeros
                    self._connection.execute("PRAGMA temp_store=MEMORY")  # no copy of it in a temporary file
                    self._migrate(version)
            except BaseException:
                self._connection.close()
                raise

    def _connect(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=5.0,
        )

    def _check(self, *, migrate: bool) -> int:
        """Look for damage, and at the version, before anything is written. Milliseconds: the database is bounded."""
        complaints = [row[0] for row in self._connection.execute("PRAGMA quick_check(1)")]
        if complaints != ["ok"]:
            reason, hint = _DAMAGED
            raise LedgerError(f"the ledger {self.path} is damaged: {complaints[0]}", reason=reason, hint=hint)
        version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
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
        return version

    def _migrate(self, version: int) -> None:
        for number in range(version, SCHEMA_VERSION):
            with self._transaction():
                for statement in MIGRATIONS[number].split(";\n"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version={number + 1}")

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

    def record_answer(
        self, request: GenerateCsrRequest, key: KeyRef, csr: str, *, now: int, running: int, due: int, bounds: Bounds
    ) -> list[str]:
        """Write down a key and the answer that carries its CSR, durably and both or neither.

        Args:
            request: the request answered.
            key: the key made for it, wrapped private part included.
            csr: the PEM.
            now: Unix time in milliseconds.
            running: the running time now, in milliseconds.
            due: when the key expires if no certificate comes, in milliseconds of running time.
            bounds: how many keys may be pending.

        Returns:
            The names of older pending keys that had to make room, and are destroyed.

        Raises:
            LedgerError: nothing was written.
        """
        data = request.data
        with self._explained("written"), self._transaction():
            self._connection.execute(
                "INSERT INTO key (key_id, scheme, key_type, certificate_type, evse_id, algorithm, common_name,"
                " organization_name, country_name, state, created_at, public, private, due)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
                    INITIAL,
                    now,
                    key.public,
                    key.private,
                    due,
                ),
            )
            self._connection.execute(
                "INSERT INTO answer (canonical_id, request_id, digest, key_id, csr, answered_at, running)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (request.id.lower(), request.id, content_digest(request), key.key_id, csr, now, running),
            )
            self._note(key.key_id, "CSR answered", INITIAL, reason="", now=now, message_id=request.id)
            crowded = self._make_room(
                "certificate_type = ? AND evse_id = ?",
                (data.certificate_type, request.evse_id or ""),
                limit=bounds.pending_limit,
                now=now,
            )
            # After its own: where one of those went, nobody else's has to.
            crowded += self._make_room("TRUE", (), limit=bounds.pending_total, now=now)
            self._write_delivered()
        return crowded

    def withdraw(self, request_id: str, *, now: int) -> None:
        """Take back an answer that must not go out: its key is destroyed, and its id may be asked again.

        Raises:
            LedgerError: nothing was written.
        """
        with self._explained("written"), self._transaction():
            row = self._connection.execute(
                "SELECT key_id FROM answer WHERE canonical_id = ?", (request_id.lower(),)
            ).fetchone()
            if row is None:
                return
            self._apply(row[0], KeyEvent.EXPIRED, reason="its CSR did not verify", now=now)
            self._connection.execute("DELETE FROM answer WHERE canonical_id = ?", (request_id.lower(),))

    def _make_room(self, where: str, arguments: tuple[str, ...], *, limit: int, now: int) -> list[str]:
        """End the oldest pending keys beyond `limit`."""
        (pending,) = self._connection.execute(
            f"SELECT count(*) FROM key WHERE state = ? AND {where}",  # noqa: S608 - `where` is this module's own text
            (INITIAL, *arguments),
        ).fetchone()
        if pending <= limit:
            return []
        rows = self._connection.execute(
            "SELECT key.key_id FROM key JOIN event ON event.key_id = key.key_id AND event.event = 'CSR answered'"  # noqa: S608 - `where` is this module's own text
            f" WHERE key.state = ? AND {where} ORDER BY event.seq DESC LIMIT -1 OFFSET ?",
            (INITIAL, *arguments, limit),
        ).fetchall()
        for (key_id,) in rows:
            self._apply(key_id, KeyEvent.EXPIRED, reason="too many keys were pending", now=now)
        return [key_id for (key_id,) in rows]

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
        """The keys whose name begins with `prefix`, in the order in which they were made."""
        return self._select("substr(key.key_id, 1, ?) = ?", len(prefix), prefix.lower())

    def pending(self, certificate_type: str, evse_id: str | None) -> list[KeyRecord]:
        """The keys in pre-activation for a certificate type, newest last; of one EVSE, or of all where it is None."""
        return self._owned(certificate_type, evse_id, KeyState.PRE_ACTIVATION)

    def active(self, certificate_type: str, evse_id: str | None) -> list[KeyRecord]:
        """The active keys for a certificate type; of one EVSE, or of all where it is None."""
        return self._owned(certificate_type, evse_id, KeyState.ACTIVE)

    def deactivated(self, certificate_type: str, evse_id: str | None) -> list[KeyRecord]:
        """The deactivated keys for a certificate type; of one EVSE, or of all where it is None."""
        return self._owned(certificate_type, evse_id, KeyState.DEACTIVATED)

    def usable(self) -> list[KeyRecord]:
        """The keys that still have a private part."""
        return self._select("key.private IS NOT NULL")

    def key_ref(self, key_id: str) -> KeyRef | None:
        """A key with its private part; None where it has none any more."""
        from stationkey.keystore import KeyRef  # noqa: PLC0415 - `keys list` does without

        with self._explained("read"):
            row = self._connection.execute(
                "SELECT scheme, key_type, public, private FROM key WHERE key_id = ? AND private IS NOT NULL", (key_id,)
            ).fetchone()
        if row is None:
            return None
        return KeyRef(scheme=row[0], key_type=read_key_type(row[1]), public=row[2], private=row[3])

    def history(self, key_id: str) -> list[EventRecord]:
        """Everything that happened to a key, first to last."""
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT seq, at, event, state, reason, message_id FROM event WHERE key_id = ? ORDER BY seq", (key_id,)
            ).fetchall()
        return [EventRecord(*row) for row in rows]

    def active_files(self) -> dict[tuple[str, str], bytes]:
        """What the file of each owner under ``active/`` should hold: key, then leaf and chain where they are known."""
        files = {}
        for key in self._select("state = ?", KeyState.ACTIVE):
            if (reference := self.key_ref(key.key_id)) is not None:
                files[key.owner] = reference.pem() + (key.chain or "").encode()
        return files

    def counts_as_repeat(self, message_id: str) -> bool:
        """Whether a message has brought an event before: the broker, or Josev, sent it again."""
        with self._explained("read"):
            row = self._connection.execute(
                "SELECT 1 FROM event WHERE message_id = ? AND event != 'CSR answered' LIMIT 1", (message_id,)
            ).fetchone()
        return row is not None

    def installations(self, owner: tuple[str, str]) -> dict[str, tuple[int, int | None]]:
        """The keys of `owner` that were ever active: when the certificate of each was installed, and when deleted.

        The times are numbers of events; a certificate that was never reported as deleted has None.
        """
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT key.key_id, max(seq) FILTER (WHERE event = ?) AS installed, max(seq) FILTER (WHERE event = ?)"
                " FROM key JOIN event USING (key_id) WHERE certificate_type = ? AND evse_id = ?"
                " GROUP BY key.key_id HAVING installed IS NOT NULL",
                (KeyEvent.INSTALLED, KeyEvent.DELETED, *owner),
            ).fetchall()
        return {key_id: (installed, deleted) for key_id, installed, deleted in rows}

    def _owned(self, certificate_type: str, evse_id: str | None, state: KeyState) -> list[KeyRecord]:
        return self._select(
            "certificate_type = ? AND (? IS NULL OR evse_id = ?) AND state = ?",
            certificate_type,
            evse_id,
            evse_id,
            state,
        )

    def _select(self, where: str, *arguments: object) -> list[KeyRecord]:
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT key_id, scheme, key_type, certificate_type, evse_id, algorithm, common_name,"  # noqa: S608 - `where` is this module's own text
                " organization_name, country_name, state, created_at, public, due, failed, chain, not_after,"
                " (SELECT group_concat(request_id, ' ') FROM answer WHERE answer.key_id = key.key_id)"
                f" FROM key WHERE {where}"
                " ORDER BY (SELECT min(seq) FROM event WHERE event.key_id = key.key_id)",
                arguments,
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
                state=KeyState(row[9]),
                created_at=row[10],
                public=row[11],
                due=row[12],
                failed=bool(row[13]),
                chain=row[14],
                not_after=row[15],
                request_ids=tuple((row[16] or "").split()),
            )
            for row in rows
        ]

    # A key's life.

    def is_due(self, key_id: str, running: int) -> bool:
        """Whether a key's time is over: another event may have changed that since `due` said so."""
        with self._explained("read"):
            row = self._connection.execute(
                "SELECT 1 FROM key WHERE key_id = ? AND due <= ?", (key_id, running)
            ).fetchone()
        return row is not None

    def apply(
        self,
        key_id: str,
        event: KeyEvent,
        *,
        reason: str,
        now: int,
        due: int | None = None,
        message_id: str | None = None,
    ) -> KeyState:
        """Write down an event and the state that it leads to; where that is destroyed, the private part is wiped.

        Args:
            key_id: the key.
            event: what happened.
            reason: why, for the history.
            now: Unix time in milliseconds.
            due: when the key's time is over from now on, in milliseconds of running time.
            message_id: of the message that brought it.

        Raises:
            IllegalTransition: the event cannot happen to the key; nothing was written.
            LedgerError: nothing was written.
        """
        with self._explained("written"), self._transaction():
            state = self._apply(key_id, event, reason=reason, now=now, due=due, message_id=message_id)
        if state is KeyState.DESTROYED:
            # It is done, whether or not this succeeds; the daemon tries again with every sweep.
            with suppress(LedgerError):
                self.checkpoint()
        return state

    def activate(
        self,
        key_id: str,
        *,
        chain: str | None,
        not_after: int | None,
        reason: str,
        now: int,
        grace_due: int,
        message_id: str | None,
    ) -> list[str]:
        """Make a key the active one of its owner, in one transaction with the end of the one before it.

        Args:
            key_id: the key whose certificate was installed.
            chain: certificate and chain in PEM, where they are known.
            not_after: when the certificate expires, Unix time in seconds.
            reason: for the history.
            now: Unix time in milliseconds.
            grace_due: when the grace period of the replaced key ends, in milliseconds of running time.
            message_id: of the message that said so.

        Returns:
            The names of the keys that were replaced.

        Raises:
            IllegalTransition: the key is in no state to be activated; nothing was written.
            LedgerError: nothing was written.
        """
        with self._explained("written"), self._transaction():
            self._apply(key_id, KeyEvent.INSTALLED, reason=reason, now=now, message_id=message_id)
            self._connection.execute(
                "UPDATE key SET chain = ?, not_after = ? WHERE key_id = ?", (chain, not_after, key_id)
            )
            replaced = [
                row[0]
                for row in self._connection.execute(
                    "SELECT other.key_id FROM key AS other JOIN key AS own ON own.key_id = ?"
                    " AND other.certificate_type = own.certificate_type AND other.evse_id = own.evse_id"
                    " WHERE other.state = ? AND other.key_id != own.key_id",
                    (key_id, KeyState.ACTIVE),
                )
            ]
            for other in replaced:
                self._apply(other, KeyEvent.REPLACED, reason=f"by {key_id}", now=now, due=grace_due)
        return replaced

    def _apply(
        self,
        key_id: str,
        event: KeyEvent,
        *,
        reason: str,
        now: int,
        due: int | None = None,
        message_id: str | None = None,
    ) -> KeyState:
        row = self._connection.execute("SELECT state FROM key WHERE key_id = ?", (key_id,)).fetchone()
        if row is None:
            raise LedgerError(f"there is no key {key_id} on record", reason="key_not_found")
        state = step(KeyState(row[0]), event)
        self._connection.execute("UPDATE key SET state = ?, due = ? WHERE key_id = ?", (state, due, key_id))
        if event is KeyEvent.INSTALLATION_FAILED:
            self._connection.execute("UPDATE key SET failed = 1 WHERE key_id = ?", (key_id,))
        if state is KeyState.DESTROYED:
            # secure_delete overwrites with zeros where they were; the CSR of a key that is gone is of no use either.
            self._connection.execute("UPDATE key SET private = NULL WHERE key_id = ?", (key_id,))
            self._connection.execute("UPDATE answer SET csr = '', delivered = 1 WHERE key_id = ?", (key_id,))
        self._note(key_id, event, state, reason=reason, now=now, message_id=message_id)
        return state

    def _note(self, key_id: str, event: str, state: KeyState, *, reason: str, now: int, message_id: str | None) -> None:
        self._connection.execute(
            "INSERT INTO event (key_id, at, event, state, reason, message_id) VALUES (?, ?, ?, ?, ?, ?)",
            (key_id, now, event, state, reason, message_id),
        )

    def checkpoint(self) -> bool:
        """Move everything out of the write-ahead log and empty it, so that nothing wiped is left in there.

        Returns:
            Whether it is empty; a reader may be in the way, and then it is to be tried again.
        """
        with self._explained("written"):
            (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    def wipe(self) -> bool:
        """Write the database anew, if a key was destroyed since the last time, so that no trace of one is left in it.

        secure_delete zeroes what is deleted where it is. But where rows were moved from page to page before, SQLite may
        leave pieces of them in the unused part of a page. Milliseconds, because the database is bounded; and a flood of
        requests then leaves no large file behind.

        Returns:
            Whether there was something to do.
        """
        with self._explained("written"):
            (destroyed,) = self._connection.execute(
                "SELECT coalesce(max(seq), 0) FROM event WHERE state = ?", (KeyState.DESTROYED,)
            ).fetchone()
            wiped = self._connection.execute("SELECT value FROM meta WHERE name = 'wiped'").fetchone()
            if destroyed <= (0 if wiped is None else int(wiped[0])):
                return False
            self._connection.execute("VACUUM")
            with self._transaction():
                self._connection.execute(
                    "INSERT OR REPLACE INTO meta (name, value) VALUES ('wiped', ?)", (str(destroyed),)
                )
        self.checkpoint()
        return True

    # Time, and what it ends.

    @property
    def running(self) -> int:
        """How long the daemon has run with this ledger, all its runs together, in milliseconds, as last written down.

        Keys expire by this and not by the clock: a station's clock may be hours or years off until it has been set.
        """
        with self._explained("read"):
            row = self._connection.execute("SELECT value FROM meta WHERE name = 'running'").fetchone()
        return 0 if row is None else int(row[0])

    def write_running(self, milliseconds: int) -> None:
        """Write down the running time. It never goes back."""
        with self._explained("written"), self._transaction():
            self._connection.execute(
                "INSERT INTO meta (name, value) VALUES ('running', ?)"
                " ON CONFLICT (name) DO UPDATE SET value = max(CAST(value AS INTEGER), ?)",
                (str(milliseconds), milliseconds),
            )
            self._write_delivered()

    def adopt(self, *, pending_due: int, grace_due: int) -> None:
        """Give an end to pending and deactivated keys that have none: of an older ledger, or retired by hand."""
        with self._explained("written"), self._transaction():
            self._connection.executemany(
                "UPDATE key SET due = ? WHERE due IS NULL AND state = ?",
                [(pending_due, KeyState.PRE_ACTIVATION), (grace_due, KeyState.DEACTIVATED)],
            )

    def due(self, running: int) -> list[str]:
        """The keys whose time is over."""
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT key_id FROM key WHERE due <= ? ORDER BY due LIMIT ?", (running, _BATCH)
            ).fetchall()
        return [row[0] for row in rows]

    def next_due(self) -> int | None:
        """When the next key's time is over, in milliseconds of running time; None where there is none."""
        with self._explained("read"):
            row = self._connection.execute("SELECT min(due) FROM key").fetchone()
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
        with self._explained("written"), self._transaction():
            answers = self._connection.execute(
                "DELETE FROM answer WHERE canonical_id IN (SELECT canonical_id FROM answer JOIN key USING (key_id)"
                " WHERE answer.running < ? AND key.state != ? LIMIT ?)",
                (answered_before, KeyState.PRE_ACTIVATION, _BATCH),
            ).rowcount
            forgotten = [
                row[0]
                for row in self._connection.execute(
                    "SELECT key.key_id FROM key WHERE state = ?"
                    " ORDER BY (SELECT max(seq) FROM event WHERE event.key_id = key.key_id) DESC LIMIT ? OFFSET ?",
                    (KeyState.DESTROYED, _BATCH, keep),
                )
            ]
            for key_id in forgotten:
                self._connection.execute("DELETE FROM event WHERE key_id = ?", (key_id,))
                self._connection.execute("DELETE FROM answer WHERE key_id = ?", (key_id,))
                self._connection.execute("DELETE FROM key WHERE key_id = ?", (key_id,))
        return len(forgotten) + answers

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
                f"the ledger {self.path} cannot be {act}: {error.strerror}", reason="ledger_unusable"
            ) from None
        except sqlite3.Error as error:
            reason, hint = _REASONS.get(getattr(error, "sqlite_errorname", ""), ("ledger_error", ""))
            raise LedgerError(f"the ledger {self.path} cannot be {act}: {error}", reason=reason, hint=hint) from None


_DAMAGED: Final = (
    "ledger_damaged",
    "nothing was overwritten; restore a backup of the state directory, or move the file away to begin anew",
)
_REASONS: Final = {
    "SQLITE_FULL": ("disk_full", "make room; requests are served again as soon as there is some"),
    "SQLITE_IOERR_SHMSIZE": ("disk_full", "make room; requests are served again as soon as there is some"),
    "SQLITE_BUSY": ("ledger_busy", "does a stationkey keys command hold it?"),
    "SQLITE_READONLY": ("ledger_read_only", "the state directory must be writable"),
    "SQLITE_CANTOPEN": ("ledger_unusable", "does the state directory exist, and may this user write there?"),
    "SQLITE_NOTADB": _DAMAGED,
    "SQLITE_CORRUPT": _DAMAGED,
}
