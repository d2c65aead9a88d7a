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
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from stationkey.config.settings import Bounds
from stationkey.contract.messages import GenerateCsrRequest
from stationkey.contract.profiles import EllipticCurve, KeyType, RsaModulus
from stationkey.errors import LedgerError, Scope, StationKeyError
from stationkey.ledger.lifecycle import CSR_ANSWERED, INITIAL, MADE_AHEAD, IllegalTransition, KeyEvent, KeyState, step
from stationkey.ledger.migrations import MIGRATIONS, SCHEMA_VERSION

if TYPE_CHECKING:
    from stationkey.keystore import KeyRef


MAX_REJECTIONS: Final = 10_000
"""How many refused requests are remembered: the oldest go first. A few hundred bytes each, so some MiB at the most."""

_BATCH: Final = 25
"""How many keys or answers one step of cleaning up takes: a request waits for no more than one step."""

_PART: Final = 1000
"""How many ids are read, and how many rejections written, at a time."""

_MAKING: Final = "seconds to make "
"""Begins the name of a value in `meta`; the type of a key follows."""

_DUE: Final = 100
"""How many keys whose time is over are named at a time."""

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

_LIVING: Final = "state != 'destroyed'"
"""What a query of the living keys must say, so that SQLite takes the index of them."""


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
        asked: the number of the event by which it was given to its owner; 0 where it was made ahead and has none.
        installed: the number of the event by which it became active, or 0.
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
    asked: int
    installed: int
    request_ids: tuple[str, ...]

    @property
    def owner(self) -> tuple[str, str]:
        """Certificate type and EVSE ID (or an empty text): what there is one active key for."""
        return self.certificate_type, self.evse_id or ""

    @property
    def has_owner(self) -> bool:
        """False of a key that was made ahead and that no request has taken yet: all its names are empty."""
        return bool(self.certificate_type)


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something that happened to a key.

    Attributes:
        at: Unix time in milliseconds, by the station's clock, which may have been wrong; the order is that of `seq`.
        event: a `KeyEvent`, ``CSR answered`` or ``made ahead``.
        state: the key's state after it.
        message_id: of the message that brought it, or None.
    """

    seq: int
    at: int
    event: str
    state: str
    reason: str
    message_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How much there is on record.

    Attributes:
        keys: how many keys that live have an owner, by state and certificate type.
        expiries: of the active keys whose certificate is known: certificate type, EVSE ID or an empty text, and when
            the certificate expires, Unix time in seconds. Those that expire first, and first.
        unknown: of how many more active keys nothing is said in `expiries`.
        destroyed: how many destroyed keys are on record still.
        size: of the database and its write-ahead log, in bytes.
    """

    keys: Mapping[tuple[str, str], int]
    expiries: tuple[tuple[str, str, int], ...]
    unknown: int
    destroyed: int
    size: int


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
        alone: nobody else has it open, and it has no write-ahead log: so no file is made beside it even to read. With
            `read_only`.

    Raises:
        LedgerError: it cannot be opened, is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path, *, read_only: bool = False, make: bool = True, alone: bool = False) -> None:
        self.path = path
        self._names = tuple(f"{path}{suffix}" for suffix in ("", "-wal", "-shm"))
        self._delivered: deque[str] = deque()
        self._patient = True
        self.trouble = ""
        """Reason of the last failure, until something is written again. May be looked at from any thread."""
        self._rejections: deque[tuple[str, str, str, int]] = deque(maxlen=MAX_REJECTIONS)
        self._noting = threading.Lock()
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
            reason, hint = _DAMAGED
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
            with self._transaction():
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
        """Write down what is still to be, and close."""
        with self._explained("closed"):
            if self._delivered:
                with self._transaction():
                    self._write_delivered()
            with suppress(LedgerError):  # not worth more trouble than whoever closes has already
                while self.write_rejections():
                    pass
            self._connection.close()

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

    # Answers.

    def find_answer(self, request_id: str) -> Answered | None:
        """The accepted answer to `request_id` in any letter case, or None."""
        with self._explained("read"):
            row = self._connection.execute(
                "SELECT request_id, digest, csr, key_id FROM answer JOIN key ON key.number = answer.key_number"
                " WHERE canonical_id = ?",
                (request_id.lower(),),
            ).fetchone()
        return None if row is None else Answered(*row)

    def answered_ids(self, *, after: str = "") -> list[str]:
        """Ids that were answered, in lower case and in order, a part at a time: those that come after `after`."""
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT canonical_id FROM answer WHERE canonical_id > ? ORDER BY canonical_id LIMIT ?", (after, _PART)
            ).fetchall()
        return [row[0] for row in rows]

    def record_answer(
        self,
        request: GenerateCsrRequest,
        key: KeyRef,
        csr: str,
        *,
        now: int,
        running: int,
        due: int,
        bounds: Bounds,
        ahead: bool = False,
    ) -> list[str]:
        """Write down a key and the answer that carries its CSR, durably and both or neither.

        A key that was made ahead gets its owner by this; any other is put on record.

        Args:
            request: the request answered.
            key: the key made for it, or taken from those made ahead, wrapped private part included.
            csr: the PEM.
            now: Unix time in milliseconds.
            running: the running time now, in milliseconds.
            due: when the key expires if no certificate comes, in milliseconds of running time.
            bounds: how many keys may be pending.
            ahead: whether the key was made ahead: then it is on record, and must have no owner yet.

        Returns:
            The names of older pending keys that had to make room, and are destroyed.

        Raises:
            LedgerError: nothing was written. With reason ``key_taken``, the key has an owner already, or was made ahead
                and is destroyed since: another one can be tried.
        """
        data = request.data
        owner = (data.certificate_type, request.evse_id or "")
        with self._explained("written"), self._transaction():
            number = self._give_owner(request, key, now=now, due=due, ahead=ahead)
            self._connection.execute(
                "INSERT INTO answer (key_number, canonical_id, request_id, digest, csr, answered_at, running)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (number, request.id.lower(), request.id, content_digest(request), csr, now, running),
            )
            self._note(number, CSR_ANSWERED, INITIAL, reason="", now=now, message_id=request.id)
            crowded = self._make_room(owner, bounds, now=now)
            self._write_delivered()
        return crowded

    def withdraw(self, request_id: str, *, now: int) -> None:
        """Take back an answer that must not go out: its key is destroyed, and its id may be asked again.

        Raises:
            LedgerError: nothing was written.
        """
        with self._explained("written"), self._transaction():
            answered = self.find_answer(request_id)
            if answered is None:
                return
            self._apply(answered.key_id, KeyEvent.EXPIRED, reason="its CSR did not verify", now=now)
            self._connection.execute("DELETE FROM answer WHERE canonical_id = ?", (request_id.lower(),))

    def _give_owner(self, request: GenerateCsrRequest, key: KeyRef, *, now: int, due: int, ahead: bool) -> int:
        """Put a key on record with its owner, or give one to a key that was made ahead; the key's number.

        Raises:
            LedgerError: the key has an owner, or is gone.
        """
        owner = {
            "key_id": key.key_id,
            "certificate_type": request.data.certificate_type,
            "evse_id": request.evse_id or "",
            "algorithm": request.algorithm,
            "common_name": request.data.common_name,
            "organization_name": request.data.organization_name,
            "country_name": request.data.country_name,
            "due": due,
        }
        if ahead:
            taken = self._connection.execute(_NEW_OWNER, owner).fetchone()
            if taken is not None:
                return int(taken[0])
        else:
            cursor = self._connection.execute(_NEW_KEY, {**owner, **_made(key, now)})
            if cursor.rowcount:
                return self._keep_secret(cursor, key)
        raise LedgerError(f"key {key.key_id} has an owner already, or is gone", reason="key_taken", scope=Scope.KEY)

    def _keep_secret(self, inserted: sqlite3.Cursor, key: KeyRef) -> int:
        """Write down the private part of a key whose row was just inserted; the key's number."""
        number = inserted.lastrowid
        assert number is not None
        self._connection.execute("INSERT INTO secret (key_number, private) VALUES (?, ?)", (number, key.private))
        return number

    def _make_room(self, owner: tuple[str, str], bounds: Bounds, *, now: int) -> list[str]:
        """End the oldest pending keys beyond the bounds; those made ahead are none of them."""
        pending = f"SELECT count(*) FROM key WHERE state = ?1 AND {_LIVING} AND certificate_type"  # noqa: S608 - `_LIVING` is this module's own text
        own, every = self._connection.execute(
            f"SELECT ({pending} = ?2 AND evse_id = ?3), ({pending} > '')", (INITIAL, *owner)
        ).fetchone()
        crowded = []
        if own > bounds.pending_limit:
            crowded = self._end_oldest(owner, count=own - bounds.pending_limit, now=now)
        # After its own: where one of those went, nobody else's has to.
        for _ in range(every - len(crowded) - bounds.pending_total):
            crowded += self._end_oldest(self._most_crowded(owner), count=1, now=now)
        return crowded

    def _most_crowded(self, newest: tuple[str, str]) -> tuple[str, str]:
        """The owner who loses a pending key for the one that `newest` just got, and has another one to lose.

        Of the certificate type that has the most of them: what is asked of one type never costs another type a key,
        unless that has more. In it, of an EVSE that has no key in use, before one that does: EVSE IDs are quickly made
        up. Then of the one that has the most, and of several such whoever has the oldest.
        """
        owners = self._connection.execute(_PENDING_OWNERS, {"pending": INITIAL, "active": KeyState.ACTIVE}).fetchall()
        others = [row[:2] for row in owners if row[:2] != newest or row[2] > 1]
        return others[0] if others else newest

    def _end_oldest(self, owner: tuple[str, str], *, count: int, now: int) -> list[str]:
        rows = self._connection.execute(
            f"SELECT key_id FROM key WHERE state = ? AND certificate_type = ? AND evse_id = ? AND {_LIVING}"  # noqa: S608 - `_LIVING` is this module's own text
            " ORDER BY asked LIMIT ?",
            (INITIAL, *owner, count),
        ).fetchall()
        for (key_id,) in rows:
            self._apply(key_id, KeyEvent.EXPIRED, reason="too many keys were pending", now=now)
        return [key_id for (key_id,) in rows]

    def note_rejection(self, request_id: str, *, reason: str, message: str, now: int) -> None:
        """Note why a request was refused. May be called from any thread; nothing waits for the disk.

        `write_rejections` and `close` write it down. Of what was noted and not written, the oldest beyond
        `MAX_REJECTIONS` are forgotten; a crash takes it all.
        """
        with self._noting:
            self._rejections.append((request_id, reason, message, now))

    def write_rejections(self) -> bool:
        """Write down what was noted, a part at a time. The oldest on record beyond `MAX_REJECTIONS` are forgotten.

        Returns:
            Whether there is more.

        Raises:
            LedgerError: nothing was written, and the notes are kept.
        """
        with self._noting:
            part = [self._rejections.popleft() for _ in range(min(_PART, len(self._rejections)))]
        if not part:
            return False
        try:
            with self._explained("written"), self._transaction():
                self._connection.executemany(
                    "INSERT INTO rejection (request_id, reason, message, at) VALUES (?, ?, ?, ?)", part
                )
                self._connection.execute(
                    "DELETE FROM rejection WHERE seq <= (SELECT max(seq) FROM rejection) - ?", (MAX_REJECTIONS,)
                )
                self._write_delivered()
        except BaseException:
            with self._noting:
                room = MAX_REJECTIONS - len(self._rejections)
                self._rejections.extendleft(reversed(part[max(0, len(part) - room) :]))
            raise
        return bool(self._rejections)

    def mark_delivered(self, request_id: str) -> None:
        """Note that the broker has the answer. May be called from any thread.

        Written with the next transaction: forgotten in a crash, the same answer is only published once more.
        """
        self._delivered.append(request_id.lower())

    def undelivered(self) -> list[Answered]:
        """The accepted answers that no broker has confirmed, oldest first."""
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT request_id, digest, csr, key_id FROM answer JOIN key ON key.number = answer.key_number"
                " WHERE delivered = 0 ORDER BY running"
            ).fetchall()
        return [Answered(*row) for row in rows]

    def _write_delivered(self) -> None:
        # Left noted until the transaction is through would be safer still, but repeating an answer is harmless.
        while self._delivered:
            self._connection.execute(
                "UPDATE answer SET delivered = 1 WHERE canonical_id = ?", (self._delivered.popleft(),)
            )

    # Keys made ahead.

    def make_ahead(self, key: KeyRef, *, now: int, due: int, seconds: float) -> None:
        """Put a key on record that has no owner yet, durably: whichever request comes next can take it.

        Args:
            key: the key, wrapped private part included.
            now: Unix time in milliseconds.
            due: when it expires if no request takes it, in milliseconds of running time.
            seconds: how long the key store took over it.

        Raises:
            LedgerError: nothing was written.
        """
        with self._explained("written"), self._transaction():
            cursor = self._connection.execute(
                "INSERT INTO key (key_id, scheme, key_type, state, created_at, public, due)"
                " VALUES (:key_id, :scheme, :key_type, :state, :created_at, :public, :due)",
                {"key_id": key.key_id, "due": due, **_made(key, now)},
            )
            number = self._keep_secret(cursor, key)
            self._note(number, MADE_AHEAD, INITIAL, reason="", now=now, message_id=None)
            self._connection.execute(
                "INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", (_MAKING + str(key.key_type), str(seconds))
            )
            self._write_delivered()

    def seconds_to_make(self) -> dict[str, float]:
        """How long the last key of each type took that was made ahead."""
        with self._explained("read"):
            rows = self._connection.execute("SELECT name, value FROM meta WHERE name > ?", (_MAKING,)).fetchall()
        return {name.removeprefix(_MAKING): float(value) for name, value in rows if name.startswith(_MAKING)}

    def made_ahead(self) -> list[tuple[KeyRef, int]]:
        """The keys made ahead that no request has taken yet, with their private parts, oldest first.

        Returns:
            Each with the time when it is due, in milliseconds of running time.

        Raises:
            LedgerError: they cannot be read.
        """
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT scheme, key_type, public, private, coalesce(due, 0)"  # noqa: S608 - `_LIVING` is this module's own text
                " FROM key JOIN secret ON secret.key_number = key.number"
                f" WHERE state = ? AND certificate_type = '' AND {_LIVING} ORDER BY number",
                (INITIAL,),
            ).fetchall()
        return [(_key_ref(*row), due) for *row, due in rows]

    # Keys.

    def keys(self, prefix: str = "") -> list[KeyRecord]:
        """The keys whose name begins with `prefix`, in the order in which they were made."""
        prefix = prefix.lower()
        # A range, and not LIKE or substr(): the index of the names serves it.
        return self._select("key_id >= ? AND key_id < ?", prefix, prefix + _LAST, order="number")

    def named(self, beginning: str) -> KeyRecord:
        """The one key whose name begins so.

        Raises:
            StationKeyError: there is none, or more than one.
        """
        found = self.keys(beginning) if beginning else []
        if len(found) != 1:
            raise StationKeyError(
                f"{len(found)} keys begin with {beginning}" if found else f"there is no key {beginning}",
                reason="key_not_found",
                hint="stationkey keys list shows them all",
                scope=Scope.KEY,
            )
        return found[0]

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
        """The keys that still have a private part, in the order in which they were made; those made ahead, too."""
        return self._select("number IN (SELECT key_number FROM secret)", order="number")

    def key_ref(self, key_id: str) -> KeyRef | None:
        """A key with its private part; None where it has none any more."""
        with self._explained("read"):
            row = self._connection.execute(
                "SELECT scheme, key_type, public, private FROM key JOIN secret ON secret.key_number = key.number"
                " WHERE key_id = ?",
                (key_id,),
            ).fetchone()
        return None if row is None else _key_ref(*row)

    def history(self, key_id: str) -> list[EventRecord]:
        """Everything that happened to a key, first to last."""
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT seq, at, event, state, reason, message_id FROM event"
                " WHERE key_number = (SELECT number FROM key WHERE key_id = ?) ORDER BY seq",
                (key_id,),
            ).fetchall()
        return [EventRecord(seq, _moment(at, milliseconds=True), *rest) for seq, at, *rest in rows]

    def active_files(self) -> dict[tuple[str, str], bytes]:
        """What the file of each owner under ``active/`` should hold: key, then leaf and chain where they are known."""
        files = {}
        for key in self._select(f"state = ? AND {_LIVING}", KeyState.ACTIVE):
            if (reference := self.key_ref(key.key_id)) is not None:
                files[key.owner] = reference.pem() + (key.chain or "").encode()
        return files

    def figures(self, *, expiries: int) -> Figures:
        """How much there is on record.

        Args:
            expiries: of how many active keys at the most it is told when the certificate expires.

        Raises:
            LedgerError: it cannot be read.
        """
        states = [state for state in KeyState if state is not KeyState.DESTROYED]
        with self._explained("read"):
            counted = self._connection.execute(
                "SELECT state, certificate_type, count(*) FROM key"  # noqa: S608 - `_LIVING` is this module's own text
                f" WHERE state IN ({', '.join('?' * len(states))}) AND certificate_type > '' AND {_LIVING}"
                " GROUP BY state, certificate_type",
                states,
            ).fetchall()
            first = self._connection.execute(
                "SELECT certificate_type, evse_id, not_after FROM key"  # noqa: S608 - `_LIVING` is this module's own text
                f" WHERE state = ? AND not_after IS NOT NULL AND {_LIVING} ORDER BY not_after LIMIT ?",
                (KeyState.ACTIVE, expiries),
            ).fetchall()
            # `ended` has no gaps, and so nothing has to be counted.
            (destroyed,) = self._connection.execute(
                "SELECT coalesce((SELECT max(ended) FROM key WHERE ended IS NOT NULL)"
                " - (SELECT min(ended) FROM key WHERE ended IS NOT NULL) + 1, 0)"
            ).fetchone()
            size = sum(file.stat().st_size for file in (self.path, Path(f"{self.path}-wal")) if file.exists())
        keys = {(state, certificate_type): count for state, certificate_type, count in counted}
        active = sum(count for (state, _), count in keys.items() if state == KeyState.ACTIVE)
        return Figures(
            keys=keys,
            expiries=tuple((kind, evse_id, not_after) for kind, evse_id, not_after in first),
            unknown=active - len(first),
            destroyed=destroyed,
            size=size,
        )

    def counts_as_repeat(self, message_id: str) -> bool:
        """Whether a message has brought an event before: the broker, or Josev, sent it again."""
        with self._explained("read"):
            row = self._connection.execute(
                "SELECT 1 FROM event WHERE message_id = ? AND event != 'CSR answered' LIMIT 1", (message_id,)
            ).fetchone()
        return row is not None

    def others_installed(self, key: KeyRecord) -> bool:
        """Whether a certificate of another key of the same owner may be installed still, as far as is on record.

        That is where one was, and was not reported as deleted before this key's was installed.
        """
        another = (
            "SELECT 1 FROM key WHERE certificate_type = ? AND evse_id = ? AND installed IS NOT NULL AND key_id != ?"
            " AND deleted"
        )
        with self._explained("read"):
            row = self._connection.execute(
                f"{another} IS NULL UNION ALL {another} > ? LIMIT 1",
                (*key.owner, key.key_id, *key.owner, key.key_id, key.installed),
            ).fetchone()
        return row is not None

    def _owned(self, certificate_type: str, evse_id: str | None, state: KeyState) -> list[KeyRecord]:
        if evse_id is None:
            return self._select(f"state = ? AND certificate_type = ? AND {_LIVING}", state, certificate_type)
        return self._select(
            f"state = ? AND certificate_type = ? AND evse_id = ? AND {_LIVING}", state, certificate_type, evse_id
        )

    def _select(self, where: str, *arguments: object, order: str = "asked") -> list[KeyRecord]:
        with self._explained("read"):
            rows = self._connection.execute(
                "SELECT key_id, scheme, key_type, certificate_type, evse_id, algorithm, common_name,"  # noqa: S608 - `where` is this module's own text
                " organization_name, country_name, state, created_at, public, due, failed, chain, not_after, asked,"
                " installed, request_id"
                f" FROM key LEFT JOIN answer ON answer.key_number = key.number WHERE {where} ORDER BY {order}",
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
                state=_state(row[9]),
                created_at=_moment(row[10], milliseconds=True),
                public=row[11],
                due=row[12],
                failed=bool(row[13]),
                chain=row[14],
                not_after=None if row[15] is None else _moment(row[15]),
                asked=row[16] or 0,
                installed=row[17] or 0,
                request_ids=() if row[18] is None else (row[18],),
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
        limit: int | None = None,
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
            limit: how many active keys there may be, where this one replaces none; None for no bound.

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
                    "SELECT key_id FROM key WHERE (certificate_type, evse_id) ="  # noqa: S608 - `_LIVING` is this module's own text
                    " (SELECT certificate_type, evse_id FROM key WHERE key_id = :key_id)"
                    f" AND state = :active AND {_LIVING} AND key_id != :key_id",
                    {"key_id": key_id, "active": KeyState.ACTIVE},
                )
            ]
            if limit is not None and not replaced:
                self._refuse_beyond(limit)
            for other in replaced:
                self._apply(other, KeyEvent.REPLACED, reason=f"by {key_id}", now=now, due=grace_due)
        return replaced

    def _refuse_beyond(self, limit: int) -> None:
        (active,) = self._connection.execute(
            f"SELECT count(*) FROM key WHERE state = ? AND {_LIVING}",  # noqa: S608 - `_LIVING` is this module's own text
            (KeyState.ACTIVE,),
        ).fetchone()
        if active > limit:
            raise LedgerError(
                f"{limit} keys are active, each for another certificate type or EVSE, and more are not allowed",
                reason="too_many_active",
                hint="retire those that are not needed, or see [lifecycle] active_limit",
                scope=Scope.REQUEST,
            )

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
        row = self._connection.execute(
            "SELECT number, state, certificate_type FROM key WHERE key_id = ?", (key_id,)
        ).fetchone()
        if row is None:
            raise LedgerError(f"there is no key {key_id} on record", reason="key_not_found", scope=Scope.KEY)
        number, before, certificate_type = row
        state = step(_state(before), event)
        if not certificate_type and event in {KeyEvent.INSTALLED, KeyEvent.INSTALLATION_FAILED}:
            raise IllegalTransition(
                f"a key that no request has taken cannot have the event '{event}'", reason="illegal_transition"
            )
        if state is KeyState.DESTROYED:
            # secure_delete overwrites with zeros where it was; `wipe` sees to what was moved.
            self._connection.execute("DELETE FROM secret WHERE key_number = ?", (number,))
            self._connection.execute("INSERT OR IGNORE INTO meta (name, value) VALUES ('unwiped', 'yes')")
            if not certificate_type:
                # Nobody ever had it: its history is not worth the place of a key's that somebody had.
                self._connection.execute("DELETE FROM event WHERE key_number = ?", (number,))
                self._connection.execute("DELETE FROM key WHERE number = ?", (number,))
                return state
            # The CSR of a key that is gone is of no use either. Not by UPDATE, which would leave its page as good as
            # empty: after a replacement SQLite joins the page to its neighbours, and the history takes a third less.
            self._connection.execute(
                "REPLACE INTO answer"
                " (key_number, canonical_id, request_id, digest, csr, answered_at, running, delivered)"
                " SELECT key_number, canonical_id, request_id, digest, '', answered_at, running, 1 FROM answer"
                " WHERE key_number = ?",
                (number,),
            )
        seq = self._note(number, event, state, reason=reason, now=now, message_id=message_id)
        also = _ALSO.get(event, "") + (_ENDED if state is KeyState.DESTROYED else "")
        self._connection.execute(
            f"UPDATE key SET state = :state, due = :due{also} WHERE number = :number",  # noqa: S608 - `also` is this module's own text
            {"state": state, "due": due, "seq": seq, "number": number},
        )
        return state

    def _note(
        self, number: int, event: str, state: KeyState, *, reason: str, now: int, message_id: str | None
    ) -> int | None:
        """Write down what happened to a key; the number of that event."""
        return self._connection.execute(
            "INSERT INTO event (key_number, at, event, state, reason, message_id) VALUES (?, ?, ?, ?, ?, ?)",
            (number, now, event, state, reason, message_id),
        ).lastrowid

    def checkpoint(self) -> bool:
        """Move everything out of the write-ahead log and empty it, so that nothing wiped is left in there.

        Returns:
            Whether it is empty; a reader may be in the way, and then it is to be tried again.
        """
        with self._explained("written"):
            (busy, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    def wipe(self) -> bool:
        """Write the private parts anew, if a key was destroyed since the last time, so that no trace of one is left.

        secure_delete zeroes what is deleted where it is. But where rows were moved from page to page before, SQLite may
        leave pieces of them in the unused part of a page. So the table is emptied, which zeroes all of its pages, and
        filled again with the keys that live: what that costs goes by their number and not by the history.

        Returns:
            Whether there was something to do.
        """
        with self._explained("written"):
            if self._connection.execute("SELECT 1 FROM meta WHERE name = 'unwiped'").fetchone() is None:
                return False
            with self._transaction():
                living = self._connection.execute("SELECT key_number, private FROM secret").fetchall()
                # No WHERE, no foreign key, no trigger: so SQLite frees the pages as they are, each zeroed, and does not
                # go from row to row.
                self._connection.execute("DELETE FROM secret")
                self._connection.executemany("INSERT INTO secret (key_number, private) VALUES (?, ?)", living)
                self._connection.execute("DELETE FROM meta WHERE name = 'unwiped'")
        self.checkpoint()
        return True

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
        """Give an end to pending and deactivated keys that have none: of an older ledger, or retired by hand.

        A key made ahead is not pending, and was given its end when it was made.
        """
        with self._explained("written"), self._transaction():
            self._connection.executemany(
                f"UPDATE key SET due = ? WHERE due IS NULL AND state = ? AND certificate_type > '' AND {_LIVING}",  # noqa: S608 - `_LIVING` is this module's own text
                [(pending_due, KeyState.PRE_ACTIVATION), (grace_due, KeyState.DEACTIVATED)],
            )

    def due(self, running: int) -> list[str]:
        """The keys whose time is over."""
        with self._explained("read"):
            rows = self._connection.execute(
                f"SELECT key_id FROM key WHERE due <= ? AND {_LIVING} ORDER BY due LIMIT ?",  # noqa: S608 - `_LIVING` is this module's own text
                (running, _DUE),
            ).fetchall()
        return [row[0] for row in rows]

    def next_due(self) -> int | None:
        """When the next key's time is over, in milliseconds of running time; None where there is none."""
        with self._explained("read"):
            row = self._connection.execute(f"SELECT min(due) FROM key WHERE {_LIVING}").fetchone()  # noqa: S608 - `_LIVING` is this module's own text
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
                "DELETE FROM answer WHERE key_number IN (SELECT key_number FROM answer JOIN key ON number = key_number"
                " WHERE delivered IN (0, 1) AND running < ? AND state != ? LIMIT ?)",
                (answered_before, KeyState.PRE_ACTIVATION, _BATCH),
            ).rowcount
            # `ended` has no gaps, and so nothing has to be counted.
            forgotten = self._connection.execute(
                "SELECT number FROM key WHERE ended <= (SELECT max(ended) FROM key WHERE ended IS NOT NULL) - ?"
                " ORDER BY ended LIMIT ?",
                (keep, _BATCH),
            ).fetchall()
            for statement in (
                "DELETE FROM event WHERE key_number = ?",
                "DELETE FROM answer WHERE key_number = ?",
                "DELETE FROM key WHERE number = ?",
            ):
                self._connection.executemany(statement, forgotten)
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
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error:
            self._be_patient(False)
            raise
        try:
            self._refuse_elsewhere()
            yield
            self._connection.execute("COMMIT")
            self._be_patient(True)
            self.trouble = ""
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

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


def _made(key: KeyRef, now: int) -> dict[str, object]:
    """The columns of a key that was just made, whether it has an owner or not."""
    return {
        "scheme": key.scheme,
        "key_type": str(key.key_type),
        "state": INITIAL,
        "created_at": now,
        "public": key.public,
    }


def _key_ref(scheme: str, key_type: str, public: bytes, private: bytes) -> KeyRef:
    from stationkey.keystore import KeyRef  # noqa: PLC0415 - `keys list` does without

    try:
        read = read_key_type(key_type)
    except ValueError:
        raise _damaged("a type of key") from None
    return KeyRef(scheme=scheme, key_type=read, public=public, private=private)


# What SQLite takes and this program never writes: something else did, or somebody.


def _state(text: str) -> KeyState:
    try:
        return KeyState(text)
    except ValueError:
        raise _damaged("a state of a key") from None


def _moment(time: int, *, milliseconds: bool = False) -> int:
    if not _YEAR_1 <= (time // 1000 if milliseconds else time) <= _YEAR_9999:
        raise _damaged("a time")
    return time


def _damaged(what: str) -> LedgerError:
    reason, hint = _DAMAGED
    return LedgerError(f"the ledger is damaged: {what} in it is none that there can be", reason=reason, hint=hint)


_YEAR_1: Final = -62_135_596_800
_YEAR_9999: Final = 253_402_300_799
"""The first and last second that a certificate can name [RFC 5280 4.1.2.5], or nearly so, and Python; Unix time."""
_LAST: Final = "\U0010ffff"
"""Comes after every other character, in the order of the index."""

_NEXT_EVENT: Final = "(SELECT coalesce(max(seq), 0) + 1 FROM event)"
"""The number that the next event of the same transaction gets."""

_NEW_KEY: Final = (
    "INSERT INTO key (key_id, scheme, key_type, certificate_type, evse_id, algorithm, common_name, organization_name,"  # noqa: S608 - `_NEXT_EVENT` is this module's own text
    " country_name, state, created_at, public, due, asked)"
    " VALUES (:key_id, :scheme, :key_type, :certificate_type, :evse_id, :algorithm, :common_name, :organization_name,"
    f" :country_name, :state, :created_at, :public, :due, {_NEXT_EVENT}) ON CONFLICT (key_id) DO NOTHING"
)
_NEW_OWNER: Final = (
    "UPDATE key SET certificate_type = :certificate_type, evse_id = :evse_id, algorithm = :algorithm,"  # noqa: S608 - `_NEXT_EVENT` is this module's own text
    " common_name = :common_name, organization_name = :organization_name, country_name = :country_name, due = :due,"
    f" asked = {_NEXT_EVENT}"
    " WHERE key_id = :key_id AND certificate_type = '' AND state = 'pre-activation' RETURNING number"
)

_PENDING_OWNERS: Final = (
    "SELECT certificate_type, evse_id, own FROM (SELECT certificate_type, evse_id, count(*) AS own,"  # noqa: S608 - `_LIVING` is this module's own text
    " min(asked) AS oldest, sum(count(*)) OVER (PARTITION BY certificate_type) AS of_type FROM key"
    f" WHERE state = :pending AND certificate_type > '' AND {_LIVING} GROUP BY certificate_type, evse_id) AS waiting"
    " ORDER BY of_type DESC, EXISTS (SELECT 1 FROM key WHERE state = :active AND certificate_type ="
    f" waiting.certificate_type AND evse_id = waiting.evse_id AND {_LIVING}), own DESC, oldest LIMIT 2"
)
"""Who has pending keys and how many: the two who are first to lose one, see `Ledger._most_crowded`."""

_ALSO: Final = {
    KeyEvent.INSTALLED: ", installed = :seq",
    KeyEvent.DELETED: ", deleted = :seq",
    KeyEvent.INSTALLATION_FAILED: ", failed = 1",
}
"""What an event changes of a key's row besides state and end."""
_ENDED: Final = ", ended = 1 + coalesce((SELECT max(ended) FROM key WHERE ended IS NOT NULL), 0)"

_DAMAGED: Final = (
    "ledger_damaged",
    "nothing was overwritten; restore a backup of the state directory, or move the file away to begin anew",
)
_REASONS: Final = {
    "SQLITE_FULL": ("disk_full", "make room; requests are served again as soon as there is some", True),
    "SQLITE_IOERR_SHMSIZE": ("disk_full", "make room; requests are served again as soon as there is some", True),
    "SQLITE_BUSY": ("ledger_busy", "does a stationkey keys command hold it?", True),
    "SQLITE_READONLY": ("ledger_read_only", "the state directory must be writable", True),
    "SQLITE_CANTOPEN": ("ledger_unusable", "does the state directory exist, and may this user write there?", False),
    "SQLITE_NOTADB": (*_DAMAGED, False),
    "SQLITE_CORRUPT": (*_DAMAGED, False),
}
"""Reason, hint and whether it is transient, by SQLite's name of the error."""
