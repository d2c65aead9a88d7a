"""Brokers with TLS for the tests."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from secured import Authority, Identity
from stationkey.config.settings import MqttTerms
from stationkey.mqtt import connection as mqtt
from stationkey.mqtt.codec import V5, V311
from stationkey.mqtt.connection import MqttConnection, connect
from stationkey.mqtt.url import Broker

BOUND = 30.0
"""Seconds after which a test that waits for something has failed. Nothing is measured by it."""


VERSIONS = [V5, V311]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def identity(authority: Authority) -> Identity:
    return authority.identity("stationkey")


async def opened(broker: Broker, by: MqttTerms = mqtt.PLAIN) -> MqttConnection:
    client_id = f"us-{uuid.uuid4().hex[:8]}"
    return await connect(broker, client_id=client_id, persistent=False, terms=by, max_payload=8 * 1024 * 1024)


async def echo(connection: MqttConnection, payload: bytes = b"echo") -> bytes:
    """What comes back of a message that is sent to ourselves."""
    topic = f"echo/{uuid.uuid4().hex}"
    await connection.subscribe(topic)
    await connection.publish(topic, payload)
    async with asyncio.timeout(BOUND):
        message = await connection.receive()
    message.acknowledge()
    return message.payload
