"""Requests in flight: one at a time for each id.

A repeat is recognised here if the first request is in flight, and by the ledger if it was answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec import Struct, field

from stationkey.contract.messages import GenerateCsrRequest
from stationkey.errors import RequestRefused
from stationkey.ledger import content_digest


class _Flight(Struct):
    """The requests with one id: their content and number."""

    digest: bytes
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    requests: int = 0


class InFlight:
    """The requests in flight, by station and id in lower case."""

    def __init__(self) -> None:
        self._flights: dict[tuple[str, str], _Flight] = {}

    def is_surplus(self, request: GenerateCsrRequest, *, most: int, station: str = "") -> bool:
        """Return whether a request is a copy of one in flight while `most` copies of its station wait already."""
        flight = self._flights.get((station, request.id.lower()))
        if flight is None or flight.digest != content_digest(request):
            return False
        flights = self._flights.items()
        return sum(flight.requests - 1 for (owner, _), flight in flights if owner == station) >= most

    def is_contested(self, request: GenerateCsrRequest, *, station: str = "") -> bool:
        """Return whether a request with the same id and other content is in flight."""
        flight = self._flights.get((station, request.id.lower()))
        return flight is not None and flight.digest != content_digest(request)

    @asynccontextmanager
    async def turn(self, request: GenerateCsrRequest, *, station: str = "") -> AsyncIterator[None]:
        """Serialise requests with the same id, so that the second finds the recorded answer to the first.

        Raises:
            RequestRefused: a request with other content is in flight; this one does not wait for it.
        """
        name, digest = (station, request.id.lower()), content_digest(request)
        flight = self._flights.setdefault(name, _Flight(digest))
        if flight.digest != digest:
            raise RequestRefused("a request with this id and other content is in flight", reason="id_reused")
        flight.requests += 1
        try:
            async with flight.turn:
                yield
        finally:
            flight.requests -= 1
            if not flight.requests:
                del self._flights[name]
