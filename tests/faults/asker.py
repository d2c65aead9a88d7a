"""Josev's place under load: a client that misses no answer, and knows what the broker has taken."""

from __future__ import annotations

import itertools
import socket
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, Self

import paho.mqtt.client as paho
from msgspec import UNSET
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from peers import Mosquitto

from stationkey.contract.messages import (
    CertificateInstallationStatus,
    CertificateInstallationStatusData,
    GenerateCsrData,
    GenerateCsrRequest,
    GenerateCsrResponse,
    decode_response,
    encode,
    generate_csr,
)
from stationkey.contract.profiles import Algorithm, CertificateType

BOUND: Final = 20.0
"""Seconds after which a test that waits for something has failed. Nothing is measured by it."""


def until(condition: Callable[[], object], what: str, *, bound: float = BOUND) -> None:
    """Wait until `condition` is true of another process, which has no event to tell us by."""
    end = time.monotonic() + bound
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.005)


class Asker:
    """Asks over MQTT, from a thread of paho's own. The broker keeps its session, so that no answer is missed.

    Attributes:
        requests: what was asked, by id.
        answers: what came, by id.
        load: how many requests are to be without an answer at any time; each answer is followed by a new request.
    """

    def __init__(self, broker: Mosquitto) -> None:
        self._port = broker.port
        self._numbers = itertools.count(1)
        self._news = threading.Condition()
        self._subscribed = threading.Event()
        self._published: list[tuple[str, paho.MQTTMessageInfo]] = []
        self.requests: dict[str, GenerateCsrRequest] = {}
        self.answers: defaultdict[str, list[GenerateCsrResponse]] = defaultdict(list)
        self._open: set[str] = set()
        self.load = 0
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=f"asker-{uuid.uuid4().hex[:8]}", protocol=MQTTProtocolVersion.MQTTv5
        )
        client.reconnect_delay_set(1, 1)
        client.on_socket_open = lambda _client, _data, sock: _without_nagle(sock)
        client.on_connect = lambda connected, *_: connected.subscribe("cs/josev", qos=1)
        client.on_subscribe = lambda *_: self._subscribed.set()
        client.on_message = lambda _client, _data, message: self._receive(bytes(message.payload))

    def __enter__(self) -> Self:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho types its client only
        properties.SessionExpiryInterval = 3600
        self._client.connect("127.0.0.1", self._port, clean_start=False, properties=properties)
        self._client.loop_start()
        assert self._subscribed.wait(BOUND)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    # Asking.

    def request(
        self,
        *,
        algorithm: Algorithm = Algorithm.ECDSA_SHA256,
        evse_id: str | None = None,
        certificate_type: CertificateType = CertificateType.CHARGING_STATION_CERTIFICATE,
    ) -> GenerateCsrRequest:
        """A request of its own id, for an EVSE of its own where none is named."""
        number = next(self._numbers)
        data = GenerateCsrData(
            certificate_type=certificate_type,
            common_name=f"station {number}",
            organization_name="Über Strom GmbH",
            country_name="DE",
            evse_id=evse_id or f"DE*ABC*E{number}",
            algorithm=algorithm,
        )
        return generate_csr(str(uuid.uuid4()), data)

    def publish(self, request: GenerateCsrRequest) -> None:
        """Publish a request; wait for nothing."""
        with self._news:
            if request.id not in self.requests:
                self.requests[request.id] = request
                self._open.add(request.id)
        self._publish(request.id, encode(request))

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
        self._publish(update.id, encode(update))
        return update.id

    def _publish(self, message_id: str, payload: bytes) -> None:
        self._published.append((message_id, self._client.publish("josev/cs", payload, qos=1)))

    def ask(self, request: GenerateCsrRequest | None = None) -> GenerateCsrResponse:
        """Publish a request, and wait for one more answer to it than there were."""
        request = request or self.request()
        before = len(self.answers[request.id])
        self.publish(request)
        self.wait_for(lambda: len(self.answers[request.id]) > before, f"request {request.id} is answered")
        return self.answers[request.id][-1]

    # What came of it.

    @property
    def taken(self) -> set[str]:
        """The ids of the messages that the broker has acknowledged."""
        return {message_id for message_id, info in self._published if info.is_published()}

    @property
    def open(self) -> list[GenerateCsrRequest]:
        """The requests without an answer yet."""
        with self._news:
            return [self.requests[request_id] for request_id in self._open]

    @property
    def accepted(self) -> dict[str, str]:
        """The CSR of each request that was accepted, by id; none ever came in two forms."""
        csrs: dict[str, str] = {}
        with self._news:
            for request_id, answers in self.answers.items():
                own = {str(answer.data.csr) for answer in answers if answer.data.status == "accepted"}
                assert len(own) <= 1, f"{request_id} was answered with {len(own)} CSRs"
                csrs.update(dict.fromkeys([request_id] * len(own), *own))
        return csrs

    @property
    def rejected(self) -> set[str]:
        """The ids that were rejected at least once."""
        with self._news:
            return {
                request_id
                for request_id, answers in self.answers.items()
                if any(answer.data.status == "rejected" for answer in answers)
            }

    def wait_for(self, condition: Callable[[], object], what: str, *, bound: float = BOUND) -> None:
        """Wait for answers."""
        with self._news:
            assert self._news.wait_for(condition, bound), f"waited in vain until {what}"

    def wait_for_all(self) -> None:
        """Wait until everything asked so far has an answer."""
        self.wait_for(lambda: not self._open, "everything is answered")

    def keep_up(self, load: int) -> None:
        """From now on, let so many requests be without an answer at any time; 0 ends it."""
        self.load = load
        self._top_up()

    def _top_up(self) -> None:
        for _ in range(self.load - len(self.open)):
            self.publish(self.request())

    def _receive(self, payload: bytes) -> None:
        response = decode_response(payload)
        assert response is not None
        with self._news:
            self.answers[response.id].append(response)
            self._open.discard(response.id)
            self._news.notify_all()
        self._top_up()


def _without_nagle(sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
