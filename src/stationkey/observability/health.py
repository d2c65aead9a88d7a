"""The daemon's health, for `/health` and systemd, with probes of idle key stores.

A key store is **stuck** if a call takes longer than its whole time. Only then do the keep-alives for systemd's watchdog
stop, because only then a new process helps. A TPM that is gone fails at once, and a restart does not bring it back. An
RSA key may take minutes. A hang of an idle key store would not be noticed, so it is probed periodically.

If the disk hangs, the ledger's thread hangs, and keep-alives stop, too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from stationkey.errors import LedgerError
from stationkey.keystore.stores import KeyStores, Store
from stationkey.keystore.worker import Task, Turn
from stationkey.ledger import Figures
from stationkey.observability.status import Condition, SiteCondition, SiteGlance, StoreCondition
from stationkey.system.counters import Counters, Counts
from stationkey.system.systemd import ServiceManager
from stationkey.system.tasks import Work, background
from stationkey.x509.renewal import Due

if TYPE_CHECKING:
    from stationkey.ledger.overview import Overview
    from stationkey.service.pool import KeyPool
    from stationkey.service.renewal import DueCertificate

log = logging.getLogger(__name__)

FRESH: Final = 1.0
"""Seconds for which figures of the ledger are reused, so that frequent queries do not delay requests."""
LEDGER_PATIENCE: Final = 2.0
"""Seconds to wait for them."""
EXPIRIES: Final = 32
"""Active keys whose expiry is shown: any number of EVSE IDs may come over MQTT."""
PROBE_INTERVAL: Final = 30.0
"""Longest time in seconds between two probes of an idle key store."""
LOOK_INTERVAL: Final = 5.0
"""Seconds between two checks whether a call to the key store hangs, which causes no event."""
STATUS_INTERVAL: Final = 30.0
"""Seconds between two checks of the status line without an event."""
STATUS_PAUSE: Final = 1.0
"""Shortest time in seconds between two status lines."""


class Connecting(Protocol):
    """The part of `stationkey.mqtt.gateway.MqttEdge` that is watched."""

    @property
    def connected(self) -> bool:
        """Whether the broker can deliver requests."""
        ...

    @property
    def in_hand(self) -> int:
        """Number of messages in flight."""
        ...

    @property
    def waiting(self) -> int:
        """Number of messages that wait to be processed."""
        ...


class Watching(Protocol):
    """The part of `stationkey.service.renewal.RenewalWatch` that is watched."""

    @property
    def due(self) -> tuple[DueCertificate, ...]:
        """The certificates that are due, the first to expire first."""
        ...

    @property
    def clock_behind(self) -> bool:
        """Whether the clock was before the newest certificate."""
        ...


class Serving(Protocol):
    """The part of `stationkey.service.requests.StationKeyService` that is watched."""

    @property
    def counters(self) -> Counters:
        """Outcomes of this run."""
        ...

    @property
    def pools(self) -> Mapping[Store, KeyPool]:
        """The keys made ahead."""
        ...

    @property
    def renewal(self) -> Watching:
        """Certificates that are due."""
        ...

    @property
    def ledger_trouble(self) -> str:
        """Reason of the ledger's last failure, or an empty text."""
        ...

    @property
    def ledger_stuck(self) -> bool:
        """Whether a call of the ledger's thread hangs."""
        ...

    @property
    def running(self) -> int:
        """Running time in milliseconds."""
        ...

    @property
    def closed(self) -> bool:
        """Whether the ledger can no longer be queried."""
        ...

    async def figures(self, *, expiries: int) -> Figures:
        """Return the counts of the ledger."""
        ...

    async def overview(self, *, keys: int, happenings: int) -> Overview:
        """Return what the status page shows of the ledger."""
        ...


class Health:
    """Watches the parts of a daemon, and tells systemd.

    Args:
        keystores: the key stores.
        manager: systemd, if there is one.
        broker: URL of the broker, without secrets.
        patience: seconds that the key store may take for a probe.
        clock: Unix time in seconds.
        failures: counts failures of its tasks.

    Attributes:
        service: the service, as soon as there is one.
        edge: the edge to the broker, as soon as there is one.
        connections: number of subscriptions in this run.
        site: returns this daemon's part in a site, if it is one of a site's.
        glance: looks at the whole site, if there is one; for the status page.
        descriptions: description of each key store by its name; missing until it has answered.
    """

    def __init__(
        self,
        keystores: KeyStores,
        manager: ServiceManager,
        *,
        broker: str,
        patience: float,
        clock: Callable[[], float] = time.time,
        failures: Counts | None = None,
    ) -> None:
        self.keystores = keystores
        self.service: Serving | None = None
        self.site: Callable[[], SiteCondition] | None = None
        self.glance: Callable[[], Awaitable[SiteGlance]] | None = None
        self.edge: Connecting | None = None
        self.connections = 0
        self.descriptions = {store.name: "" for store in keystores}
        self._manager = manager
        self._broker = broker
        self._patience = patience
        self._clock = clock
        self._failures = failures or Counts()
        self._connected = False
        self._changed_at = clock()
        self._ready = False
        self._stopping = False
        self._news = asyncio.Event()
        self._looked_at = -FRESH
        self._looking: asyncio.Future[Figures | None] | None = None
        self._silent = False  # whether the ledger did not answer the last time

    # Called by the daemon.

    def connected(self) -> None:
        """Note that the edge is subscribed at the broker."""
        self.connections += 1
        self._settled(connected=True)

    def away(self) -> None:
        """Note that the connection to the broker was lost or failed."""
        self._settled(connected=False)

    def watch(self, service: Serving, edge: Connecting) -> None:
        """Set the parts of the daemon to watch."""
        self.service, self.edge = service, edge

    def stopping(self) -> None:
        """Note that the daemon is shutting down."""
        if not self._stopping:
            self._stopping = True
            self._manager.stopping()
            self._news.set()

    def keys_changed(self) -> None:
        """Discard the figures: keys may have become active or may have ended."""
        self._looked_at = -FRESH
        self._news.set()

    def started(self) -> None:
        """Note that the daemon has started, as far as that depends on it: it is ready for systemd."""
        if not self._ready:
            self._ready = True
            self._manager.ready()
        self._news.set()

    def _settled(self, *, connected: bool) -> None:
        """Note the end of a connection attempt. Even a failed first one makes the service ready for systemd."""
        if connected is not self._connected:
            self._connected = connected
            self._changed_at = self._clock()
        self.started()

    # Queries.

    def condition(self) -> Condition:
        """Return the current condition of the daemon."""
        service = self.service
        renewal = None if service is None else service.renewal
        ledger_stuck = service is not None and service.ledger_stuck
        due = () if renewal is None else renewal.due
        expired = sum(certificate.state is Due.EXPIRED for certificate in due)
        return Condition(
            ready=self._ready,
            stopping=self._stopping,
            broker=self._broker,
            connected=self.edge is not None and self.edge.connected,
            connections=self.connections,
            changed=self._changed_at,
            stores=tuple(StoreCondition(one.name, one.thread.stuck, one.thread.last) for one in self.keystores),
            ledger="" if service is None else service.ledger_trouble or "no_answer" * (self._silent or ledger_stuck),
            ledger_stuck=ledger_stuck,
            due=len(due) - expired,
            expired=expired,
            clock_behind=renewal is not None and renewal.clock_behind,
            watchdog=self._manager.watchdog is not None,
            site=None if self.site is None else self.site(),
        )

    async def figures(self) -> Figures | None:
        """Return the figures of the ledger, at most `FRESH` seconds old; None if it cannot be queried."""
        now = time.monotonic()
        if self._looking is None or (self._looking.done() and now - self._looked_at >= FRESH):
            self._looked_at = now
            self._looking = asyncio.ensure_future(self._look())
        try:
            async with asyncio.timeout(LEDGER_PATIENCE):
                figures = await asyncio.shield(self._looking)
        except TimeoutError:
            self._silent = True
            return None
        self._silent = False
        return figures

    async def _look(self) -> Figures | None:
        if self.service is None or self.service.closed:
            return None
        try:
            return await self.service.figures(expiries=EXPIRIES)
        except LedgerError:  # `ledger_trouble` has it
            return None

    # Background tasks.

    @asynccontextmanager
    async def watching(self, *, probing: bool = False) -> AsyncIterator[None]:
        """Notify systemd while the block runs.

        Args:
            probing: probe the key store also without a watchdog.
        """
        works: dict[str, Work] = {}
        if self._manager.watchdog is not None or probing:
            works["watchdog"] = partial(self._feed, self._manager.watchdog)
        if self._manager:
            works["status"] = self._tell
        async with background(works, self._failures):
            yield

    async def _feed(self, watchdog: float | None) -> None:
        """Send keep-alives from the event loop while neither key store nor ledger hangs."""
        interval = PROBE_INTERVAL if watchdog is None else watchdog / 2
        before, look, fed_at = self.condition(), min(interval, LOOK_INTERVAL), -interval
        while True:
            now = self.condition()
            for earlier, store in zip(before.stores, now.stores, strict=True):
                if store.stuck and not earlier.stuck:
                    log.error("%s hangs", now.called(store))
                elif earlier.stuck and not store.stuck:
                    log.warning("%s recovered", now.called(store).removeprefix("the "))
            if now.ledger_stuck and not before.ledger_stuck:
                log.error("the ledger hangs")
            if now.troubles != before.troubles:
                self._news.set()
            before = now
            if time.monotonic() - fed_at >= interval - look / 2:
                fed_at = time.monotonic()
                if watchdog is not None and not now.stuck:
                    self._manager.alive()
                self._probe(interval)
            # Checked more often than fed, so that log and status line agree with /health.
            await asyncio.sleep(look)

    def _probe(self, interval: float) -> None:
        """Probe each key store whose last result is old; a busy one will give a result, or be stuck."""
        for store in self.keystores:
            thread, last = store.thread, store.thread.last
            fresh = last is not None and last[0] < min(interval, PROBE_INTERVAL) / 2
            if not fresh and not thread.busy and not any(thread.waiting.values()):
                probe = thread.submit(
                    lambda opened: opened.description, timeout=self._patience, turn=Turn.SPARE, task=Task.PROBE
                )
                probe.add_done_callback(partial(self._probed, store.name))

    def _probed(self, name: str, probe: Future[str]) -> None:
        """Store a key store's description; called on its thread."""
        if not probe.cancelled() and probe.exception() is None:
            self.descriptions[name] = probe.result()

    async def _tell(self) -> None:
        """Keep the status line current, from the first connection attempt on."""
        told = ""
        while not self._ready:
            await self._news.wait()
            self._news.clear()
        while True:
            self._news.clear()
            figures = await self.figures()
            if (line := self.condition().sentence(figures)) != told:
                self._manager.status(line)
                told = line
            await asyncio.sleep(STATUS_PAUSE)
            with suppress(TimeoutError):
                async with asyncio.timeout(STATUS_INTERVAL):
                    await self._news.wait()
