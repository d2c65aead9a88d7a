"""The Josevs of many stations, for the demo, the tests and the bench: one client that misses no answer.

It knows what the broker has taken, and when each answer came.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Self

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

_REQUESTS: Final = "/josev/cs"
_RESPONSES: Final = "/cs/josev"
BOUND: Final = 20.0
"""Seconds that an answer is waited for, unless the caller says otherwise."""


class Asked(NamedTuple):
    """What a request is known by: ids of two stations may be the same."""

    station: str
    request_id: str


class Answer(NamedTuple):
    """An answer, and when it came, by the clock that only counts."""

    at: float
    response: GenerateCsrResponse


class Depot:
    """Asks over MQTT for many stations, from a thread of paho's own. The broker keeps its session.

    Args:
        broker: whose clients the stations are.
        stations: their names.
        filters: topic filters of their answers, without the end.

    Attributes:
        requests: what was asked.
        answers: what came.
        load: how many requests are to be without an answer at any time; the stations take turns.
    """

    def __init__(self, broker: Mosquitto, stations: Sequence[str], *, filters: Sequence[str] = ("depot7/+",)) -> None:
        self._port = broker.port
        self.stations = tuple(stations)
        self._turns = itertools.cycle(self.stations)
        self._numbers = itertools.count(1)
        self._news = threading.Condition()
        self._subscribed = threading.Event()
        self._published: list[tuple[Asked, paho.MQTTMessageInfo]] = []
        self.requests: dict[Asked, GenerateCsrRequest] = {}
        self.answers: defaultdict[Asked, list[Answer]] = defaultdict(list)
        self._open: dict[Asked, float] = {}
        self.load = 0
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=f"depot-{uuid.uuid4().hex[:8]}", protocol=MQTTProtocolVersion.MQTTv5
        )
        wanted = [(each + _RESPONSES, 1) for each in filters]
        client.reconnect_delay_set(1, 1)
        client.max_inflight_messages_set(0)
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

    # Asking.

    def request(
        self,
        *,
        request_id: str | None = None,
        certificate_type: CertificateType = CertificateType.CHARGING_STATION_CERTIFICATE,
        evse_id: str | None = None,
    ) -> GenerateCsrRequest:
        """A request, of an id of its own where none is named."""
        data = GenerateCsrData(
            certificate_type=certificate_type,
            common_name=f"station {next(self._numbers)}",
            organization_name="Über Strom GmbH",
            country_name="DE",
            evse_id=UNSET if evse_id is None else evse_id,
            algorithm=Algorithm.ECDSA_SHA256,
        )
        return generate_csr(request_id or str(uuid.uuid4()), data)

    def publish(self, station: str, request: GenerateCsrRequest | None = None) -> Asked:
        """Publish a request of a station; wait for nothing."""
        request = request or self.request()
        asked = Asked(station, request.id)
        with self._news:
            if asked not in self.requests:
                self.requests[asked] = request
                self._open[asked] = time.monotonic()
        info = self._client.publish(station + _REQUESTS, encode(request), qos=1)
        self._published.append((asked, info))
        return asked

    def ask(self, station: str, request: GenerateCsrRequest | None = None, *, bound: float = BOUND) -> Answer:
        """Publish a request of a station, and wait for one more answer to it than there were."""
        request = request or self.request()
        asked = Asked(station, request.id)
        before = len(self.answers[asked])
        self.publish(station, request)
        self.wait_for(lambda: len(self.answers[asked]) > before, f"{asked} is answered", bound=bound)
        return self.answers[asked][-1]

    def ask_again(self, *, after: float) -> int:
        """Repeat the requests that have been without an answer for so many seconds, as Josev would; how many."""
        now = time.monotonic()
        with self._news:
            late = [asked for asked, since in self._open.items() if now - since >= after]
            self._open.update(dict.fromkeys(late, now))
        for asked in late:
            self.publish(asked.station, self.requests[asked])
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

    def first_answer(self, stations: frozenset[str], since: float) -> float | None:
        """When the first answer to one of these stations came after a moment; None if none has yet."""
        with self._news:
            times = [
                each.at
                for asked, answers in self.answers.items()
                if asked.station in stations
                for each in answers
                if each.at > since
            ]
        return min(times, default=None)

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
            self.publish(next(self._turns))

    def _receive(self, topic: str, payload: bytes) -> None:
        response = decode_response(payload)
        assert response is not None
        asked = Asked(topic.removesuffix(_RESPONSES), response.id)
        with self._news:
            self.answers[asked].append(Answer(time.monotonic(), response))
            self._open.pop(asked, None)
            self._news.notify_all()
        self._top_up()
