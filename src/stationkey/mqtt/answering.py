"""What the MQTT edge passes messages to, and a message while it is being answered."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from stationkey.contract.messages import CertificateInstallationStatus, GenerateCsrRequest, GenerateCsrResponse
from stationkey.errors import StationKeyError
from stationkey.mqtt.connection import Message


class Answering(Protocol):
    """The service that the edge needs; implemented by `stationkey.service.requests.StationKeyService`."""

    def is_surplus(self, request: GenerateCsrRequest, *, most: int) -> bool:
        """Return whether a request is a copy of one in flight while `most` copies wait already."""

    async def answer(self, request: GenerateCsrRequest, *, waited: float = 0.0) -> GenerateCsrResponse:
        """Answer a request that has already waited for `waited` seconds."""

    async def reject(self, request_id: str, error: StationKeyError) -> GenerateCsrResponse:
        """Reject an invalid message that has an id."""

    def pass_over(self, error: StationKeyError) -> None:
        """Note an invalid message that cannot be answered."""

    async def note_status(self, status: CertificateInstallationStatus, *, retained: bool = False) -> None:
        """Handle a certificate status; `retained` if it is from an earlier time."""

    async def undelivered(self) -> list[GenerateCsrResponse]:
        """Return the recorded answers that no broker has acknowledged."""

    async def delivered(self, response: GenerateCsrResponse) -> None:
        """Note that the broker has an answer."""


class InHand(Struct, eq=False):
    """A message that is being answered."""

    message: Message
    request_id: str | None = None

    def about(self) -> dict[str, object]:
        """Return the fields of a log line about it."""
        return {} if self.request_id is None else {"request_id": self.request_id}

    def takes_over(self, again: Message) -> bool:
        """Take `again` as the message to acknowledge if it is this one, redelivered over a new connection.

        The same payload on the same connection is a second request, and gets its own answer.
        """
        if again.connection is self.message.connection or again.payload != self.message.payload:
            return False
        self.message = again
        return True
