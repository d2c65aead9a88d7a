"""The daemon of a site: takes shards while PostgreSQL confirms its lease, and serves them.

PostgreSQL alone says who has a shard. A daemon that cannot reach it keeps its MQTT sessions, and so its shards, until
another daemon takes them: that is then told by the lock, by the epoch, or by the broker, which ends the session of
whoever used it before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Final

from msgspec.structs import fields

from stationkey.config.settings import Settings
from stationkey.daemon import DRAIN, Process, collect_garbage, introduce, running, state_of
from stationkey.daemon import run as run_program
from stationkey.errors import BrokerError, ConfigurationError, LedgerError, StationKeyError
from stationkey.keystore.stores import checked_stores
from stationkey.ledger.postgresql import schema
from stationkey.ledger.postgresql.connection import CONNECT_TIMEOUT, Connection, connect, explained
from stationkey.ledger.postgresql.engine import PostgresqlDatabase
from stationkey.ledger.postgresql.engine import Shard as Bound
from stationkey.ledger.postgresql.inventory import SiteInventory
from stationkey.ledger.postgresql.slots import shard_of
from stationkey.mqtt.introduction import check
from stationkey.mqtt.topics import Stations
from stationkey.mqtt.url import Broker
from stationkey.mqtt.waiting import unless
from stationkey.observability.health import Health
from stationkey.observability.status import SiteGlance
from stationkey.service.active_files import ActiveDirectory
from stationkey.service.strays import Strays
from stationkey.site.adoption import Adoption, AllShards
from stationkey.site.balance import balance
from stationkey.site.connection import Cut, Identity, LeaseConnection, Session, Taken, View, shard_connection
from stationkey.site.fitness import Fitness
from stationkey.site.lease import Lease
from stationkey.site.overview import Looking, look
from stationkey.site.shard import Blocking, Dialling, Shard, Surroundings
from stationkey.site.whole import Whole
from stationkey.system.backoff import Backoff
from stationkey.system.tasks import Work, background, keep_running

log = logging.getLogger(__name__)

RETRY_FIRST: Final = 0.1
RETRY_LAST: Final = 2.0
"""Seconds before PostgreSQL is tried again; doubled each time, with a lease up to the interval of heartbeats."""
PAUSE: Final = 0.05
"""Shortest time in seconds between two heartbeats."""
LEAVING: Final = 0.5
"""Seconds for each of the last words to PostgreSQL: it may be away, and the process ends within 10."""


async def serve(settings: Settings) -> signal.Signals:
    """Serve shards of a site until SIGTERM or SIGINT.

    Returns:
        The signal.

    Raises:
        StationKeyError: it cannot start.
    """
    broker = Broker.parse(settings.broker)
    stations = Stations(settings.topic_prefix, settings.site.stations)
    access = _Access(settings, secrets.token_hex(8))
    inventory = SiteInventory(lambda: access.connect(f"keys {access.instance}"), access.instance)
    start_stores = checked_stores(settings, site=inventory)
    with state_of(settings):
        blocking, site = Blocking(), None
        try:
            async with running(settings, broker, start_stores) as process:
                stopped = asyncio.create_task(process.stop.wait(), name="stop")
                await unless(stopped, check(broker, settings.mqtt))
                client_id = await unless(stopped, _reached(access, blocking, process.health))
                if client_id is not None:
                    site = Site(process, access, client_id, stations, blocking)
                    await site.run(stopped)
        finally:  # the key stores are closed by now
            with suppress(LedgerError, TimeoutError):
                async with asyncio.timeout(LEAVING):
                    await blocking(inventory.close)
            if site is not None:
                await site.leave()
            blocking.close()
        log.info("stopped", extra=dict(process.counters.outcomes()))
        return process.received[0]


class _Access:
    """The way to the site's database. Its methods block.

    Args:
        settings: the database, and its password.
        instance: of this process.
    """

    def __init__(self, settings: Settings, instance: str) -> None:
        self.instance = instance
        self._settings = settings

    def identity(self) -> Identity:
        """Return who this daemon is."""
        host, state_dir = socket.gethostname(), self._settings.state_dir
        (usual,) = (field.default for field in fields(Settings) if field.name == "state_dir")
        name = host if state_dir == usual else f"{host}:{state_dir}"
        return Identity(self.instance, name, host, os.getpid(), schema.version())

    def connect(self, name: str) -> Connection:
        """Connect, and prepare the tables."""
        connection = connect(self._settings.ledger, self._settings.ledger_password, name=name)
        try:
            schema.prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def look(self) -> SiteGlance:
        """Look at all shards and daemons of the site."""
        with self.connect("page") as connection, explained("read"):
            return look(connection)

    def client_id(self) -> str:
        """Return what the client identifiers of the site's MQTT sessions begin with; made once."""
        with self.connect("start") as connection, explained("opened"):
            connection.execute(
                "INSERT INTO meta (name, value) VALUES ('mqtt_client_id', %s) ON CONFLICT (name) DO NOTHING",
                (f"stationkey-{secrets.token_hex(6)}",),
            )
            row = connection.execute("SELECT value FROM meta WHERE name = 'mqtt_client_id'").fetchone()
            return self._settings.client_id or str(row[0] if row else "")

    def open(self, taken: Taken, shards: int, on_lost: Callable[[], None]) -> PostgresqlDatabase:
        """Connect for a shard."""
        return PostgresqlDatabase(
            self._settings.ledger,
            self._settings.ledger_password,
            directory=self._settings.state_dir,
            shard=Bound(taken.number, shards, taken.epoch, self.instance),
            on_lost=on_lost,
            name=shard_connection(taken.number, self.instance),
        )


async def _reached(access: _Access, blocking: Blocking, health: Health) -> str:
    """Wait for PostgreSQL, and return the site's client identifier.

    Raises:
        StationKeyError: PostgreSQL refuses.
    """
    backoff, told = Backoff(RETRY_FIRST, RETRY_LAST, jitter=0.5), False
    while True:
        try:
            return await blocking(access.client_id)
        except LedgerError as error:
            if not error.transient:
                raise
            if not told:
                log.error("waiting for PostgreSQL: %s", error, extra={"reason": error.reason})
            told = True
            health.started()
            await asyncio.sleep(backoff.next())


class Site:
    """This daemon's part in a site.

    Args:
        process: key stores, health, counters.
        access: the way to the database.
        client_id: what the client identifiers of the MQTT sessions begin with.
        stations: the stations of the site.
        blocking: runs calls that block.
    """

    def __init__(
        self, process: Process, access: _Access, client_id: str, stations: Stations, blocking: Blocking
    ) -> None:
        site = process.settings.site
        self._process = process
        self._access = access
        self._stations = stations
        self._cut = cut = Cut(site.shards, client_id, stations.filters, site.lease_seconds)
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        detour = CONNECT_TIMEOUT * process.settings.ledger.count(",")
        self._lease = Lease(self._open_lease, seconds=cut.lease, detour=detour, on_news=self._news.set)
        self._around = Surroundings(
            process=process,
            cut=cut,
            stations=stations,
            blocking=blocking,
            dial=Dialling(),
            open_database=self._open_database,
            confirm=self._confirm,
            on_ready=self._on_ready,
            on_away=process.health.away,
        )
        self._shards: dict[int, Shard] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._asked: list[asyncio.Future[None]] = []
        self._fit = False
        self._ending = False
        self._away = False
        self._trouble = ""
        self._stations_differ = False
        self._adoption: Adoption | None = None
        self._adopting: asyncio.Task[None] | None = None
        self._notes: set[asyncio.Task[None]] = set()
        self._strays = {
            f"strays{store.suffix}": Strays(None, store, lease=3 * cut.lease)
            for store in process.keystores
            if store.shared
        }
        self._fitness = Fitness(
            process,
            self._shards.values,
            lambda: self._adoption,
            self._around.dial,
            client_id=f"{client_id}-probe-{access.instance[:8]}",
            patience=cut.lease,
        )
        whole = Whole(
            self._shards.values,
            self._lease,
            count=cut.shards,
            trouble=lambda: self._trouble,
            counters=process.counters,
        )
        process.health.watch(whole, whole)
        process.health.site = whole.site
        self._looking = None if process.settings.metrics is None else Looking(access.look)
        process.health.glance = self._looking

    async def run(self, stopped: asyncio.Task[bool]) -> None:
        """Serve until `stopped` is done.

        Raises:
            StationKeyError: it can never serve.
        """
        process = self._process
        works: dict[str, Work] = {"lease": self._keep_lease, "probe": self._fitness.probe}
        works |= {name: strays.run for name, strays in self._strays.items()}
        try:
            # What an earlier run that was killed has left, of stations that another daemon may serve by now.
            await unless(stopped, self._around.blocking(lambda: ActiveDirectory(process.state_dir).sync(dict)))
            # A daemon is on record before it uses a key store.
            await unless(stopped, self._leased())
            async with background(works, process.counters.task_failures):
                degraded = await unless(stopped, introduce(process))
                if degraded:
                    log.warning("serving degraded: %s", degraded)
                collect_garbage()
                process.health.started()
                self._fit = True
                self._news.set()
                await stopped
                await self._end()
        finally:
            await self._abandon()

    async def leave(self) -> None:
        """Remove this daemon from the record, once it uses no key store any more."""
        with suppress(LedgerError, TimeoutError):
            async with asyncio.timeout(LEAVING):
                await self._lease.leave()
        self._lease.close()
        if self._looking is not None:
            self._looking.close()

    def _open_lease(self, present: bool) -> LeaseConnection:
        return LeaseConnection(
            self._access.connect,
            explained=explained,
            identity=self._access.identity(),
            cut=self._cut,
            present=present,
        )

    def _open_database(self, taken: Taken) -> PostgresqlDatabase:
        def lost() -> None:
            self._loop.call_soon_threadsafe(self._lose, taken.number, taken.epoch)

        return self._access.open(taken, self._cut.shards, lost)

    # The lease.

    async def _leased(self) -> None:
        """Send the first heartbeat."""
        backoff = Backoff(RETRY_FIRST, self._lease.interval, jitter=0.5)
        while True:
            try:
                await self._beat()
            except LedgerError as error:
                self._note_away(error)
                self._process.health.started()
                await asyncio.sleep(backoff.next())
            else:
                return

    async def _keep_lease(self) -> None:
        """Send heartbeats, and take and release shards by what they see, until cancelled."""
        backoff = Backoff(RETRY_FIRST, self._lease.interval, jitter=0.5)
        while True:
            self._news.clear()
            asked, self._asked = self._asked, []
            wait = self._lease.interval
            try:
                view = await self._beat()
                for one in asked:
                    _settle(one, None)
                backoff.reset()
                await self._move(view)
            except LedgerError as error:
                self._note_away(error)
                for one in asked:
                    _settle(one, error)
                wait = backoff.next()
            await asyncio.sleep(PAUSE)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, wait - PAUSE)):
                    await self._news.wait()

    async def _beat(self) -> View:
        view = await self._lease.beat(
            self._trouble or self._fitness.trouble(),
            {number: shard.backlog for number, shard in self._shards.items() if shard.connected},
        )
        if self._away:
            log.info("PostgreSQL is back")
        self._away = False
        for number in self._lease.take_lost():
            self._lost(number)
        return view

    def _note_away(self, error: StationKeyError) -> None:
        """Log once that PostgreSQL is away."""
        if not self._away:
            log.error("no lease; trying again: %s", error, extra={"reason": error.reason})
        self._away = True

    async def _confirm(self, number: int | None = None) -> None:
        """Return once a heartbeat that began after this call has confirmed a shard; all shards if None.

        Raises:
            BrokerError: this daemon does not have it, or PostgreSQL cannot be asked.
        """
        asked = self._loop.create_future()
        self._asked.append(asked)
        self._news.set()
        try:
            await asked
        except LedgerError as error:
            raise BrokerError(
                f"not connecting to the broker: {error.message}",
                reason="lease_unconfirmed",
                hint="another daemon may have the shard by now; connects when PostgreSQL confirms that it has not",
            ) from None
        numbers = range(self._cut.shards) if number is None else (number,)
        if not self._lease.held.keys() >= set(numbers):
            raise BrokerError("not connecting to the broker: another daemon has the shard", reason="lease_unconfirmed")

    # Shards.

    async def _move(self, view: View) -> None:
        """Take and release shards by what was seen."""
        if self._ending or not self._fit:
            return
        if self._adopting is not None:
            if view.is_left_to_others:
                self._give_up_adoption()
        elif view.old:
            await self._move_from_old(view)
        else:
            await self._balance(view)

    async def _balance(self, view: View) -> None:
        self._in_trouble(None)
        self._note_stations(differ=view.stations_differ)
        for number in view.held - self._lease.held.keys():  # not served: else nobody could take it
            await self._lease.release(number)
        move = balance(
            self._cut.shards,
            me=view.me,
            loads=view.loads,
            held=self._lease.held.keys(),
            free=view.free,
            unfit=view.unfit,
        )
        for number in move.release:
            shard = self._shards.get(number)
            if shard is not None and not shard.draining:
                log.info("releasing shard to another daemon", extra={"shard": number})
                shard.drain()
        for number in move.take:
            try:
                taken = await self._lease.take(number)
            except LedgerError as error:
                if error.reason != "ledger_busy":
                    raise
                # The last holder was stopped within a transaction; PostgreSQL ends that in seconds.
                log.warning("shard not taken yet: %s", error, extra={"shard": number, "reason": error.reason})
                continue
            if taken is not None:
                self._start(taken, _open_gate())

    async def _move_from_old(self, view: View) -> None:
        """Adopt this number of shards, once no daemon of another one has a shard."""
        if view.others:
            self._in_trouble(
                ConfigurationError(
                    f"daemons have shards that are configured with another number than {self._cut.shards},"
                    " or another client_id",
                    reason="shard_count_differs",
                    hint="stop them, and start them with the same configuration; this daemon takes shards then",
                )
            )
            return
        self._in_trouble(None)
        adopted = None if view.is_left_to_others else await self._lease.adopt()
        if adopted is None:
            return  # another daemon is about it
        taken, sessions = adopted
        log.warning("adopting a new number of shards", extra={"shards": len(taken), "old_sessions": len(sessions)})
        gate = asyncio.Event()
        for one in taken:
            self._start(one, gate)
        self._adoption = Adoption(
            self._process,
            self._cut,
            self._stations,
            AllShards(lambda station: self._shards[shard_of(station, self._cut.shards)]),
            dial=self._around.dial,
            confirm=self._confirm,
            ended=self._lease.ended,
        )
        self._adopting = self._loop.create_task(self._adopt(self._adoption, sessions, gate), name="adoption")

    async def _adopt(self, adoption: Adoption, sessions: list[Session], gate: asyncio.Event) -> None:
        try:
            await keep_running(partial(adoption.end, sessions), "adoption", self._process.counters.task_failures)
        finally:
            self._adoption = self._adopting = None
        gate.set()
        self._news.set()

    def _in_trouble(self, error: StationKeyError | None) -> None:
        """Note why this daemon takes no shards; log it once."""
        reason = "" if error is None else error.reason
        if error is not None and reason != self._trouble:
            log.error("no shards taken: %s", error, extra={"reason": reason})
        self._trouble = reason

    def _note_stations(self, *, differ: bool) -> None:
        """Log once that other daemons serve other stations, as long as that is so."""
        if differ and not self._stations_differ:
            error = ConfigurationError(
                "daemons of this site have different [site] stations",
                reason="stations_differ",
                hint="a station that not all of them have is answered by chance. Restart them with the same ones",
            )
            log.warning("%s", error, extra={"reason": error.reason})
        self._stations_differ = differ

    def _start(self, taken: Taken, gate: asyncio.Event) -> None:
        number = taken.number
        log.info("shard taken", extra={"shard": number, "epoch": taken.epoch})
        shard, before = Shard(taken, self._around, gate), self._tasks.get(number)
        self._shards[number] = shard
        self._tasks[number] = self._loop.create_task(self._serve(shard, before), name=f"shard-{number}")
        for strays in self._strays.values():
            strays.soon()

    async def _serve(self, shard: Shard, before: asyncio.Task[None] | None) -> None:
        """Run a shard to its end, and release it."""
        number = shard.number
        try:
            if before is not None:
                await asyncio.wait([before])
            await shard.run()
        finally:
            if self._shards.get(number) is shard:
                del self._shards[number], self._tasks[number]
        if not shard.abandoned:
            with suppress(LedgerError):  # PostgreSQL releases it when the connection ends
                await self._lease.release(number)
            log.info("shard released", extra={"shard": number})

    def _lose(self, number: int, epoch: int) -> None:
        """Note that a transaction found a later epoch than this daemon's."""
        if self._lease.held.get(number) == epoch:
            self._lost(number)
            self._note(self._lease.release(number))

    def _lost(self, number: int) -> None:
        """End a shard at once that another daemon has taken."""
        shard = self._shards.get(number)
        if shard is None or shard.abandoned:
            return
        log.warning("shard lost: another daemon has taken it", extra={"shard": number, "reason": "shard_lost"})
        shard.abandon()
        self._tasks[number].cancel()
        self._give_up_adoption()  # it needs all of them

    def _give_up_adoption(self) -> None:
        """Leave an adoption that goes on, and all shards, to another daemon."""
        if self._adopting is not None:
            self._adopting.cancel()
            for shard in self._shards.values():
                shard.drain()

    def _on_ready(self, taken: Taken) -> None:
        log.info("ready", extra={"shard": taken.number})
        self._process.health.connected()
        if taken.stale:
            self._note(self._lease.subscribed(taken.number))

    def _note(self, call: Coroutine[Any, Any, None]) -> None:
        """Tell PostgreSQL something, if it can be reached."""

        async def note() -> None:
            with suppress(LedgerError):
                await call

        task = self._loop.create_task(note(), name="note")
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def _end(self) -> None:
        """Finish the messages in flight, and release the shards so that others take them at once."""
        self._ending = True
        self._note(self._lease.retire())
        if self._adopting is not None:
            self._adopting.cancel()
        for shard in self._shards.values():
            shard.drain()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=DRAIN + LEAVING)

    async def _abandon(self) -> None:
        """End what is left of shards, whatever PostgreSQL does."""
        left = list(self._tasks.values())
        for shard in self._shards.values():
            shard.abandon()
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=LEAVING)


def _settle(asked: asyncio.Future[None], error: LedgerError | None) -> None:
    if asked.done():
        return
    if error is None:
        asked.set_result(None)
    else:
        asked.set_exception(error)


def _open_gate() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


def run(settings: Settings) -> signal.Signals:
    """Run `serve` in an event loop.

    Raises:
        StationKeyError: it cannot start.
    """
    return run_program(settings, serve)
