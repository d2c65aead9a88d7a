"""A message that the broker retains: who gets it, and what a broker that does not take it costs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gateways import Edge, Service, answers, payload, serving
from mqtt_sides import BOUND, Front, at, josev, reasons
from peers import Mosquitto

from stationkey.mqtt.connection import MqttConnection, connect
from stationkey.mqtt.retained import GIVE_UP_AFTER, RetainedTopic

TOPIC = "cs/stationkey/renewal"


@asynccontextmanager
async def subscriber(mosquitto: Mosquitto) -> AsyncIterator[MqttConnection]:
    async with await connect(at(mosquitto), client_id=f"s{uuid.uuid4().hex[:8]}", persistent=False) as connection:
        await connection.subscribe(TOPIC)
        yield connection


async def told(connection: MqttConnection) -> tuple[bytes, bool]:
    """The next message, and whether it is an older one that the broker has retained."""
    async with asyncio.timeout(BOUND):
        message = await connection.receive()
    message.acknowledge()
    return message.payload, message.retained


async def test_the_last_message_is_there_for_whoever_subscribes_later(mosquitto: Mosquitto) -> None:
    topic = RetainedTopic(TOPIC)
    topic.set(b"1")
    async with subscriber(mosquitto) as early, serving(at(mosquitto), Service(), retained=topic):
        assert await told(early) == (b"1", False)
        topic.set(b"1")  # no news, so the next message is the next news
        topic.set(b"2")
        assert await told(early) == (b"2", False)
        async with subscriber(mosquitto) as late:
            assert await told(late) == (b"2", True)


async def test_a_new_connection_publishes_it_again(mosquitto: Mosquitto) -> None:
    """The broker may have forgotten it: a Mosquitto without persistence does when it restarts."""
    topic = RetainedTopic(TOPIC)
    topic.set(b"1")
    async with serving(at(mosquitto), Service(), retained=topic) as edge:
        async with subscriber(mosquitto) as early:
            await told(early)
        mosquitto.kill()
        mosquitto.start()
        await edge.ready()
        async with subscriber(mosquitto) as late:
            assert (await told(late))[0] == b"1"


async def test_a_broker_that_retains_nothing_passes_it_on_and_that_is_said_once(tmp_path: Path) -> None:
    topic = RetainedTopic(TOPIC)
    with Mosquitto(tmp_path / "mosquitto", "retain_available false") as mosquitto, reasons() as said:
        async with subscriber(mosquitto) as early, serving(at(mosquitto), Service(), retained=topic):
            for payload_ in (b"1", b"2"):
                topic.set(payload_)
                assert await told(early) == (payload_, False)
    assert len(said.named("broker_grants_less")) == 1


async def test_a_broker_that_refuses_it_serves_requests(tmp_path: Path) -> None:
    acl = tmp_path / "acl"
    acl.write_text("topic read josev/cs\ntopic readwrite cs/josev\ntopic write josev/cs\n")
    topic = RetainedTopic(TOPIC)
    topic.set(b"1")
    request_id = str(uuid.uuid4())
    with Mosquitto(tmp_path / "mosquitto", f"acl_file {acl}") as mosquitto, reasons() as said:
        async with josev(at(mosquitto)) as asking, serving(at(mosquitto), Service(), retained=topic):
            await asking.publish("josev/cs", payload(request_id))
            assert await answers(asking, 1) == [request_id]
            await said.until("publication_refused")
    assert len(said.named("publication_refused")) == 1


async def test_a_broker_that_closes_the_connection_at_it_is_served_after_a_few_tries(mosquitto: Mosquitto) -> None:
    topic = RetainedTopic(TOPIC)
    topic.set(b"1")
    closed = 0

    def judge(data: bytes) -> bytes | None:
        nonlocal closed
        if TOPIC.encode() not in data:
            return None
        closed += 1
        return b""

    request_id = str(uuid.uuid4())
    async with Front(at(mosquitto), judge) as broker, josev(at(mosquitto)) as asking:
        with reasons() as said:
            edge = Edge(broker, Service(), retained=topic)
            for _ in range(GIVE_UP_AFTER + 1):
                await edge.ready()
            await asking.publish("josev/cs", payload(request_id))
            assert await answers(asking, 1) == [request_id]
            await edge.end()
    assert closed == GIVE_UP_AFTER
    assert len(said.named("publication_refused")) == 1
