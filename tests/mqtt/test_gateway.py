"""The MQTT edge against a real Mosquitto, with a service that answers when it is told to."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from mqtt_sides import Front, at, josev
from peers import Mosquitto, free_port

from stationkey.config.settings import MqttTerms
from stationkey.contract.messages import (
    CertificateInstallationStatus,
    GenerateCsrRequest,
    GenerateCsrResponse,
    accepted,
    decode_response,
    rejected,
)
from stationkey.errors import LedgerError, StationKeyError
from stationkey.mqtt import connection as mqtt
from stationkey.mqtt.bounds import MAX_IN_HAND, MAX_WAITING, MESSAGE_OVERHEAD, PACKET_MARGIN
from stationkey.mqtt.connection import (
    MqttConnection,
    Overrun,
    connect,
)
from stationkey.mqtt.gateway import FIRST_DELAY, MqttEdge
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
        self.waited: list[float] = []
        self.handed_over: list[str] = []
        self.earlier: list[GenerateCsrResponse] = []
        self.faulty: str | None = None
        self.unreadable = False
        self.most_at_once = 0
        self._at_once = 0
        self._open: list[GenerateCsrRequest] = []
        self._news = asyncio.Condition()

    def is_surplus(self, request: GenerateCsrRequest, *, most: int) -> bool:
        same = [one for one in self._open if (one.id.lower(), one.data) == (request.id.lower(), request.data)]
        return len(same) > most

    async def answer(self, request: GenerateCsrRequest, *, waited: float = 0.0) -> GenerateCsrResponse:
        self.waited.append(waited)
        self._open.append(request)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await self._note(self.asked, request.id)
        await self.gate.wait()
        self._at_once -= 1
        self._open.remove(request)
        if request.id == self.faulty:
            raise ZeroDivisionError("a fault of ours")
        return accepted(request, "a CSR")

    async def reject(self, request_id: str, error: StationKeyError) -> GenerateCsrResponse:
        raise AssertionError(f"no test sends a wrong request, {request_id}") from error

    def pass_over(self, error: StationKeyError) -> None:
        raise AssertionError("no test sends what cannot be answered") from error

    async def note_status(self, status: CertificateInstallationStatus, *, retained: bool = False) -> None:
        raise AssertionError(f"no test sends {status}, retained or not: {retained}")

    async def undelivered(self) -> list[GenerateCsrResponse]:
        if self.unreadable:
            raise LedgerError("the ledger cannot be read", reason="ledger_error")
        return self.earlier

    async def delivered(self, response: GenerateCsrResponse) -> None:
        await self._note(self.handed_over, response.id)

    async def _note(self, where: list[str], what: str) -> None:
        async with self._news:
            where.append(what)
            self._news.notify_all()

    async def until(self, true: Callable[[], bool]) -> None:
        async with self._news, asyncio.timeout(BOUND):
            await self._news.wait_for(true)


class Rejecting(Service):
    """Rejects what is to be rejected, and says why."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []

    async def reject(self, request_id: str, error: StationKeyError) -> GenerateCsrResponse:
        self.refused.append(error.reason)
        return rejected(request_id)


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


async def publish_burst(mosquitto: Mosquitto, payloads: Iterable[bytes], *, qos: int) -> None:
    """Publish over one connection, as fast as the broker takes it."""
    command = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(mosquitto.port), "-q", str(qos), "-t", "josev/cs", "-l"]
    lines = b"".join(each + b"\n" for each in payloads)
    await asyncio.to_thread(subprocess.run, command, input=lines, check=True, timeout=BOUND)


# The edge.


async def test_at_most_a_bounded_number_is_in_hand_and_all_are_answered_once(mosquitto: Mosquitto) -> None:
    service = Service()
    ids = [str(uuid.uuid4()) for _ in range(3 * MAX_IN_HAND)]
    async with serving(at(mosquitto), service), josev(at(mosquitto)) as asking:
        service.gate.clear()
        await publish_burst(mosquitto, map(payload, ids), qos=0)
        await service.until(lambda: len(service.asked) == MAX_IN_HAND)
        service.gate.set()
        # The acknowledgements of the answers come behind the requests that wait.
        assert sorted(await answers(asking, len(ids))) == sorted(ids)
        await service.until(lambda: len(service.handed_over) == len(ids))
    assert sorted(service.asked) == sorted(ids)
    assert service.most_at_once == MAX_IN_HAND


@pytest.mark.parametrize("qos", [0, 1])
async def test_how_many_are_in_hand_is_for_the_configuration_to_say(mosquitto: Mosquitto, qos: int) -> None:
    service = Service()
    ids = [str(uuid.uuid4()) for _ in range(20)]
    async with serving(at(mosquitto), service, queue=3), josev(at(mosquitto)) as asking:
        service.gate.clear()
        await publish_burst(mosquitto, map(payload, ids), qos=qos)
        await service.until(lambda: len(service.asked) == 3)
        service.gate.set()
        assert sorted(await answers(asking, len(ids))) == sorted(ids)
    assert service.most_at_once == 3


async def test_one_id_said_over_and_over_leaves_most_hands_to_others(mosquitto: Mosquitto) -> None:
    """The copies beyond a quarter are acknowledged: the answer to the first is yet to come, and theirs as well."""
    service = Service()
    repeated, other = str(uuid.uuid4()), str(uuid.uuid4())
    spelled = [payload(repeated).ljust(300 + number) for number in range(20)] + [payload(repeated.upper())] * 20
    async with serving(at(mosquitto), service, queue=8), josev(at(mosquitto)) as asking:
        service.gate.clear()
        await publish_burst(mosquitto, spelled, qos=1)
        await asking.publish("josev/cs", payload(other))
        await service.until(lambda: other in service.asked)
        service.gate.set()
        assert sorted(await answers(asking, 4)) == sorted([repeated, repeated, repeated, other])
        await asking.publish("josev/cs", payload(repeated))
        assert await answers(asking, 1) == [repeated]
    assert service.asked == [repeated, repeated, repeated, other, repeated]


async def test_one_id_with_other_content_is_no_copy(mosquitto: Mosquitto) -> None:
    """The service has to say something else to it."""
    service = Service()
    repeated = str(uuid.uuid4())
    others = [payload(repeated).replace(b"EcoG", b"EcoG %d" % number) for number in range(5)]
    async with serving(at(mosquitto), service, queue=8), josev(at(mosquitto)) as asking:
        service.gate.clear()
        await publish_burst(mosquitto, [payload(repeated), *others], qos=1)
        await service.until(lambda: service.asked == [repeated] * 6)
        service.gate.set()
        assert await answers(asking, 6) == [repeated] * 6


async def test_the_service_is_told_how_long_a_request_has_waited_for_a_free_hand(mosquitto: Mosquitto) -> None:
    service = Service()
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    async with serving(at(mosquitto), service, queue=1), josev(at(mosquitto)) as asking:
        service.gate.clear()
        # At QoS 0 the broker holds nothing back: the second waits here.
        await publish_burst(mosquitto, [payload(first), payload(second)], qos=0)
        await service.until(lambda: service.asked == [first])
        service.gate.set()
        assert await answers(asking, 2) == [first, second]
    assert 0 <= service.waited[0] < service.waited[1]


SIZE = len(payload()) + 4 * len("josev/cs") + MESSAGE_OVERHEAD


async def test_what_a_broker_sends_beyond_all_bounds_is_not_taken_and_comes_again_over_a_new_connection(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its order; of what was acknowledged last, the broker may not have heard."""
    monkeypatch.setattr(mqtt, "MAX_RECEIVED_BYTES", 10 * SIZE)
    payloads = [payload() for _ in range(25)]
    received: list[bytes] = []
    connections = 0
    async with await connect(at(mosquitto), client_id="the-station", persistent=True) as first:
        await first.subscribe("josev/cs")
    await publish_burst(mosquitto, payloads, qos=1)
    while set(received) != set(payloads):
        async with await connect(at(mosquitto), client_id="the-station", persistent=True) as connection:
            connections += 1
            await connection.publish("elsewhere", b"")  # once it is acknowledged, all that was held has come
            with suppress(Overrun):
                while set(received) != set(payloads):
                    message = await connection.receive()
                    received.append(message.payload)
                    message.acknowledge()
    assert list(dict.fromkeys(received)) == payloads
    assert connections > 1


async def test_an_edge_that_was_sent_more_than_it_has_room_for_answers_all_of_it(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "MAX_RECEIVED_BYTES", 30 * SIZE)
    service = Service()
    ids = [str(uuid.uuid4()) for _ in range(200)]
    async with serving(at(mosquitto), service, queue=4) as edge:
        service.gate.clear()
        await publish_burst(mosquitto, map(payload, ids), qos=0)  # which the broker does not hold back
        await service.until(lambda: len(service.asked) == 4)
        await publish_burst(mosquitto, map(payload, ids), qos=1)
        service.gate.set()
        await edge.ready()  # by a new connection
        await service.until(lambda: set(service.handed_over) == set(ids))
        await publish_burst(mosquitto, [payload()], qos=1)
        await service.until(lambda: len(set(service.handed_over)) == len(ids) + 1)


async def test_what_is_too_large_is_rejected_whatever_its_size_and_however_much_there_is_of_it(
    mosquitto: Mosquitto,
) -> None:
    """More of them than may be in flight: Mosquitto 2.0.21 would hang, were it asked to hold them back."""
    service = Rejecting()
    little, fitting = str(uuid.uuid4()), str(uuid.uuid4())
    large = [str(uuid.uuid4()) for _ in range(2 * MAX_IN_HAND)]
    async with serving(at(mosquitto), service, payload_bytes=1024), josev(at(mosquitto)) as asking:
        await asking.publish("josev/cs", payload(little).ljust(1025))
        for each in large:
            await asking.publish("josev/cs", payload(each).ljust(1024 + 2 * PACKET_MARGIN))
        await asking.publish("josev/cs", payload(fitting).ljust(1024))
        assert sorted(await answers(asking, len(large) + 2)) == sorted([little, *large, fitting])
    assert service.refused == ["payload_too_large"] * (len(large) + 1)
    assert service.asked == [fitting]


async def test_a_flood_at_qos_0_is_cut_and_said_once(mosquitto: Mosquitto, caplog: pytest.LogCaptureFixture) -> None:
    service = Service()
    flood = 2 * MAX_WAITING
    async with serving(at(mosquitto), service), josev(at(mosquitto)) as asking:
        service.gate.clear()
        await publish_burst(mosquitto, (payload() for _ in range(flood)), qos=0)
        last = str(uuid.uuid4())
        await asking.publish("josev/cs", payload(last))  # QoS 1: held, however many wait before it
        service.gate.set()
        await service.until(lambda: last in service.handed_over)
        assert MAX_WAITING < len(service.asked) < flood
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "QoS 0" in record.getMessage()  # words: which messages


async def test_a_full_hand_does_not_keep_it_from_reconnecting(mosquitto: Mosquitto) -> None:
    service = Service()
    ids = [str(uuid.uuid4()) for _ in range(MAX_IN_HAND)]
    async with serving(at(mosquitto), service) as edge:
        service.gate.clear()
        # At QoS 0 the broker holds nothing back: one more than the hand takes.
        await publish_burst(mosquitto, map(payload, [*ids, str(uuid.uuid4())]), qos=0)
        await service.until(lambda: len(service.asked) == MAX_IN_HAND)
        mosquitto.kill()
        mosquitto.start()
        await edge.ready()
        async with josev(at(mosquitto)) as asking:
            service.gate.set()
            assert sorted(await answers(asking, MAX_IN_HAND)) == sorted(ids)


async def test_a_request_that_comes_again_while_it_is_in_hand_is_answered_once_and_acknowledged(
    mosquitto: Mosquitto,
) -> None:
    service = Service()
    request_id = str(uuid.uuid4())
    async with serving(at(mosquitto), service) as edge:
        service.gate.clear()
        async with josev(at(mosquitto)) as asking:
            await asking.publish("josev/cs", payload(request_id))
        await service.until(lambda: service.asked == [request_id])
        mosquitto.terminate()
        mosquitto.start()
        await edge.ready()
        async with josev(at(mosquitto)) as asking:
            another = str(uuid.uuid4())
            await asking.publish("josev/cs", payload(another))  # after what the broker sends again
            await service.until(lambda: another in service.asked)
            service.gate.set()
            assert sorted(await answers(asking, 2)) == sorted([request_id, another])
    async with serving(at(mosquitto), service), josev(at(mosquitto)) as asking:
        last = str(uuid.uuid4())
        await asking.publish("josev/cs", payload(last))
        assert await answers(asking, 1) == [last]  # the broker had nothing left to send again
    assert service.asked == [request_id, another, last]


async def test_an_answer_that_was_cut_off_is_published_again(mosquitto: Mosquitto) -> None:
    service = Service()
    cuts = iter([b"", b""])

    def judge(data: bytes) -> bytes | None:
        return next(cuts, None) if data[0] >> 4 == 3 else None  # PUBLISH [MQTT 5 2.1.2]

    async with Front(at(mosquitto), judge) as broker, josev(at(mosquitto)) as asking, serving(broker, service) as edge:
        request_id = str(uuid.uuid4())
        await asking.publish("josev/cs", payload(request_id))
        for _ in range(2):
            await edge.ready()
        assert await answers(asking, 1) == [request_id]
        await service.until(lambda: service.handed_over == [request_id])


async def test_what_an_earlier_run_could_not_hand_over_is_published_first(mosquitto: Mosquitto) -> None:
    service = Service()
    service.earlier = [rejected(str(uuid.uuid4())), rejected(str(uuid.uuid4()))]
    ids = [response.id for response in service.earlier]
    async with josev(at(mosquitto)) as asking, serving(at(mosquitto), service):
        assert await answers(asking, 2) == ids
        await service.until(lambda: service.handed_over == ids)


async def test_a_ledger_that_cannot_be_read_at_the_start_is_logged_and_requests_are_served(
    mosquitto: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service()
    service.unreadable = True
    async with serving(at(mosquitto), service), josev(at(mosquitto)) as asking:
        await asking.publish("josev/cs", payload())
        assert len(await answers(asking, 1)) == 1
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert vars(record)["reason"] == "ledger_error"


async def test_a_fault_of_ours_costs_one_message_and_is_logged_with_its_id(
    mosquitto: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service()
    request_id = str(uuid.uuid4())
    async with serving(at(mosquitto), service), josev(at(mosquitto)) as asking:
        service.faulty = request_id
        await asking.publish("josev/cs", payload(request_id))
        another = str(uuid.uuid4())
        await asking.publish("josev/cs", payload(another))
        assert await answers(asking, 1) == [another]
    [record] = [record for record in caplog.records if record.exc_info]
    assert vars(record)["request_id"] == request_id
    async with serving(at(mosquitto), service):
        pass
    assert service.asked == [request_id, another]  # it was acknowledged


async def test_what_is_in_hand_is_finished_before_the_end(mosquitto: Mosquitto) -> None:
    service = Service()
    request_id = str(uuid.uuid4())
    async with serving(at(mosquitto), service) as edge, josev(at(mosquitto)) as asking:
        service.gate.clear()
        await asking.publish("josev/cs", payload(request_id))
        await service.until(lambda: service.asked == [request_id])
        edge.stop.set()
        service.gate.set()
        await edge.end()
        assert await answers(asking, 1) == [request_id]
    assert service.handed_over == [request_id]


@pytest.mark.parametrize("told_first", [True, False], ids=["told-to-end-first", "answered-first"])
async def test_what_is_in_hand_when_the_broker_is_gone_is_finished_and_not_taken_as_handed_over(
    mosquitto: Mosquitto, caplog: pytest.LogCaptureFixture, told_first: bool
) -> None:
    service = Service()
    request_id = str(uuid.uuid4())
    async with serving(at(mosquitto), service) as edge:
        async with josev(at(mosquitto)) as asking:
            service.gate.clear()
            await asking.publish("josev/cs", payload(request_id))
            await service.until(lambda: service.asked == [request_id])
        mosquitto.kill()
        if told_first:
            edge.stop.set()
        service.gate.set()
        await edge.end()
    assert service.handed_over == []
    [told] = [record for record in caplog.records if vars(record).get("request_id") == request_id]
    assert (told.name, told.levelno, told.exc_info) == ("stationkey.mqtt.gateway", logging.WARNING, None)
    assert "next start" in told.getMessage()  # words: when it goes out


async def test_what_is_never_finished_is_given_up_and_sent_again_by_the_broker(
    mosquitto: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service()
    service.gate.clear()
    request_id = str(uuid.uuid4())
    edge = Edge(at(mosquitto), service, drain=0.05)
    await edge.ready()
    async with josev(at(mosquitto)) as asking:
        await asking.publish("josev/cs", payload(request_id))
        await service.until(lambda: service.asked == [request_id])
        await edge.end()
        [told] = [record for record in caplog.records if vars(record).get("request_id") == request_id]
        assert (told.name, told.levelno, told.exc_info) == ("stationkey.mqtt.gateway", logging.WARNING, None)
        assert "broker" in told.getMessage()  # words: who has it now
        service.gate.set()
        async with serving(at(mosquitto), service):
            assert await answers(asking, 1) == [request_id]


async def test_a_broker_that_refuses_the_last_will_is_served_without(
    mosquitto: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    """Mosquitto takes any; others look at its topic when the client connects."""

    def judge(data: bytes) -> bytes | None:
        has_will = data[0] == 0x10 and data[9] & 0x04  # Connect Flags [MQTT 5 3.1.2.3]
        return bytes([0x20, 3, 0, 0x87, 0]) if has_will else None  # CONNACK: Not authorized

    request_id = str(uuid.uuid4())
    async with Front(at(mosquitto), judge) as broker, josev(at(mosquitto)) as asking:
        edge = Edge(broker, Service(), terms=MqttTerms(availability_topic="availability"))
        await edge.ready()
        await asking.publish("josev/cs", payload(request_id))
        assert await answers(asking, 1) == [request_id]
        await edge.end()
    [record] = [record for record in caplog.records if vars(record).get("reason") == "publication_refused"]
    assert "availability" in record.getMessage()  # words: what is not published


class Attempts(logging.Handler):
    """The waits between attempts to connect, as they are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: asyncio.Queue[float] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        _, wait = record.args
        assert isinstance(wait, float)
        self.waits.put_nowait(wait)


async def test_the_waits_between_attempts_to_connect_double_with_jitter() -> None:
    attempts = Attempts()
    logger = logging.getLogger("stationkey.mqtt.gateway")
    logger.addHandler(attempts)
    edge = Edge(Broker("127.0.0.1", free_port()), Service())
    try:
        for attempt in range(4):
            async with asyncio.timeout(BOUND):
                wait = await attempts.waits.get()
            longest = FIRST_DELAY * 2**attempt
            assert longest / 2 - 0.05 <= wait <= longest + 0.05  # the log rounds to a tenth
    finally:
        logger.removeHandler(attempts)
        await edge.end()


async def test_a_retained_request_is_answered_once_and_not_at_each_reconnect(mosquitto: Mosquitto) -> None:
    service = Service()
    retained, other = str(uuid.uuid4()), str(uuid.uuid4())
    async with josev(at(mosquitto)) as asking:
        await asking.publish("josev/cs", payload(retained), retain=True)
        async with serving(at(mosquitto), service):
            assert await answers(asking, 1) == [retained]
        async with serving(at(mosquitto), service):
            await asking.publish("josev/cs", payload(other))
            assert await answers(asking, 1) == [other]
        await asking.publish("josev/cs", b"", retain=True)  # takes it away
    assert service.asked == [retained, other]


class PassingOver(Service):
    """Notes why a message was passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.passed_over: list[str] = []

    def pass_over(self, error: StationKeyError) -> None:
        self.passed_over.append(error.reason)


MALFORMED = {
    "a SUBACK without a reason": b"\x90\x03MM\0",
    "a PUBLISH whose topic is no UTF-8": b"\x32\x0a\0\x04\xff\xfe\xfd\xfc\0\1\0\0",
    "a PUBLISH of one byte": b"\x32\x01\0",
    "a length of five bytes": b"\x32\xff\xff\xff\xff\xff",
    "properties longer than the packet": b"\x32\x12\0\x08josev/cs\0\1\x05\xff\xff\xff\xff\xff",
    "a type that there is not": b"\0\x03abc",
    "a PUBACK of one byte": b"\x40\x01\xff",
}


@pytest.mark.parametrize("packet", MALFORMED.values(), ids=MALFORMED)
async def test_a_broker_that_sends_what_is_no_mqtt_is_left_and_tried_again(
    packet: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, in words: what cannot be read must not be tried again and again, which takes all of a processor."""
    met = asyncio.Queue[bytes]()

    async def broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1024)  # CONNECT
        writer.write(b"\x20\3\0\0\0")
        subscribe = await reader.read(1024)
        granted = b"\x90\4" + subscribe[2:4] + b"\0\1"
        writer.write(packet.replace(b"MM", subscribe[2:4]) if packet[0] == granted[0] else granted + packet)
        met.put_nowait(await reader.read())  # until it is closed from there
        writer.close()

    async with await asyncio.start_server(broker, "127.0.0.1", 0) as server, asyncio.timeout(BOUND):
        stop = asyncio.Event()
        service = PassingOver()
        edge = MqttEdge(Broker("127.0.0.1", server.sockets[0].getsockname()[1]), service, client_id="station")
        running = asyncio.create_task(edge.run(stop, drain=1.0))
        for _ in range(2):
            await met.get()
        stop.set()
        await running
    assert set(service.passed_over) <= {"broker_violates_protocol"}
    assert vars(caplog.records[-1])["reason"] in {"broker_violates_protocol", "connection_lost"}
