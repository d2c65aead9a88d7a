"""The gateway where something ends, fails or comes again."""

from __future__ import annotations

import asyncio
import logging
import uuid

import pytest
from gateways import BOUND, Edge, Service, answers, payload, serving
from mqtt_sides import Front, at, josev
from peers import Mosquitto, free_port

from stationkey.config.settings import MqttTerms
from stationkey.contract.messages import (
    rejected,
)
from stationkey.errors import StationKeyError
from stationkey.mqtt.gateway import FIRST_DELAY, MqttEdge
from stationkey.mqtt.url import Broker


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
    service.earlier = [("", rejected(str(uuid.uuid4()))), ("", rejected(str(uuid.uuid4())))]
    ids = [response.id for _, response in service.earlier]
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

    def pass_over(self, error: StationKeyError, *, station: str = "") -> None:
        assert not station
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
