"""One shard: the stations of a range of slots, with their ledger, their service and their MQTT session."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec import Struct

from stationkey.daemon import Part, Process, part_of, service_of
from stationkey.errors import LedgerError
from stationkey.ledger import Ledger
from stationkey.ledger.postgresql.slots import shard_of
from stationkey.mqtt.connection import ConnectionLost, MqttConnection, connect
from stationkey.mqtt.topics import Stations
from stationkey.service.active_files import ActiveDirectory
from stationkey.site.connection import Backlog, Cut, Taken
from stationkey.system.backoff import Backoff
from stationkey.system.tasks import note_failure
from stationkey.system.threads import Worker

if TYPE_CHECKING:
    from stationkey.ledger.postgresql.engine import PostgresqlDatabase
    from stationkey.service.requests import StationKeyService

T = TypeVar("T")
log = logging.getLogger(__name__)

OPENING: Final = 4
"""Shards whose ledgers are opened or closed at a time."""
RETRY_FIRST: Final = 0.1
RETRY_LAST: Final = 5.0
"""Seconds between attempts to open the ledger of a shard; doubled each time."""
DIALLING: Final = 1.0
"""Seconds after which the next connection to the broker begins while one is not made yet."""
CLOSING: Final = 2.0
"""Seconds for the last writes of a shard that was drained, before its connection is ended."""


class Blocking:
    """Runs calls that wait for PostgreSQL or the disk, a few at a time. Each of them ends, sooner or later."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(OPENING)
        self._workers = [Worker(f"shards-{number}") for number in range(1, OPENING + 1)]

    async def __call__(self, call: Callable[[], T]) -> T:
        """Return the result of a call. It goes on if its caller is cancelled."""
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        future = next((worker for worker in self._workers if worker.idle), self._workers[0]).submit(call)
        done = asyncio.wrap_future(future, loop=loop)
        done.add_done_callback(self._returned)
        return await asyncio.shield(done)

    def _returned(self, done: asyncio.Future[Any]) -> None:
        self._places.release()
        done.exception()  # retrieved, so that asyncio does not warn of a caller that was cancelled

    def close(self) -> None:
        """End the threads as soon as their calls return."""
        for worker in self._workers:
            worker.close(0)


class Dialling:
    """Begins connections one after another: a thread for the next one is started while the one before connects."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def __call__(self, *positional: Any, **named: Any) -> MqttConnection:
        """Return a connection; see `stationkey.mqtt.connection.connect`."""
        async with self._turn:
            dialled = asyncio.create_task(connect(*positional, **named), name="dial")
            try:
                await asyncio.wait([dialled], timeout=DIALLING)
            except asyncio.CancelledError:
                dialled.cancel()
                dialled.add_done_callback(_drop)
                raise
        return await dialled


def _drop(dialled: asyncio.Task[MqttConnection]) -> None:
    """Close a connection that nobody waits for any more."""
    if not dialled.cancelled() and dialled.exception() is None:
        dialled.result().abandon(ConnectionLost("not wanted any more", reason="connection_lost"))


class Surroundings(Struct, frozen=True):
    """What the shards of a daemon have in common.

    Attributes:
        process: key stores, health, counters.
        cut: how the site is cut.
        stations: the stations of the site.
        blocking: runs calls that block.
        dial: connects to the broker.
        open_database: connects to the database, for a shard; blocks.
        confirm: returns once PostgreSQL has confirmed that this daemon has a shard.
        on_ready: called after each subscription of a shard's MQTT session.
        on_away: called whenever the connection of a shard is lost or fails.
    """

    process: Process
    cut: Cut
    stations: Stations
    blocking: Blocking
    dial: Dialling
    open_database: Callable[[Taken], PostgresqlDatabase]
    confirm: Callable[[int], Awaitable[None]]
    on_ready: Callable[[Taken], None]
    on_away: Callable[[], None]


class _Opened(Struct, frozen=True):
    database: PostgresqlDatabase
    ledger: Ledger
    service: StationKeyService


class Shard:
    """A shard that this daemon has.

    Args:
        taken: number and epoch.
        around: what it shares with the others.
        gate: opens when its MQTT session may be used.

    Attributes:
        number: of the shard.
        opened: set when there is a service.
        abandoned: whether another daemon has the shard.
    """

    def __init__(self, taken: Taken, around: Surroundings, gate: asyncio.Event) -> None:
        self.number = taken.number
        self.opened = asyncio.Event()
        self._taken = taken
        self._around = around
        self._gate = gate
        self._stop = asyncio.Event()
        self.abandoned = False
        self._open: _Opened | None = None
        self._part: Part | None = None

    @property
    def service(self) -> StationKeyService | None:
        """The service, while there is one."""
        return None if self._open is None else self._open.service

    @property
    def connected(self) -> bool:
        """Whether it is subscribed at the broker."""
        return self._part is not None and self._part.edge.connected

    @property
    def admitted(self) -> bool:
        """Whether it may use its MQTT session."""
        return self._gate.is_set()

    @property
    def draining(self) -> bool:
        """Whether it is being released."""
        return self._stop.is_set()

    @property
    def backlog(self) -> Backlog:
        """Messages in flight, and waiting."""
        edge = None if self._part is None else self._part.edge
        return Backlog(0, 0) if edge is None else Backlog(edge.in_hand, edge.waiting)

    def drain(self) -> None:
        """Have `run` finish the messages in flight, and end."""
        self._stop.set()

    def abandon(self) -> None:
        """End all use of the ledger at once: another daemon has the shard."""
        self.abandoned = True
        if self._open is not None:
            self._open.database.abandon()

    async def run(self) -> None:
        """Serve the stations of the shard until drained. A failure that is not foreseen begins it again."""
        backoff = Backoff(RETRY_FIRST, RETRY_LAST)
        try:
            while not self._stop.is_set():
                try:
                    await self._run()
                except Exception as error:  # noqa: BLE001 - the boundary of this shard: the others go on
                    if self.abandoned:
                        return
                    self._note(error)
                finally:
                    await self._close()
                with suppress(TimeoutError):
                    async with asyncio.timeout(backoff.next()):
                        await self._stop.wait()
        finally:
            await self._around.blocking(self._remove_files)

    def _note(self, error: Exception) -> None:
        if isinstance(error, LedgerError):
            log.error("shard not served: %s", error, extra={"shard": self.number, "reason": error.reason})
        else:
            note_failure(error, "shard", self._around.process.counters.task_failures, shard=self.number)

    async def _run(self) -> None:
        around = self._around
        self._open = opened = await around.blocking(self._opening)
        if self.abandoned:  # meanwhile
            opened.database.abandon()
        self.opened.set()  # the first sweep, soon after, writes `active/`: that may take seconds
        if not await self._may_serve():
            return
        self._part = self._make_part(opened.service)
        await self._part.run(self._stop)

    async def _may_serve(self) -> bool:
        """Wait for the gate; return False if it is drained first."""
        waits = [asyncio.create_task(event.wait()) for event in (self._gate, self._stop)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not self._stop.is_set()

    def _opening(self) -> _Opened:
        database = self._around.open_database(self._taken)
        try:
            ledger = Ledger.on(database)
            return _Opened(database, ledger, service_of(self._around.process, ledger))
        except BaseException:
            database.close()
            raise

    def _remove_files(self) -> None:
        """Remove the files in ``active/``: the daemon that serves the shard next has its own."""
        try:
            ActiveDirectory(self._around.process.state_dir).sync(dict, owns=self._owns)
        except LedgerError as error:
            log.error("%s", error, extra={"shard": self.number, "reason": error.reason})

    def _owns(self, station: str) -> bool:
        return shard_of(station, self._around.cut.shards) == self.number

    def _make_part(self, service: StationKeyService) -> Part:
        around, number, cut = self._around, self.number, self._around.cut

        async def connect_confirmed(*positional: Any, **named: Any) -> MqttConnection:
            # Without the lease, it would end the session of the daemon that has the shard now.
            await around.confirm(number)
            return await around.dial(*positional, **named)

        return part_of(
            around.process,
            service,
            client_id=cut.session(number),
            stations=around.stations,
            on_ready=partial(around.on_ready, self._taken),
            on_away=around.on_away,
            share=f"/{number}",
            serves=self._owns,
            stale=self._taken.stale,
            dial=connect_confirmed,
        )

    async def _close(self) -> None:
        opened, self._open, self._part = self._open, None, None
        self.opened.clear()
        if opened is None:
            return
        ending = asyncio.create_task(self._end(opened), name="end-shard")
        try:
            async with asyncio.timeout(0 if self.abandoned else CLOSING):
                await asyncio.shield(ending)
        except TimeoutError:
            opened.database.abandon()
            await ending

    async def _end(self, opened: _Opened) -> None:
        try:
            await opened.service.aclose()
        finally:
            try:
                await self._around.blocking(opened.ledger.close)
            except LedgerError as error:
                if not self.abandoned:
                    about = {"shard": self.number, "reason": error.reason}
                    log.error("marks of delivery were not written: %s", error, extra=about)
