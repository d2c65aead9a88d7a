"""A changed number of shards: end the MQTT sessions of the old cut without losing what they hold.

The old sessions hold the messages of the time in which no daemon ran. So, in this order: the new sessions are
subscribed; the old ones are unsubscribed; what they hold is answered, by all shards of the new cut in one process; they
are ended. Only then the new sessions are served. What came between the first two steps is in both: a request is
answered twice, the same way, and the copy of a status is passed over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final

from msgspec.structs import replace

from stationkey.contract.messages import CertificateInstallationStatus, GenerateCsrRequest, GenerateCsrResponse
from stationkey.daemon import DRAIN, Process
from stationkey.errors import StationKeyError
from stationkey.ledger.postgresql.slots import shard_of
from stationkey.mqtt.answering import Answering
from stationkey.mqtt.connection import MqttConnection
from stationkey.mqtt.gateway import MqttEdge
from stationkey.mqtt.topics import Stations
from stationkey.service.requests import StationKeyService
from stationkey.site.connection import Cut, Session
from stationkey.site.shard import Dialling, Shard
from stationkey.system.backoff import Backoff

log = logging.getLogger(__name__)

QUIET: Final = 3.0
"""Seconds without a message after which a session counts as empty: the broker sends what it holds at once."""
LOOK: Final = 0.1
"""Seconds between two looks."""
AT_ONCE: Final = 8
"""Sessions that are ended at a time."""
RETRY_FIRST: Final = 0.1
RETRY_LAST: Final = 10.0
"""Seconds between attempts to reach the broker; doubled each time."""


class AllShards(Answering):
    """Passes each message to the service of its station's shard, as soon as there is one.

    Args:
        shard: returns the shard of a station.
    """

    def __init__(self, shard: Callable[[str], Shard]) -> None:
        self._shard = shard

    async def _service(self, station: str) -> StationKeyService:
        shard = self._shard(station)
        while (service := shard.service) is None:
            await shard.opened.wait()
        return service

    def is_surplus(self, request: GenerateCsrRequest, *, most: int, station: str = "") -> bool:
        """Return whether a request is a surplus copy; see `Answering`."""
        service = self._shard(station).service
        return service is not None and service.is_surplus(request, most=most, station=station)

    async def answer(
        self, request: GenerateCsrRequest, *, station: str = "", waited: float = 0.0
    ) -> GenerateCsrResponse:
        """Answer a request; see `Answering`."""
        return await (await self._service(station)).answer(request, station=station, waited=waited)

    async def reject(self, request_id: str, error: StationKeyError, *, station: str = "") -> GenerateCsrResponse:
        """Reject a message; see `Answering`."""
        return await (await self._service(station)).reject(request_id, error, station=station)

    def pass_over(self, error: StationKeyError, *, station: str = "") -> None:
        """Note an invalid message; see `Answering`."""
        service = self._shard(station).service
        if service is not None:
            service.pass_over(error, station=station)

    async def note_status(
        self, status: CertificateInstallationStatus, *, station: str = "", retained: bool = False
    ) -> None:
        """Handle a status; see `Answering`. The session of the new cut may have a copy of it."""
        service = await self._service(station)
        await service.note_status(status, station=station, retained=retained)
        service.expect_copy(status, station=station)

    async def undelivered(self) -> list[tuple[str, GenerateCsrResponse]]:
        """Return nothing: each shard publishes its own."""
        return []

    async def delivered(self, response: GenerateCsrResponse, *, station: str = "") -> None:
        """Note that the broker has an answer; see `Answering`."""
        await (await self._service(station)).delivered(response, station=station)


class Adoption:
    """Ends the MQTT sessions of an old cut.

    Args:
        process: the broker and its terms.
        cut: the new cut.
        stations: the stations of the site.
        service: answers for all of them.
        dial: connects to the broker.
        confirm: returns once PostgreSQL has confirmed that this daemon has all shards.
        ended: records that a session no longer exists.

    Attributes:
        connected: whether the last attempt to reach the broker was successful.
    """

    def __init__(
        self,
        process: Process,
        cut: Cut,
        stations: Stations,
        service: Answering,
        *,
        dial: Dialling,
        confirm: Callable[[], Awaitable[None]],
        ended: Callable[[str], Awaitable[None]],
    ) -> None:
        self.connected = True
        self._process = process
        self._cut = cut
        self._stations = stations
        self._service = service
        self._confirm = confirm
        self._ended = ended
        settings = process.settings
        self._terms = replace(settings.mqtt, availability_topic=None)
        self._connect = dial
        self._dial = partial(
            self._noted, process.broker, terms=self._terms, in_hand=1, max_payload=settings.policy.payload_bytes
        )

    async def end(self, sessions: Iterable[Session]) -> None:
        """End the sessions of the old cut; returns when all have ended."""
        sessions = tuple(sessions)
        for client_id in self._cut.sessions:
            await self._until_done(partial(self._subscribe, client_id), client_id)
        for session in sessions:  # all of them at once, so that little comes twice
            await self._until_done(partial(self._unsubscribe, session), session.client_id)
        places = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for session in sessions:
                group.create_task(self._end_one(session, places))

    async def _end_one(self, session: Session, places: asyncio.Semaphore) -> None:
        async with places:
            await self._empty(session)
            await self._until_done(partial(self._forget, session.client_id), session.client_id)
            log.info("MQTT session of an earlier number of shards ended", extra={"client_id": session.client_id})

    async def _until_done(self, step: Callable[[], Awaitable[None]], client_id: str) -> None:
        backoff = Backoff(RETRY_FIRST, RETRY_LAST, jitter=0.5)
        while True:
            try:
                await step()
            except StationKeyError as error:
                wait = backoff.next()
                about = {"client_id": client_id, "reason": error.reason}
                log.warning("%s; trying again in %.1f s", error, wait, extra=about)
                await asyncio.sleep(wait)
            else:
                return

    async def _noted(self, *positional: Any, **named: Any) -> MqttConnection:
        """Connect to the broker, and note whether that works."""
        self.connected = False
        connection = await self._connect(*positional, **named)
        self.connected = True
        return connection

    async def _subscribe(self, client_id: str) -> None:
        await self._confirm()
        async with await self._dial(client_id=client_id, persistent=True) as connection:
            for topic_filter in self._stations.filters:
                await connection.subscribe(topic_filter)

    async def _unsubscribe(self, session: Session) -> None:
        await self._confirm()
        async with await self._dial(client_id=session.client_id, persistent=True) as connection:
            for topic_filter in session.filters:
                await connection.unsubscribe(topic_filter)

    async def _empty(self, session: Session) -> None:
        """Answer what a session holds."""
        settings = self._process.settings

        async def connect_confirmed(*positional: Any, **named: Any) -> MqttConnection:
            await self._confirm()
            return await self._noted(*positional, **named)

        edge = MqttEdge(
            self._process.broker,
            self._service,
            client_id=session.client_id,
            topic_prefix=settings.topic_prefix,
            stations=self._stations.draining(),
            # Each session of the old cut has the messages of all stations, and was to answer those of its own.
            serves=lambda station: shard_of(station, session.of) == session.number,
            terms=self._terms,
            queue=settings.policy.queue,
            payload_bytes=settings.policy.payload_bytes,
            failures=self._process.counters.task_failures,
            connect=connect_confirmed,
        )
        empty = asyncio.Event()
        watch = asyncio.create_task(_set_when_quiet(edge, empty), name="quiet")
        try:
            await edge.run(empty, drain=DRAIN)
        finally:
            watch.cancel()

    async def _forget(self, client_id: str) -> None:
        """Have the broker end a session, and record that."""
        await self._confirm()
        connection = await self._dial(client_id=client_id, persistent=False)
        await connection.close(forget=True)
        await self._ended(client_id)


async def _set_when_quiet(edge: MqttEdge, empty: asyncio.Event) -> None:
    now = asyncio.get_running_loop().time
    since = now()
    while now() - since < QUIET:
        if not edge.connected or edge.in_hand or edge.waiting:
            since = now()
        await asyncio.sleep(LOOK)
    empty.set()
