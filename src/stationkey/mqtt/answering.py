"""What the MQTT edge passes messages to, and a message while it is being answered.

A station is named by the part of its topics that is its own; the single station has the empty name.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from msgspec import Struct

from stationkey.contract.messages import CertificateInstallationStatus, GenerateCsrRequest, GenerateCsrResponse
from stationkey.errors import StationKeyError
from stationkey.mqtt.connection import Message


class Answering(Protocol):
    """The service that the edge needs; implemented by `stationkey.service.requests.StationKeyService`."""

    def is_surplus(self, request: GenerateCsrRequest, *, most: int, station: str = "") -> bool:
        """Return whether a request is a copy of one in flight while `most` copies of its station wait already."""

    async def answer(
        self, request: GenerateCsrRequest, *, station: str = "", waited: float = 0.0
    ) -> GenerateCsrResponse:
        """Answer a request that has already waited for `waited` seconds.

        Raises:
            ShardLost: another daemon answers it.
        """

    async def reject(self, request_id: str, error: StationKeyError, *, station: str = "") -> GenerateCsrResponse:
        """Reject an invalid message that has an id."""

    def pass_over(self, error: StationKeyError, *, station: str = "") -> None:
        """Note an invalid message that cannot be answered."""

    async def note_status(
        self, status: CertificateInstallationStatus, *, station: str = "", retained: bool = False
    ) -> None:
        """Handle a certificate status; `retained` if it is from an earlier time."""

    async def undelivered(self) -> list[tuple[str, GenerateCsrResponse]]:
        """Return the recorded answers that no broker has acknowledged, each with its station."""

    async def delivered(self, response: GenerateCsrResponse, *, station: str = "") -> None:
        """Note that the broker has an answer."""


class InHand(Struct, eq=False):
    """A message that is being answered.

    Attributes:
        message: the message.
        station: the station that it is from.
        place: where it holds a place.
        request_id: its id, once it is known.
    """

    message: Message
    station: str
    place: asyncio.Semaphore
    request_id: str | None = None

    def about(self) -> dict[str, object]:
        """Return the fields of a log line about it."""
        return about(self.station, self.request_id)

    def takes_over(self, again: Message) -> bool:
        """Take `again` as the message to acknowledge if it is this one, redelivered over a new connection.

        The same payload on the same connection is a second request, and gets its own answer.
        """
        before = self.message
        if again.connection is before.connection or (again.payload, again.topic) != (before.payload, before.topic):
            return False
        self.message = again
        return True


def about(station: str, request_id: str | None) -> dict[str, object]:
    """Return the fields of a log line about a message, without those that it does not have."""
    fields: dict[str, object] = {} if request_id is None else {"request_id": request_id}
    return {**fields, "station": station} if station else fields
