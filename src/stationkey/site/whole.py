"""All shards of a daemon as one service, for health, metrics and the status page."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from msgspec import Struct

from stationkey.ledger import Figures
from stationkey.observability.status import ShardCondition, SiteCondition
from stationkey.service.renewal import DueCertificate

if TYPE_CHECKING:
    from stationkey.keystore.stores import Store
    from stationkey.ledger.overview import Overview
    from stationkey.service.pool import KeyPool
    from stationkey.service.requests import StationKeyService
    from stationkey.site.lease import Lease
    from stationkey.site.shard import Shard
    from stationkey.system.counters import Counters


class DueCertificates(Struct, frozen=True):
    """What `RenewalWatch` knows, of all shards."""

    due: tuple[DueCertificate, ...]
    clock_behind: bool


class Whole:
    """The shards that a daemon has, as one service and one edge.

    Args:
        shards: returns the shards.
        lease: the lease.
        count: number of shards of the site.
        trouble: returns the reason why this daemon serves nothing, or an empty text.
        counters: of the daemon.
    """

    def __init__(
        self,
        shards: Callable[[], Iterable[Shard]],
        lease: Lease,
        *,
        count: int,
        trouble: Callable[[], str],
        counters: Counters,
    ) -> None:
        self.counters = counters
        self.closed = False
        self.pools: Mapping[Store, KeyPool] = {}
        self._shards = shards
        self._lease = lease
        self._count = count
        self._trouble = trouble

    def _services(self) -> list[StationKeyService]:
        services = [shard.service for shard in self._shards() if shard.service is not None]
        return [service for service in services if not service.closed]

    # As the edge.

    @property
    def connected(self) -> bool:
        """Whether each shard of this daemon is subscribed. A standby without a shard is, while it has its lease."""
        shards = list(self._shards())
        return all(shard.connected for shard in shards) if shards else self._lease.confirmed()

    @property
    def in_hand(self) -> int:
        """Number of messages in flight."""
        return sum(shard.backlog.in_hand for shard in self._shards())

    @property
    def waiting(self) -> int:
        """Number of messages that wait to be processed."""
        return sum(shard.backlog.waiting for shard in self._shards())

    # As the service.

    @property
    def renewal(self) -> DueCertificates:
        """The certificates that are due, the first to expire first."""
        watches = [service.renewal for service in self._services()]
        due = sorted((one for watch in watches for one in watch.due), key=lambda one: one.not_after)
        return DueCertificates(tuple(due), any(watch.clock_behind for watch in watches))

    @property
    def ledger_trouble(self) -> str:
        """Reason of a failure of the lease or of a shard's ledger; empty if all work."""
        troubles = (service.ledger_trouble for service in self._services())
        return self._lease.trouble or next((trouble for trouble in troubles if trouble), "")

    @property
    def ledger_stuck(self) -> bool:
        """Whether a call of a ledger's thread hangs."""
        return any(service.ledger_stuck for service in self._services())

    @property
    def running(self) -> int:
        """Running time in milliseconds, over all runs."""
        return max((service.running for service in self._services()), default=0)

    async def figures(self, *, expiries: int) -> Figures:
        """Return the counts of the shards of this daemon; see `Keys.figures`.

        Raises:
            LedgerError: one cannot be read.
        """
        parts = await asyncio.gather(*(service.figures(expiries=expiries) for service in self._services()))
        keys: dict[tuple[str, str], int] = {}
        for part in parts:
            for kind, count in part.keys.items():
                keys[kind] = keys.get(kind, 0) + count
        all_ends = sorted((end for part in parts for end in part.expiries), key=lambda end: end[2])
        return Figures(
            keys=keys,
            expiries=tuple({(kind, evse_id): (kind, evse_id, at) for kind, evse_id, at in reversed(all_ends)}.values())[
                ::-1
            ][:expiries],
            unknown=sum(part.unknown for part in parts),
            destroyed=sum(part.destroyed for part in parts),
            size=max((part.size for part in parts), default=0),
            unconfirmed=sum(part.unconfirmed for part in parts),
        )

    async def overview(self, *, keys: int, happenings: int) -> Overview:
        """Return an overview of the shards of this daemon; see `stationkey.ledger.overview.look`.

        Raises:
            LedgerError: one cannot be read.
        """
        from stationkey.ledger.overview import Overview  # noqa: PLC0415 - only the status page needs it

        parts = await asyncio.gather(
            *(service.overview(keys=keys, happenings=happenings) for service in self._services())
        )
        living = sorted(
            (key for part in parts for key in part.keys),
            key=lambda key: (key.installed_at is None, key.not_after is None, key.not_after or 0, -key.asked_at),
        )
        newest = sorted((one for part in parts for one in part.happenings), key=lambda one: -one.at)
        return Overview(tuple(living[:keys]), tuple(newest[:happenings]))

    # As the site.

    def site(self) -> SiteCondition:
        """Return the condition of the lease and of each shard."""
        held = self._lease.held
        return SiteCondition(
            shards=self._count,
            leased=self._lease.confirmed(),
            lease_age=self._lease.age,
            trouble=self._trouble() or self._lease.trouble,
            held=tuple(
                ShardCondition(
                    shard.number,
                    held.get(shard.number, 0),
                    shard.connected,
                    shard.backlog.in_hand,
                    shard.backlog.waiting,
                )
                for shard in sorted(self._shards(), key=lambda shard: shard.number)
            ),
        )
