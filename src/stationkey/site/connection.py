"""The lease connection: whatever a daemon does to the tables and locks of a site. Every call waits for PostgreSQL."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from stationkey._version import __version__
from stationkey.errors import LedgerError
from stationkey.site.locks import CHANNEL, LockClass, layout

if TYPE_CHECKING:
    from stationkey.ledger.postgresql.connection import Connection

_LOCKS: Final = (
    "SELECT classid::bigint, objid::bigint, pid FROM pg_locks WHERE locktype = 'advisory' AND granted"  # noqa: S608 - constants
    " AND objsubid = 2 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    f" AND classid IN ({', '.join(str(int(one)) for one in LockClass)})"
)
"""The locks of all daemons. Some statements are put together here, from constants."""
_WRITE_SEEN: Final = (
    "INSERT INTO daemon (instance, name, host, pid, version, schema, shards, lease, backend, trouble)"
    " VALUES (%(instance)s, %(name)s, %(host)s, %(pid)s, %(version)s, %(schema)s, %(shards)s, %(lease)s,"
    " pg_backend_pid(), %(trouble)s) ON CONFLICT (instance) DO UPDATE"
    " SET seen = clock_timestamp(), backend = excluded.backend, trouble = excluded.trouble"
)
_FOREIGN_ROWS: Final = (
    "(SELECT count(*) FROM shard WHERE number < %(shards)s AND of <> %(shards)s)"
    " + (SELECT count(*) FROM session WHERE client_id <> ALL(%(client_ids)s))"
)
"""Rows of another cut of the site than ours."""
_ADD_ROWS: Final = (
    "INSERT INTO shard (number, of) SELECT number, %(shards)s FROM generate_series(0, %(shards)s - 1) number"
)
_FORGET: Final = "DELETE FROM daemon WHERE seen < clock_timestamp() - interval '1 day'"
"""Of daemons that were killed."""
_BEAT: Final = (
    f"WITH beat AS ({_WRITE_SEEN}) SELECT seen.*, {_FOREIGN_ROWS},"  # noqa: S608 - constants
    " clock_timestamp() BETWEEN start AND start + make_interval(secs => %(lease)s),"
    " (SELECT array_agg(backend) FROM daemon WHERE trouble <> ''"
    "  AND seen > clock_timestamp() - make_interval(secs => 2 * lease)),"
    " (SELECT array_agg(DISTINCT filters) FROM session JOIN shard USING (number)"
    "  WHERE client_id = ANY(%(client_ids)s) AND holder <> %(instance)s)"
    f" FROM ({_LOCKS}) seen, pg_postmaster_start_time() start"
)


_END_TRANSACTIONS: Final = (
    "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE application_name LIKE %s"
    " AND usename = current_user AND datname = current_database() AND state <> 'idle' AND wait_event = 'ClientRead'"
)
"""End the transactions that wait for their daemon's next word. One that commits is not: it may wait for a standby, and
would be confirmed without it."""


def shard_connection(shard: int | str, instance: str) -> str:
    """Return the name of a daemon's connection for a shard, for ``pg_stat_activity``."""
    return f"shard {shard} {instance}"


class Identity(Struct, frozen=True):
    """Who a daemon is, for other daemons and the operator.

    Attributes:
        instance: random; of this process.
        name: the same after a restart; another for each daemon.
        host: host name.
        pid: process ID.
        schema: version of the ledger's schema that it knows.
    """

    instance: str
    name: str
    host: str
    pid: int
    schema: int


class Cut(Struct, frozen=True):
    """How a site is cut, by the configuration.

    Attributes:
        shards: number of shards.
        client_id: what the client identifiers of the MQTT sessions begin with.
        filters: the topic filters of the stations.
        lease: seconds after which a daemon that is no longer heard of loses its shards.
    """

    shards: int
    client_id: str
    filters: tuple[str, ...]
    lease: float

    @property
    def layout(self) -> int:
        """Number of this cut, for the presence lock."""
        return layout(self.shards, self.client_id)

    def session(self, number: int) -> str:
        """Return the client identifier of a shard's MQTT session."""
        return f"{self.client_id}-{self.shards}-{number}"

    @property
    def sessions(self) -> list[str]:
        """The client identifiers of all shards."""
        return [self.session(number) for number in range(self.shards)]


class Session(Struct, frozen=True):
    """An MQTT session that may exist at the broker.

    Attributes:
        client_id: its client identifier.
        number: of its shard.
        of: number of shards of its cut.
        filters: the topic filters that it may be subscribed to.
    """

    client_id: str
    number: int
    of: int
    filters: tuple[str, ...]


class Taken(Struct, frozen=True):
    """A shard that was taken.

    Attributes:
        number: of the shard.
        epoch: counts who took it; a transaction with an earlier one changes nothing.
        stale: topic filters of its MQTT session that are no longer configured.
    """

    number: int
    epoch: int
    stale: tuple[str, ...]


class View(Struct, frozen=True):
    """What a heartbeat has seen.

    Attributes:
        me: this daemon's connection, by the process ID of its backend.
        loads: number of shards of each living daemon of this cut, by its backend.
        held: shards that this daemon has.
        free: shards that it may take.
        others: daemons of another cut have shards, or are expected back.
        old: whether shards or MQTT sessions of another cut are on record.
        unfit: daemons that cannot serve, in their own opinion, by their backends.
        stations_differ: whether the shards of other daemons are subscribed to other topic filters.
    """

    me: int
    loads: Mapping[int, int]
    held: frozenset[int]
    free: frozenset[int]
    others: bool
    old: bool
    unfit: frozenset[int] = frozenset()
    stations_differ: bool = False

    @property
    def is_left_to_others(self) -> bool:
        """Whether this daemon cannot serve, in its own opinion, and another one can."""
        return self.me in self.unfit and bool(self.loads.keys() - self.unfit)


class Backlog(Struct, frozen=True):
    """How many messages of a shard are in flight, and how many wait."""

    in_hand: int
    waiting: int


class LeaseConnection:
    """A connection that PostgreSQL ends if nothing is heard on it for the time of a lease, and its locks with it.

    Args:
        connect: opens a connection in autocommit mode, with a name for ``pg_stat_activity``.
        explained: turns the connection's errors into `LedgerError`.
        identity: who this daemon is.
        cut: how the site is cut.
        present: whether to count among those who share the shards.

    Raises:
        LedgerError: no connection.
    """

    def __init__(
        self,
        connect: Callable[[str], Connection],
        *,
        explained: Callable[[str], Any],
        identity: Identity,
        cut: Cut,
        present: bool,
    ) -> None:
        self._explained = explained
        self._identity = identity
        self._cut = cut
        self._told: dict[int, Backlog] = {}
        name = f"lease {identity.instance}"
        self._connection = connect(name)
        self._connection.add_notify_handler(lambda _: None)  # else psycopg collects them
        try:
            self._settle(f"stationkey {name}", present=present)
        except BaseException:
            self._connection.close()
            raise

    def _settle(self, name: str, *, present: bool) -> None:
        """Take the place of earlier connections of this process, and set what makes this one a lease."""
        milliseconds = int(self._cut.lease * 1000)
        limits = {
            "idle_session_timeout": milliseconds,
            "statement_timeout": milliseconds,
            # Heartbeats are not sent while another transaction is waited for.
            "lock_timeout": milliseconds // 4,
            # In a transaction that takes shards, it is stopped with others' takings behind it.
            "idle_in_transaction_session_timeout": milliseconds,
        }
        for setting, value in limits.items():
            self._rows("SELECT set_config(%s, %s, false)", (setting, str(value)))
        # An earlier connection of ours may be half open: the server would keep its locks until its lease is over.
        self._rows(
            "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity"
            " WHERE application_name = %s AND usename = current_user AND pid <> pg_backend_pid()",
            (name,),
        )
        with self._explained("opened"):
            self._connection.execute(f"LISTEN {CHANNEL}")
        ((self.me,),) = self._rows("SELECT pg_backend_pid()")
        self._write(_WRITE_SEEN, self._about(""))
        self._add_rows()
        self._write(_FORGET)
        if present:
            self._rows("SELECT pg_advisory_lock_shared(%s, %s)", (int(LockClass.PRESENCE), self._cut.layout))

    def _add_rows(self) -> None:
        """Add a row for each shard of a new site. Those of another cut are adopted, or stay as they are."""
        if not self._rows("SELECT FROM shard LIMIT 1"):
            with self._taking():
                self._write(
                    f"{_ADD_ROWS} WHERE NOT EXISTS (SELECT FROM shard) ON CONFLICT DO NOTHING",
                    {"shards": self._cut.shards},
                )

    def fileno(self) -> int:
        """Return the socket; it is readable when a shard was released, or the connection has ended."""
        return self._connection.fileno()

    @property
    def lost(self) -> bool:
        """Whether the connection has ended, and its locks with it."""
        return self._connection.closed

    def hang_up(self) -> None:
        """End a call that waits for PostgreSQL, from another thread. The connection cannot be used further."""
        self._connection.hang_up()

    def close(self) -> None:
        """Close the connection; its locks are released. Never raises."""
        with suppress(Exception):
            self._connection.close()

    # What a daemon does.

    def beat(self, trouble: str) -> View:
        """Tell PostgreSQL that this daemon lives, and look who has which shard.

        Args:
            trouble: reason why this daemon serves nothing, for the operator.
        """
        about = {**self._about(trouble), "client_ids": self._cut.sessions}
        rows = self._rows(_BEAT, about)
        locks = [(one, number, backend) for one, number, backend, *_ in rows]
        foreign, young, unfit, subscribed = rows[0][3:] if rows else (0, False, None, None)
        unfit = {*(unfit or ())} - {self.me} | ({self.me} if trouble else set())
        reserved = self._reserved() if young else {}
        return self._view(
            locks,
            old=foreign > 0,
            reserved=reserved,
            unfit=frozenset(unfit),
            stations_differ=any({*_filters(text)} != {*self._cut.filters} for text in subscribed or ()),
        )

    def take(self, number: int) -> Taken | None:
        """Take a shard; None if another daemon has it, or has cut the site otherwise.

        Raises:
            LedgerError: nothing was taken. A transaction of the last holder may still keep it.
        """
        locked = False
        try:
            with self._taking():
                locked = not self._may_not_take() and self._lock(number)
                if locked:
                    self._end_transactions(number)
                return self._taken(number) if locked else None
        except BaseException:
            self._unlock_all([number] if locked else ())
            raise

    def resume(self, held: Mapping[int, int]) -> frozenset[int]:
        """Lock the shards that this daemon had over an earlier connection.

        Args:
            held: the shards and their epochs.

        Returns:
            Those that are lost: another daemon has had them since.
        """
        if not held:
            return frozenset()
        with self._taking():
            epochs = dict(self._rows("SELECT number, epoch FROM shard WHERE of = %s", (self._cut.shards,)))
            kept = {number for number, epoch in held.items() if epochs.get(number) == epoch and self._lock(number)}
        return frozenset(held) - kept

    def adopt(self) -> tuple[list[Taken], list[Session]] | None:
        """Take all shards of a new cut of the site, to end the MQTT sessions of the old one.

        Returns:
            The shards, and the sessions of the old cut; None if another daemon has a shard.

        Raises:
            LedgerError: nothing was taken.
        """
        numbers = range(self._cut.shards)
        locked: list[int] = []
        try:
            with self._taking():
                holders = {backend for one, _, backend in self._locks() if one == LockClass.SHARD}
                if holders:
                    return None
                locked.extend(number for number in numbers if self._lock(number))
                self._end_transactions("%")
                self._write(f"{_ADD_ROWS} ON CONFLICT DO NOTHING", {"shards": self._cut.shards})
                # Of all rows, so that a daemon of the old cut that was stopped writes nothing when it comes back.
                self._write(
                    "UPDATE shard SET epoch = epoch + 1, holder = NULL,"
                    " of = CASE WHEN number < %(shards)s THEN %(shards)s ELSE 0 END",
                    {"shards": self._cut.shards},
                )
                taken = [self._taken(number) for number in numbers]
                old = self._rows(
                    "SELECT client_id, number, of, filters FROM session WHERE client_id <> ALL(%s) ORDER BY of, number",
                    (self._cut.sessions,),
                )
        except BaseException:
            self._unlock_all(locked)
            raise
        return taken, [Session(client_id, number, of, _filters(text)) for client_id, number, of, text in old]

    def subscribed(self, number: int) -> None:
        """Record that the MQTT session of a shard has just the configured subscriptions."""
        self._write(
            "UPDATE session SET filters = %s WHERE client_id = %s",
            (json.dumps(self._cut.filters), self._cut.session(number)),
        )

    def ended(self, client_id: str) -> None:
        """Record that an MQTT session no longer exists."""
        self._write("DELETE FROM session WHERE client_id = %s", (client_id,))

    def release(self, number: int) -> None:
        """Release a shard and wake the others."""
        self._write(
            "UPDATE shard SET holder = NULL, since = clock_timestamp() WHERE number = %s AND holder = %s",
            (number, self._identity.instance),
        )
        self._told.pop(number, None)
        self._unlock(number)
        self._write(f"NOTIFY {CHANNEL}")

    def retire(self) -> None:
        """Count no more among those who share the shards."""
        self._rows("SELECT pg_advisory_unlock_shared(%s, %s)", (int(LockClass.PRESENCE), self._cut.layout))
        self._write(f"NOTIFY {CHANNEL}")

    def leave(self) -> None:
        """Remove this daemon from the record: it has ended, and left nothing behind."""
        self._write("DELETE FROM daemon WHERE instance = %s", (self._identity.instance,))

    def tell(self, backlog: Mapping[int, Backlog]) -> None:
        """Record the backlogs that have changed, for the operator."""
        changed = {number: one for number, one in backlog.items() if self._told.get(number) != one}
        for number, one in changed.items():
            self._write(
                "UPDATE session SET in_hand = %s, waiting = %s WHERE client_id = %s",
                (one.in_hand, one.waiting, self._cut.session(number)),
            )
        self._told.update(changed)

    # Steps.

    def _about(self, trouble: str) -> dict[str, object]:
        me, cut = self._identity, self._cut
        return {
            "instance": me.instance,
            "name": me.name,
            "host": me.host,
            "pid": me.pid,
            "version": __version__,
            "schema": me.schema,
            "shards": cut.shards,
            "lease": cut.lease,
            "trouble": trouble,
        }

    def _view(
        self,
        locks: Collection[tuple[int, int, int]],
        *,
        old: bool,
        reserved: Mapping[int, int],
        unfit: frozenset[int],
        stations_differ: bool,
    ) -> View:
        present = {backend: number for one, number, backend in locks if one == LockClass.PRESENCE}
        holders = {number: backend for one, number, backend in locks if one == LockClass.SHARD}
        count = Counter(holders.values())
        return View(
            me=self.me,
            loads={backend: count[backend] for backend, number in present.items() if number == self._cut.layout},
            held=frozenset(number for number, backend in holders.items() if backend == self.me),
            free=frozenset(range(self._cut.shards)) - holders.keys() - reserved.keys(),
            others=any(present.get(backend, self._cut.layout) != self._cut.layout for backend in holders.values())
            or any(of != self._cut.shards for of in reserved.values()),
            old=old,
            unfit=unfit,
            stations_differ=stations_differ,
        )

    def _reserved(self) -> dict[int, int]:
        """Return the shards whose holders are expected back: the server has just been started, and ended all locks.

        Not those of a daemon that was itself started again meanwhile.
        """
        rows = self._rows(
            "SELECT number, of FROM shard JOIN daemon last ON last.instance = holder WHERE holder <> %s AND NOT EXISTS"
            " (SELECT 1 FROM daemon next WHERE next.name = last.name AND next.started > last.started)",
            (self._identity.instance,),
        )
        return dict(rows)

    def _may_not_take(self) -> bool:
        ((foreign,),) = self._rows(
            f"SELECT {_FOREIGN_ROWS}", {"shards": self._cut.shards, "client_ids": self._cut.sessions}
        )
        return bool(foreign)

    def _end_transactions(self, shard: int | str) -> None:
        """End the transactions of a shard's last holder, or with ``%`` of all shards' last holders.

        They keep the shard's row, and it has lost the shard. A timeout of the server is not enough: where a daemon was
        stopped within a pipeline or a large message, the server does not count its transaction as idle.
        """
        self._rows(_END_TRANSACTIONS, (f"stationkey {shard_connection(shard, '%')}",))

    def _taken(self, number: int) -> Taken:
        """Begin a new epoch of a shard, and record its MQTT session before there is one."""
        ((epoch,),) = self._rows(
            "UPDATE shard SET epoch = epoch + 1, holder = %s, since = clock_timestamp() WHERE number = %s"
            " RETURNING epoch",
            (self._identity.instance, number),
        )
        session = self._cut.session(number)
        rows = self._rows("SELECT filters FROM session WHERE client_id = %s", (session,))
        recorded = _filters(rows[0][0]) if rows else ()
        stale = tuple(one for one in recorded if one not in self._cut.filters)
        self._write(
            "INSERT INTO session (client_id, number, of, filters) VALUES (%s, %s, %s, %s)"
            " ON CONFLICT (client_id) DO UPDATE SET filters = excluded.filters",
            (session, number, self._cut.shards, json.dumps([*self._cut.filters, *stale])),
        )
        return Taken(number, epoch, stale)

    @contextmanager
    def _taking(self) -> Iterator[None]:
        """Open a transaction that no other daemon's taking of shards overlaps."""
        with self._explained("written"), self._connection.transaction():
            self._rows("SELECT pg_advisory_xact_lock(%s, 0)", (int(LockClass.TAKING),))
            yield

    def _locks(self) -> list[tuple[Any, ...]]:
        return self._rows(_LOCKS)

    def _lock(self, number: int) -> bool:
        ((locked,),) = self._rows("SELECT pg_try_advisory_lock(%s, %s)", (int(LockClass.SHARD), number))
        return bool(locked)

    def _unlock(self, number: int) -> None:
        self._rows("SELECT pg_advisory_unlock(%s, %s)", (int(LockClass.SHARD), number))

    def _unlock_all(self, numbers: Iterable[int]) -> None:
        """Unlock shards after a failed transaction; on a lost connection, they are unlocked already."""
        with suppress(LedgerError):
            for number in numbers:
                self._unlock(number)

    def _rows(self, statement: str, values: Any = None) -> list[tuple[Any, ...]]:
        with self._explained("written"):
            return self._connection.execute(statement, values).fetchall()

    def _write(self, statement: str, values: Any = None) -> None:
        with self._explained("written"):
            self._connection.execute(statement, values)


def _filters(text: str) -> tuple[str, ...]:
    """Return recorded topic filters."""
    try:
        return tuple(str(one) for one in json.loads(text))
    except (ValueError, TypeError):
        raise LedgerError("the record of an MQTT session is damaged", reason="ledger_damaged") from None
