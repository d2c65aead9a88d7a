"""The MQTT edge against a real Mosquitto, with a service that answers when it is told to."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import uuid
from collections.abc import Iterable
from contextlib import suppress

import pytest
from gateways import BOUND, Service, answers, payload, serving
from mqtt_sides import at, josev
from peers import Mosquitto

from stationkey.contract.messages import (
    GenerateCsrResponse,
    rejected,
)
from stationkey.errors import StationKeyError
from stationkey.mqtt import connection as mqtt
from stationkey.mqtt.bounds import MAX_IN_HAND, MAX_WAITING, MESSAGE_OVERHEAD, PACKET_MARGIN
from stationkey.mqtt.connection import (
    Overrun,
    connect,
)


class Rejecting(Service):
    """Rejects what is to be rejected, and says why."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []

    async def reject(self, request_id: str, error: StationKeyError, *, station: str = "") -> GenerateCsrResponse:
        assert not station
        self.refused.append(error.reason)
        return rejected(request_id)


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
