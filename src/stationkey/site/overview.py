"""A site at one moment, for the command, the page and the figures: its shards, who holds them, and what waits."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol

from stationkey.ledger.postgresql.slots import SLOTS
from stationkey.observability.status import DaemonGlance, ShardGlance, SiteGlance
from stationkey.site.locks import LockClass
from stationkey.system.threads import Worker

_LOCKED: Final = (
    "EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    " AND classid = {} AND {})"
)
"""Whether a living connection has a lock, by its class and another condition."""
_DAEMONS: Final = (
    "SELECT instance, name, version, trouble, extract(epoch FROM clock_timestamp() - seen)::float8,"  # noqa: S608 - constants
    f" {_LOCKED.format(int(LockClass.PRESENCE), 'pid = backend')} FROM daemon ORDER BY name, started"
)
_SHARDS: Final = (
    "SELECT number, epoch, holder, extract(epoch FROM clock_timestamp() - since)::float8,"  # noqa: S608 - constants
    f" {_LOCKED.format(int(LockClass.SHARD), 'objid = number')},"
    " coalesce((SELECT sum(in_hand) FROM session WHERE session.number = shard.number AND session.of = shard.of), 0),"
    " coalesce((SELECT sum(waiting) FROM session WHERE session.number = shard.number AND session.of = shard.of), 0)"
    " FROM shard WHERE of > 0 ORDER BY number"
)
_UNDELIVERED: Final = "SELECT slot, count(*) FROM answer WHERE delivered = 0 GROUP BY slot"
_STATIONS: Final = (
    "SELECT slot, count(*) FROM (SELECT DISTINCT slot, station FROM key WHERE state != 'destroyed') living"
    " GROUP BY slot"
)


class Asking(Protocol):
    """What queries run on: a connection to the ledger on PostgreSQL."""

    def execute(self, query: Any, /) -> Any:
        """Run a query; what it returns has ``fetchall()``."""


class Looking:
    """Looks at the site for the status page, on a thread of its own. A look that hangs is waited for by all who ask.

    Args:
        act: looks; blocks, and ends sooner or later.
    """

    def __init__(self, act: Callable[[], SiteGlance]) -> None:
        self._act = act
        self._worker = Worker("site-page")
        self._current: Future[SiteGlance] | None = None

    async def __call__(self) -> SiteGlance:
        """Return the site's state.

        Raises:
            LedgerError: the database does not show it.
        """
        if self._current is None or self._current.done():
            self._current = self._worker.submit(self._act)
        return await asyncio.shield(asyncio.wrap_future(self._current))

    def close(self) -> None:
        """End the thread as soon as its look returns."""
        self._worker.close(0)


def look(connection: Asking, *, stations: bool = True) -> SiteGlance:
    """Return the site's state.

    Args:
        connection: to the ledger.
        stations: whether to count them, which reads a row of each living key.
    """
    daemons = _rows(connection, _DAEMONS)
    names = {instance: name for instance, name, *_ in daemons}
    shards = _rows(connection, _SHARDS)
    count = len(shards)
    counted = _by_shard(_rows(connection, _STATIONS) if stations else (), count)
    undelivered = _by_shard(_rows(connection, _UNDELIVERED), count)
    held = Counter(holder for _, _, holder, _, locked, *_ in shards if locked)
    return SiteGlance(
        shards=tuple(
            ShardGlance(
                number=number,
                holder=names.get(holder, "") if locked else "",
                held=locked,
                seconds=seconds,
                epoch=epoch,
                stations=counted[number],
                in_hand=int(in_hand) if locked else 0,
                waiting=int(waiting) if locked else 0,
                undelivered=undelivered[number],
            )
            for number, epoch, holder, seconds, locked, in_hand, waiting in shards
        ),
        daemons=tuple(
            DaemonGlance(
                name=name, version=version, living=living, seconds=seconds, shards=held[instance], trouble=trouble
            )
            for instance, name, version, trouble, seconds, living in daemons
        ),
    )


def _rows(connection: Asking, query: str) -> Sequence[Any]:
    found: Sequence[Any] = connection.execute(query).fetchall()
    return found


def _by_shard(rows: Iterable[Any], shards: int) -> Counter[int]:
    """Return the sums of a shard, from those of its slots; see `stationkey.ledger.postgresql.slots`."""
    found: Counter[int] = Counter()
    for slot, count in rows:
        found[slot * shards // SLOTS] += count
    return found
