"""How the daemon is: what `/health` and systemd are told, and whether the key store still answers.

**Stuck** is a key store with a call out for longer than its whole time. Only then do the signs of life for systemd's
watchdog stop, for only then does a new process help: the call is given up with the old one. A TPM that is gone fails at
once, and no restart brings it back. A TPM that works for minutes at an RSA key has minutes for that. Where nobody wants
anything, nobody would notice: so each key store is asked a small question now and then.

The ledger's thread hangs where the disk does. The signs of life stop then, too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final, Protocol

from stationkey.errors import LedgerError
from stationkey.keystore.stores import KeyStores
from stationkey.keystore.worker import Task, Turn
from stationkey.ledger import Figures
from stationkey.observability.status import Condition, StoreCondition
from stationkey.service.requests import StationKeyService
from stationkey.system.counters import Counts
from stationkey.system.systemd import ServiceManager
from stationkey.system.tasks import Work, background
from stationkey.x509.renewal import Due

log = logging.getLogger(__name__)

FRESH: Final = 1.0
"""Seconds for which figures of the ledger are good: however often they are asked for, requests wait for no more."""
LEDGER_PATIENCE: Final = 2.0
"""Seconds that they are waited for."""
EXPIRIES: Final = 32
"""Of how many active keys it is told when the certificate expires. EVSE IDs come over MQTT, and there are many."""
PROBE_INTERVAL: Final = 30.0
"""Seconds between two questions to a key store that nobody wants anything of, at the most."""
LOOK_INTERVAL: Final = 5.0
"""Seconds between two looks at what nobody tells: that a call to the key store hangs, and that it does no more."""
STATUS_INTERVAL: Final = 30.0
"""Seconds between two looks at whether the line of status is still true, where nothing is told meanwhile."""
STATUS_PAUSE: Final = 1.0
"""Seconds between two lines of status at least."""


class Connecting(Protocol):
    """What is looked at of the edge; `stationkey.mqtt.gateway.MqttEdge` has it."""

    @property
    def connected(self) -> bool:
        """Whether requests can come."""
        ...

    @property
    def in_hand(self) -> int:
        """How many messages are being answered."""
        ...

    @property
    def waiting(self) -> int:
        """How many messages wait for that."""
        ...


class Health:
    """Watches the parts of a daemon, and tells systemd.

    Args:
        keystores: the key stores.
        manager: systemd, if there is one.
        broker: URL of the broker, without secrets.
        patience: seconds that the key store may take for a small question.
        clock: Unix time in seconds.
        failures: counts what goes wrong in its tasks.

    Attributes:
        service: the service, as soon as there is one.
        edge: the edge to the broker, likewise.
        connections: how often the broker's subscription has stood.
        descriptions: what a key store is, in words, by its name; empty until it has said so.
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
        self.service: StationKeyService | None = None
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

    # What the daemon reports.

    def connected(self) -> None:
        """The broker's subscription stands."""
        self.connections += 1
        self._settled(connected=True)

    def away(self) -> None:
        """There is no connection to the broker: it was lost, or could not be made."""
        self._settled(connected=False)

    def watch(self, service: StationKeyService, edge: Connecting) -> None:
        """These are the parts of the daemon."""
        self.service, self.edge = service, edge

    def stopping(self) -> None:
        """The daemon was told to end."""
        if not self._stopping:
            self._stopping = True
            self._manager.stopping()
            self._news.set()

    def keys_changed(self) -> None:
        """Keys may have become active, or may have ended."""
        self._looked_at = -FRESH  # what was seen before is of no use
        self._news.set()

    def _settled(self, *, connected: bool) -> None:
        """A try at the broker is over. Whether the first one succeeded is not for the service manager to wait for."""
        if connected is not self._connected:
            self._connected = connected
            self._changed_at = self._clock()
        if not self._ready:
            self._ready = True
            self._manager.ready()
        self._news.set()

    # What can be asked.

    def condition(self) -> Condition:
        """How the daemon is now."""
        renewal = None if self.service is None else self.service.renewal
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
            ledger="" if self.service is None else self.service.ledger_trouble or "no_answer" * self._silent,
            due=len(due) - expired,
            expired=expired,
            clock_behind=renewal is not None and renewal.clock_behind,
            watchdog=self._manager.watchdog is not None,
        )

    async def figures(self) -> Figures | None:
        """What the ledger has on record, as it was `FRESH` seconds ago at the most; None where it cannot be asked."""
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
        except LedgerError:  # told by `ledger_trouble`
            return None

    # What goes on meanwhile.

    @asynccontextmanager
    async def watching(self, *, probing: bool = False) -> AsyncIterator[None]:
        """Tell systemd what it wants to know, for the length of a block.

        Args:
            probing: ask the key store now and then, though there be no watchdog.
        """
        works: dict[str, Work] = {}
        if self._manager.watchdog is not None or probing:
            works["watchdog"] = partial(self._feed, self._manager.watchdog)
        if self._manager:
            works["status"] = self._tell
        async with background(works, self._failures):
            yield

    async def _feed(self, watchdog: float | None) -> None:
        """Give signs of life while neither key store nor ledger hangs. The event loop gives them, so it lives."""
        interval = PROBE_INTERVAL if watchdog is None else watchdog / 2
        before, ledger_was_stuck = self.condition(), False
        look, fed_at = min(interval, LOOK_INTERVAL), -interval
        while True:
            now = self.condition()
            for earlier, store in zip(before.stores, now.stores, strict=True):
                if store.stuck and not earlier.stuck:
                    log.error("%s hangs", now.called(store))
                elif earlier.stuck and not store.stuck:
                    log.warning("%s recovered", now.called(store).removeprefix("the "))
            if now.troubles != before.troubles:
                self._news.set()
            ledger_stuck = self.service is not None and self.service.ledger_stuck
            if ledger_stuck and not ledger_was_stuck:
                log.error("the ledger hangs")
            ledger_was_stuck = ledger_stuck
            before = now
            if time.monotonic() - fed_at >= interval - look / 2:
                fed_at = time.monotonic()
                if watchdog is not None and not (now.stuck or ledger_stuck):
                    self._manager.alive()
                self._probe(interval)
            # Looked at more often than fed: /health knows at once, and the log and the line of status are to agree.
            await asyncio.sleep(look)

    def _probe(self, interval: float) -> None:
        """Ask each key store whose last sign of life is old; a busy one will give one, or be stuck."""
        for store in self.keystores:
            thread, last = store.thread, store.thread.last
            fresh = last is not None and last[0] < min(interval, PROBE_INTERVAL) / 2
            if not fresh and not thread.busy and not any(thread.waiting.values()):
                probe = thread.submit(
                    lambda opened: opened.description, timeout=self._patience, turn=Turn.SPARE, task=Task.PROBE
                )
                probe.add_done_callback(partial(self._probed, store.name))

    def _probed(self, name: str, probe: Future[str]) -> None:
        """Keep what a key store says it is; called on its thread."""
        if not probe.cancelled() and probe.exception() is None:
            self.descriptions[name] = probe.result()

    async def _tell(self) -> None:
        """Keep the line of status true, from the first try at the broker on."""
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
