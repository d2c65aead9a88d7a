"""Josev's place under load: a client that misses no answer, and knows what the broker has taken."""

from __future__ import annotations

import itertools
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

from asking import BOUND, Asking
from msgspec import UNSET
from peers import Mosquitto

from stationkey.contract.messages import (
    CertificateInstallationStatus,
    CertificateInstallationStatusData,
    GenerateCsrRequest,
    GenerateCsrResponse,
    encode,
)
from stationkey.contract.profiles import Algorithm, CertificateType

_REQUESTS: Final = "josev/cs"
_RESPONSES: Final = "cs/josev"


def until(condition: Callable[[], object], what: str, *, bound: float = BOUND) -> None:
    """Wait until `condition` is true of another process, which has no event to tell us by."""
    end = time.monotonic() + bound
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.005)


class Asker(Asking[str]):
    """Asks for one station. A request is known by its id."""

    def __init__(self, broker: Mosquitto) -> None:
        super().__init__(broker, "asker", [_RESPONSES])
        self._client.reconnect_delay_set(0.1, 0.1)  # type: ignore[arg-type] # it is added to a time
        self._client.on_socket_open = lambda _client, _data, sock: _without_nagle(sock)
        self._evses = itertools.count(1)

    def known_by(self, topic: str, request_id: str) -> str:  # noqa: ARG002 - there is one topic
        return request_id

    def repeat(self, asked: str) -> None:
        self.publish(self.requests[asked])

    def ask_next(self) -> None:
        self.publish(self.request())

    def request(
        self,
        *,
        request_id: str | None = None,
        certificate_type: CertificateType = CertificateType.CHARGING_STATION_CERTIFICATE,
        evse_id: str | None = None,
        algorithm: Algorithm = Algorithm.ECDSA_SHA256,
    ) -> GenerateCsrRequest:
        """A request of its own id, for an EVSE of its own where none is named."""
        return super().request(
            request_id=request_id,
            certificate_type=certificate_type,
            evse_id=evse_id or f"DE*ABC*E{next(self._evses)}",
            algorithm=algorithm,
        )

    def publish(self, request: GenerateCsrRequest, *, payload: bytes | None = None) -> None:
        """Publish a request, as `payload` where it is to be another; wait for nothing."""
        self.send_request(request.id, _REQUESTS, request, payload=payload)

    def ask(self, request: GenerateCsrRequest | None = None) -> GenerateCsrResponse:
        """Publish a request, and wait for one more answer to it than there were."""
        request = request or self.request()
        return self.one_more(request.id, lambda: self.publish(request)).response

    def tell(
        self,
        status: Literal["installed", "deleted", "failed_installation"],
        *,
        evse_id: str,
        certificate_type: CertificateType = CertificateType.CHARGING_STATION_CERTIFICATE,
        private_key_path: Path | None = None,
    ) -> str:
        """Publish a status, and return its id; wait for nothing."""
        path = UNSET if private_key_path is None else str(private_key_path)
        update = CertificateInstallationStatus(
            id=str(uuid.uuid4()),
            name="certificate_installation_status",
            type="update",
            data=CertificateInstallationStatusData(
                certificate_type=certificate_type, status=status, evse_id=evse_id, private_key_path=path
            ),
        )
        self.send(update.id, _REQUESTS, encode(update))
        return update.id


def _without_nagle(sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
