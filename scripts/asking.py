"""One MQTT client that asks for CSRs and misses no answer: the Josevs of a depot, and the one of a test.

It knows what the broker has taken, when each answer came, and what has none yet.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Final, Generic, NamedTuple, Self, TypeVar

import paho.mqtt.client as paho
from msgspec import UNSET
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from peers import Mosquitto

from stationkey.contract.messages import (
    GenerateCsrData,
    GenerateCsrRequest,
    GenerateCsrResponse,
    decode_response,
    encode,
    generate_csr,
)
from stationkey.contract.profiles import Algorithm, CertificateType

BOUND: Final = 20.0
"""Seconds that an answer is waited for, unless the caller says otherwise. Nothing is measured by it."""

Asked = TypeVar("Asked", bound=Hashable)
"""What a request is known by."""


class Answer(NamedTuple):
    """An answer, and when it came, by the clock that only counts."""

    at: float
    response: GenerateCsrResponse


class Asking(Generic[Asked]):
    """Asks over MQTT, from a thread of paho's own. The broker keeps its session.

    Args:
        broker: whose client it is.
        name: the client id begins with it.
        filters: topic filters of the answers.

    Attributes:
        requests: what was asked.
        answers: what came.
        load: how many requests are to be without an answer at any time; each answer is followed by a new request.
    """

    def __init__(self, broker: Mosquitto, name: str, filters: Sequence[str]) -> None:
        self._port = broker.port
        self._numbers = itertools.count(1)
        self._news = threading.Condition()
        self._subscribed = threading.Event()
        self._published: list[tuple[Asked, paho.MQTTMessageInfo]] = []
        self.requests: dict[Asked, GenerateCsrRequest] = {}
        self.answers: defaultdict[Asked, list[Answer]] = defaultdict(list)
        self._open: dict[Asked, float] = {}
        self.load = 0
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=f"{name}-{uuid.uuid4().hex[:8]}", protocol=MQTTProtocolVersion.MQTTv5
        )
        wanted = [(each, 1) for each in filters]
        client.reconnect_delay_set(1, 1)
        client.on_connect = lambda connected, *_: connected.subscribe(wanted)
        client.on_subscribe = lambda *_: self._subscribed.set()
        client.on_message = lambda _client, _data, message: self._receive(message.topic, bytes(message.payload))

    def __enter__(self) -> Self:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho types its client only
        properties.SessionExpiryInterval = 3600
        self._client.connect("127.0.0.1", self._port, clean_start=False, properties=properties)
        self._client.loop_start()
        assert self._subscribed.wait(BOUND)
        return self

    def __exit__(self, *_: object) -> None:
        self.load = 0
        self._client.disconnect()
        self._client.loop_stop()

    # What a kind of client does in its own way.

    def known_by(self, topic: str, request_id: str) -> Asked:
        """What the request is known by that an answer on `topic` is for."""
        raise NotImplementedError

    def repeat(self, asked: Asked) -> None:
        """Publish a request once more, as Josev would."""
        raise NotImplementedError

    def ask_next(self) -> None:
        """Publish a new request."""
        raise NotImplementedError

    # Asking.

    def request(
        self,
        *,
        request_id: str | None = None,
        certificate_type: CertificateType = CertificateType.CHARGING_STATION_CERTIFICATE,
        evse_id: str | None = None,
        algorithm: Algorithm = Algorithm.ECDSA_SHA256,
    ) -> GenerateCsrRequest:
        """A request, of an id of its own where none is named."""
        data = GenerateCsrData(
            certificate_type=certificate_type,
            common_name=f"station {next(self._numbers)}",
            organization_name="Über Strom GmbH",
            country_name="DE",
            evse_id=UNSET if evse_id is None else evse_id,
            algorithm=algorithm,
        )
        return generate_csr(request_id or str(uuid.uuid4()), data)

    def send(self, asked: Asked, topic: str, payload: bytes) -> None:
        """Publish anything; `asked` is in `taken` as soon as the broker has it."""
        self._published.append((asked, self._client.publish(topic, payload, qos=1)))

    def send_request(
        self, asked: Asked, topic: str, request: GenerateCsrRequest, *, payload: bytes | None = None
    ) -> None:
        """Publish a request, as `payload` where it is to be another; wait for nothing."""
        with self._news:
            if asked not in self.requests:
                self.requests[asked] = request
                self._open[asked] = time.monotonic()
        self.send(asked, topic, encode(request) if payload is None else payload)

    def one_more(self, asked: Asked, publish: Callable[[], object], *, bound: float = BOUND) -> Answer:
        """Publish a request, and wait for one more answer to it than there were."""
        before = len(self.answers[asked])
        publish()
        self.wait_for(lambda: len(self.answers[asked]) > before, f"{asked} is answered", bound=bound)
        return self.answers[asked][-1]

    def ask_again(self, *, after: float) -> int:
        """Repeat the requests that have been without an answer for so many seconds; how many."""
        now = time.monotonic()
        with self._news:
            late = [asked for asked, since in self._open.items() if now - since >= after]
            self._open.update(dict.fromkeys(late, now))
        for asked in late:
            self.repeat(asked)
        return len(late)

    def forget(self, asked: Asked) -> None:
        """Wait for no answer to a request."""
        with self._news:
            del self.requests[asked]
            self._open.pop(asked, None)

    # What came of it.

    @property
    def taken(self) -> set[Asked]:
        """What the broker has acknowledged."""
        return {asked for asked, info in self._published if info.is_published()}

    @property
    def open(self) -> list[Asked]:
        """The requests without an answer yet."""
        with self._news:
            return list(self._open)

    @property
    def accepted(self) -> dict[Asked, str]:
        """The CSR of each request that was accepted; none ever came in two forms."""
        csrs: dict[Asked, str] = {}
        with self._news:
            for asked, answers in self.answers.items():
                own = {str(each.response.data.csr) for each in answers if each.response.data.status == "accepted"}
                assert len(own) <= 1, f"{asked} was answered with {len(own)} CSRs"
                csrs.update(dict.fromkeys([asked] * len(own), *own))
        return csrs

    @property
    def rejected(self) -> set[Asked]:
        """What was rejected at least once."""
        with self._news:
            return {
                asked
                for asked, answers in self.answers.items()
                if any(each.response.data.status == "rejected" for each in answers)
            }

    def wait_for(self, condition: Callable[[], object], what: str, *, bound: float = BOUND) -> None:
        """Wait for answers."""
        with self._news:
            assert self._news.wait_for(condition, bound), f"waited in vain until {what}"

    def wait_for_all(self, *, bound: float = BOUND, again: float | None = None) -> None:
        """Wait until everything asked so far has an answer; repeat what has none for `again` seconds."""
        end = time.monotonic() + bound
        while self.open:
            left = end - time.monotonic()
            assert left > 0, f"not answered: {self.open[:5]} and so on, {len(self.open)} in all"
            with self._news:
                self._news.wait_for(lambda: not self._open, min(left, again or left))
            if again is not None:
                self.ask_again(after=again)

    def keep_up(self, load: int) -> None:
        """From now on, let so many requests be without an answer at any time; 0 ends it."""
        self.load = load
        self._top_up()

    def _top_up(self) -> None:
        for _ in range(self.load - len(self._open)):
            self.ask_next()

    def _receive(self, topic: str, payload: bytes) -> None:
        response = decode_response(payload)
        assert response is not None
        asked = self.known_by(topic, response.id)
        with self._news:
            self.answers[asked].append(Answer(time.monotonic(), response))
            self._open.pop(asked, None)
            self._news.notify_all()
        self._top_up()
