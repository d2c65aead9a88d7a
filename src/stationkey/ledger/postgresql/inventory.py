"""What a site's daemons have in tokens, and in which devices: on record in PostgreSQL, for all of them.

See `stationkey.ledger.postgresql.tokens` for the tables. A label is committed before its key is made. It is given up
when the lease of its daemon is over, or when that daemon knows that the key was not recorded in time. From then on no
transaction can record the key, so destroying it in the token never takes a key of the ledger's. A daemon that was only
stopped may still make it: so a label that was given up is looked for again for days.

The time is PostgreSQL's.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Final, NamedTuple, TypeVar

import psycopg

from stationkey.errors import ConfigurationError, LedgerError, Scope
from stationkey.keystore.pkcs11.inventory import ID_LENGTH, Ended
from stationkey.keystore.pkcs11.uri import token_uri
from stationkey.ledger.postgresql.connection import Connection, explained, is_lost

T = TypeVar("T")

_BATCHES: Final = (4, 32)
"""Labels of the first batch, and at most; each has twice as many as the one before. A daemon that dies leaves a few."""
_FRESH: Final = 2.0
"""Seconds for which a batch is taken for this daemon's own without asking: its lease may have ended meanwhile."""
_RECORDED_BY: Final = 180.0
"""Seconds after which a key of this daemon that is not in the ledger never will be."""
_PART: Final = 4
"""Keys that one call of `ended` returns at most: the key store's thread is busy with them, and a request waits. To look
for a key may take a tenth of a second."""
_PATIENCE: Final = 20.0
"""Seconds to wait for the server, at most, before a request for a key is rejected; as the ledger does."""
_STEP: Final = 0.25
"""Seconds between two attempts meanwhile."""
_PAUSE: Final = 1.0
"""Seconds between two attempts later. In between, all fails at once: an attempt may take seconds of the key store's
thread."""
_ADMISSION: Final = 0x534B0005
"""Class of the advisory lock under which a device is recorded."""

_LEASE_OVER: Final = (
    "(instance IS NULL OR greatest(seen, (SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()))"
    " < clock_timestamp() - make_interval(secs => 3 * lease))"
)
"""Condition on a row of `daemon`. Where the server was away, each daemon gets as long to be seen again: no connection
is then older."""

_GIVE_UP: Final = (
    "UPDATE token_key SET ended = clock_timestamp(), look = clock_timestamp() WHERE id IN (SELECT id FROM token_key"  # noqa: S608 - this module's own text
    f" LEFT JOIN daemon ON instance = maker WHERE ended IS NULL AND (id = ANY(%s) OR maker <> %s AND {_LEASE_OVER})"
    " FOR UPDATE OF token_key SKIP LOCKED)"
)
_CLAIM: Final = (
    "UPDATE token_key SET look = clock_timestamp() + interval '30 seconds'"  # noqa: S608 - this module's own text
    " WHERE id IN (SELECT id FROM token_key WHERE token = %s AND ended IS NOT NULL AND look <= clock_timestamp()"
    f" ORDER BY look - ended, look LIMIT {_PART} FOR UPDATE SKIP LOCKED) RETURNING id"
)
"""Take keys for a look: first those that nobody has looked for, last those looked for most often. No other daemon looks
for them meanwhile; if this one dies, another does soon."""
_NOT_FOUND: Final = (
    "WITH old AS (DELETE FROM token_key WHERE id = %(id)s AND ended < now() - interval '2 days')"
    " UPDATE token_key SET look = now() + least(interval '1 hour', greatest(interval '30 seconds', now() - ended))"
    " WHERE id = %(id)s AND ended >= now() - interval '2 days'"
)
"""After a look that found nothing: the intervals grow as the key grows older, for two days."""
_IN_USE: Final = (
    "SELECT EXISTS (SELECT 1 FROM keystore LEFT JOIN daemon USING (instance) WHERE identity = %(identity)s"
    " AND (noted > clock_timestamp() - interval '1 minute' OR seen > clock_timestamp() - interval '10 minutes'))"
    " OR EXISTS (SELECT 1 FROM key JOIN secret ON key_number = number WHERE scheme = %(scheme)s"
    " AND coalesce(token_of(private), %(identity)s) = %(identity)s)"
)
"""Whether a daemon that lives uses a device, or a living key is in it. Keys in tokens name theirs; there is one TPM."""


class _Outage(NamedTuple):
    """The server is away: since when, when it was last tried, and how that ended. Times are monotonic."""

    begun: float
    tried: float
    error: LedgerError


class SiteInventory:
    """The record of one daemon. Each method may be called on any thread; one waits for the other.

    Args:
        connect: connects to the site's ledger, in autocommit mode.
        instance: of this daemon, in the table `daemon`, where it has to be before a key store is used.
    """

    def __init__(self, connect: Callable[[], Connection], instance: str) -> None:
        self._connect = connect
        self._instance = instance
        self._turn = threading.Lock()
        self._connection: Connection | None = None
        self._over = threading.Event()
        self._outage: _Outage | None = None
        self._admitted: set[str] = set()
        self._batches: dict[str, list[str]] = {}
        self._size = _BATCHES[0]
        self._checked = 0.0
        self._in: dict[str, str] = {}  # CKA_IDs of keys about to be destroyed, and the URIs of their tokens
        self._given: dict[str, float] = {}  # CKA_IDs of keys being made, and when they were given to the key store

    # The devices.

    def admit(self, identity: str, *, fits: Callable[[str], bool], reached: Callable[[str], bool]) -> None:
        """See `stationkey.keystore.pkcs11.inventory.SiteRecord`."""

        def admit(sql: Connection) -> None:
            with sql.transaction():
                sql.execute("SELECT pg_advisory_xact_lock(%s, 0)", (_ADMISSION,))
                rows = sql.execute(
                    "SELECT DISTINCT identity FROM keystore WHERE identity <> %s", (identity,)
                ).fetchall()
                for (other,) in rows:
                    if fits(other) or not reached(other):
                        self._replace(sql, identity, other)
                sql.execute(
                    "INSERT INTO keystore (identity, instance) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                    (identity, self._instance),
                )
                sql.execute(
                    "DELETE FROM keystore WHERE identity = %s AND instance <> %s AND instance NOT IN"
                    " (SELECT instance FROM daemon WHERE seen > clock_timestamp() - interval '10 minutes')",
                    (identity, self._instance),
                )

        self._run(admit, "written")
        self._admitted.add(identity)

    def _replace(self, sql: Connection, identity: str, other: str) -> None:
        """Forget another device that the daemon takes this one for, or does not reach.

        Raises:
            ConfigurationError: it is in use.
        """
        used = sql.execute(_IN_USE, {"identity": other, "scheme": other.partition(":")[0]}).fetchone()
        if used is not None and used[0]:
            raise _differs(identity, other)
        sql.execute("DELETE FROM keystore WHERE identity = %s", (other,))

    # The keys in tokens.

    def new(self, token: Mapping[str, str], *, within: float = 0.0) -> bytes:
        """See `stationkey.keystore.pkcs11.inventory.Inventory`."""
        where = token_uri(token)
        if where not in self._admitted:  # exchanged while it was in use
            raise _differs(where, ", ".join(sorted(self._admitted)))
        end = time.monotonic() + min(within, _PATIENCE)
        with self._turn:
            batch = self._batches.setdefault(where, [])
            if batch and time.monotonic() > self._checked + _FRESH:
                batch[:] = self._attempt(lambda sql: self._still_ours(sql, batch), "read", end)
            if not batch:
                batch[:] = [secrets.token_hex(ID_LENGTH) for _ in range(self._size)]
                try:
                    self._attempt(lambda sql: self._reserve(sql, where, batch), "written", end)
                except BaseException:
                    batch.clear()
                    raise
                self._size = min(2 * self._size, _BATCHES[1])
            self._given[batch[-1]] = time.monotonic()
            return bytes.fromhex(batch.pop())

    def _reserve(self, sql: Connection, where: str, batch: list[str]) -> None:
        sql.execute(
            "INSERT INTO token_key (id, token, maker) SELECT unnest(%s::text[]), %s, %s ON CONFLICT DO NOTHING",
            (batch, where, self._instance),
        )
        self._checked = time.monotonic()

    def _still_ours(self, sql: Connection, batch: list[str]) -> list[str]:
        rows = sql.execute("SELECT id FROM token_key WHERE id = ANY(%s) AND ended IS NULL", (batch,)).fetchall()
        self._checked = time.monotonic()
        return [identifier for (identifier,) in rows]

    def ended(self, living: Collection[bytes] | None, token: Callable[[], Mapping[str, str]]) -> Ended:
        """See `stationkey.keystore.pkcs11.inventory.Inventory`."""
        if living is not None:
            raise ValueError("the table tells which keys the ledger has")
        age = {identifier: time.monotonic() - at for identifier, at in self._given.copy().items()}
        late = [identifier for identifier, seconds in age.items() if seconds >= _RECORDED_BY]

        def find(sql: Connection) -> bool:
            sql.execute(_GIVE_UP, (late, self._instance))
            row = sql.execute(
                "SELECT EXISTS (SELECT 1 FROM token_key WHERE token = ANY(%s) AND ended IS NOT NULL"
                " AND look <= clock_timestamp())",
                (list(self._admitted),),
            ).fetchone()
            return row is not None and bool(row[0])

        found = self._run(find, "written")
        for identifier in late:
            if age[identifier] >= 2 * _RECORDED_BY:  # until then again: a transaction under way holds its row
                self._given.pop(identifier, None)
        if not found:
            return Ended([])
        where = token_uri(token())
        rows = self._run(lambda sql: sql.execute(_CLAIM, (where,)).fetchall(), "written")
        self._in = dict.fromkeys((identifier for (identifier,) in rows), where)
        return Ended([bytes.fromhex(identifier) for identifier in self._in], more=len(rows) == _PART)

    def end(self, identifier: bytes) -> bool:
        """See `stationkey.keystore.pkcs11.inventory.Inventory`."""
        statement = "UPDATE token_key SET ended = coalesce(ended, clock_timestamp()) WHERE id = %s RETURNING token"
        row = self._run(lambda sql: sql.execute(statement, (identifier.hex(),)).fetchone(), "written")
        self._given.pop(identifier.hex(), None)
        if row is None:
            return False
        self._in = {identifier.hex(): row[0]}
        return True

    def is_in(self, identifier: bytes, token: Mapping[str, str]) -> bool:
        """See `stationkey.keystore.pkcs11.inventory.Inventory`."""
        known = self._in.get(identifier.hex())
        if known is not None:
            return known == token_uri(token)
        statement = "SELECT token FROM token_key WHERE id = %s"
        row = self._run(lambda sql: sql.execute(statement, (identifier.hex(),)).fetchone(), "read")
        return row is None or row[0] == token_uri(token)

    def drop(self, identifier: bytes, *, found: bool = True) -> None:
        """See `stationkey.keystore.pkcs11.inventory.Inventory`."""
        if found:
            statement = "DELETE FROM token_key WHERE id = %s"
            self._run(lambda sql: sql.execute(statement, (identifier.hex(),)), "written")
        else:
            self.drop_missing(identifier)

    def drop_missing(self, identifier: bytes) -> None:
        """Have a key that the token has not made looked for again, or forget it, two days after it was given up."""
        self._run(lambda sql: sql.execute(_NOT_FOUND, {"id": identifier.hex()}), "written")

    # The connection.

    def close(self) -> None:
        """Release the labels that no key was made for, and close the connection. Call it after the key stores."""
        self._over.set()
        with self._turn:
            unused = [identifier for batch in self._batches.values() for identifier in batch]
            self._batches.clear()
            if unused:
                with suppress(LedgerError):  # the next sweep gives them up
                    self._attempt(lambda sql: _release(sql, unused), "written")
            self._disconnect()

    def _run(self, use: Callable[[Connection], T], act: str) -> T:
        with self._turn:
            return self._attempt(use, act)

    def _attempt(self, use: Callable[[Connection], T], act: str, end: float = 0.0) -> T:
        """Use the connection, and a new one if it was lost: until `end`, once at least. It may be done twice.

        Raises:
            LedgerError: nothing was changed, or it is not known.
        """
        again = self._connection is not None
        with explained(act):
            while True:
                connection = self._connected(end)
                try:
                    return use(connection)
                except psycopg.Error as error:
                    if not self._is_lost(error) or not (again or self._waits(end)):
                        raise
                    again = False

    def _is_lost(self, error: psycopg.Error) -> bool:
        """Return whether the connection is lost; if so, close it."""
        lost = self._connection is None or self._connection.closed or is_lost(error)
        if lost:
            self._disconnect()
        return lost

    def _connected(self, end: float) -> Connection:
        while self._connection is None:
            if self._outage is not None:
                end = min(end, self._outage.begun + _PATIENCE)
                if time.monotonic() >= end and time.monotonic() < self._outage.tried + _PAUSE:
                    raise self._outage.error
            try:
                self._connection = self._connect()
            except LedgerError as error:
                now = time.monotonic()
                self._outage = _Outage(now if self._outage is None else self._outage.begun, now, error)
                if not error.transient or not self._waits(end):
                    raise
        self._outage = None
        return self._connection

    def _waits(self, end: float) -> bool:
        """Wait before another attempt; return False if there is no time for one."""
        return time.monotonic() + _STEP < end and not self._over.wait(_STEP)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                connection.close()


def _differs(identity: str, other: str) -> ConfigurationError:
    return ConfigurationError(
        f"the key store is {identity}, and this site's keys are in {other}",
        reason="keystore_differs",
        hint="all daemons of a site need the same key store: a token that every machine reaches. A TPM serves the "
        "daemons of its own machine only. See docs/pkcs11.md",
        scope=Scope.STORE,
    )


def _release(sql: Connection, unused: list[str]) -> None:
    sql.execute("DELETE FROM token_key WHERE id = ANY(%s)", (unused,))
