"""Gateways and services for the tests."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from stationkey.config.settings import MqttTerms
from stationkey.contract.messages import (
    CertificateInstallationStatus,
    GenerateCsrRequest,
    GenerateCsrResponse,
    accepted,
    decode_response,
)
from stationkey.errors import LedgerError, StationKeyError
from stationkey.mqtt import connection as mqtt
from stationkey.mqtt.bounds import MAX_IN_HAND
from stationkey.mqtt.connection import (
    MqttConnection,
)
from stationkey.mqtt.gateway import MqttEdge
from stationkey.mqtt.retained import RetainedTopic
from stationkey.mqtt.url import Broker

BOUND = 30.0
"""Seconds after which a test that waits for something has failed. Nothing is measured by it."""


def payload(request_id: str | None = None) -> bytes:
    """A request with an id of its own."""
    data = {
        "certificate_type": "charging_station_certificate",
        "common_name": "9783161484100",
        "organization_name": "EcoG",
        "country_name": "DE",
    }
    message = {"id": request_id or str(uuid.uuid4()), "name": "generate_csr", "type": "request", "data": data}
    return json.dumps(message).encode()


class Service:
    """Answers while its gate is open, and says what it was asked."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[str] = []
        self.stations: list[str] = []
        self.waited: list[float] = []
        self.handed_over: list[str] = []
        self.handed_over_to: list[str] = []
        self.earlier: list[tuple[str, GenerateCsrResponse]] = []
        self.faulty: str | None = None
        self.unreadable = False
        self.most_at_once = 0
        self._at_once = 0
        self._open: list[tuple[str, GenerateCsrRequest]] = []
        self._news = asyncio.Condition()

    def is_surplus(self, request: GenerateCsrRequest, *, most: int, station: str = "") -> bool:
        same = (station, request.id.lower(), request.data)
        return sum(same == (whose, one.id.lower(), one.data) for whose, one in self._open) > most

    async def answer(
        self, request: GenerateCsrRequest, *, station: str = "", waited: float = 0.0
    ) -> GenerateCsrResponse:
        self.stations.append(station)
        self.waited.append(waited)
        self._open.append((station, request))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await self._note(self.asked, request.id)
        await self.gate.wait()
        self._at_once -= 1
        self._open.remove((station, request))
        if request.id == self.faulty:
            raise ZeroDivisionError("a fault of ours")
        return accepted(request, "a CSR")

    async def reject(self, request_id: str, error: StationKeyError, *, station: str = "") -> GenerateCsrResponse:
        raise AssertionError(f"no test sends a wrong request, {request_id} of {station!r}") from error

    def pass_over(self, error: StationKeyError, *, station: str = "") -> None:
        raise AssertionError(f"no test sends what cannot be answered, to {station!r}") from error

    async def note_status(
        self, status: CertificateInstallationStatus, *, station: str = "", retained: bool = False
    ) -> None:
        raise AssertionError(f"no test sends {status} of {station!r}, retained or not: {retained}")

    async def undelivered(self) -> list[tuple[str, GenerateCsrResponse]]:
        if self.unreadable:
            raise LedgerError("the ledger cannot be read", reason="ledger_error")
        return self.earlier

    async def delivered(self, response: GenerateCsrResponse, *, station: str = "") -> None:
        self.handed_over_to.append(station)
        await self._note(self.handed_over, response.id)

    async def _note(self, where: list[str], what: str) -> None:
        async with self._news:
            where.append(what)
            self._news.notify_all()

    async def until(self, true: Callable[[], bool]) -> None:
        async with self._news, asyncio.timeout(BOUND):
            await self._news.wait_for(true)


class Edge:
    """A running edge, and how often it was ready."""

    def __init__(
        self,
        broker: Broker,
        service: Service,
        *,
        drain: float = 5.0,
        terms: MqttTerms = mqtt.PLAIN,
        queue: int = MAX_IN_HAND,
        payload_bytes: int = 65536,
        retained: RetainedTopic | None = None,
        **site: Any,
    ) -> None:
        self.service = service
        self.stop = asyncio.Event()
        self._ready: asyncio.Queue[None] = asyncio.Queue()
        edge = MqttEdge(
            broker,
            service,
            client_id="the-station",
            terms=terms,
            queue=queue,
            payload_bytes=payload_bytes,
            retained=retained,
            **site,
            on_ready=lambda: self._ready.put_nowait(None),
        )
        self.task = asyncio.create_task(edge.run(self.stop, drain=drain))

    async def ready(self) -> None:
        """Wait until it is ready once more."""
        async with asyncio.timeout(BOUND):
            await self._ready.get()

    async def end(self) -> None:
        self.stop.set()
        async with asyncio.timeout(BOUND):
            await self.task


@asynccontextmanager
async def serving(broker: Broker, service: Service, **limits: Any) -> AsyncIterator[Edge]:
    edge = Edge(broker, service, **limits)
    try:
        await edge.ready()
        yield edge
    finally:
        service.gate.set()
        await edge.end()


async def answers(connection: MqttConnection, count: int) -> list[str]:
    """The ids of the next answers."""
    ids: list[str] = []
    async with asyncio.timeout(BOUND):
        while len(ids) < count:
            message = await connection.receive()
            message.acknowledge()
            response = decode_response(message.payload)
            assert response is not None
            ids.append(response.id)
    return ids
