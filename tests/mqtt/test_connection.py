"""A connection against a real Mosquitto."""

from __future__ import annotations

import asyncio
import re
import socket

import pytest
from mqtt_sides import Front, at, josev
from peers import Mosquitto, free_port

from stationkey.errors import BrokerError
from stationkey.mqtt import connection as mqtt
from stationkey.mqtt.codec import V5, V311
from stationkey.mqtt.connection import (
    ConnectionLost,
    MqttConnection,
    connect,
)
from stationkey.mqtt.url import Broker

SILENCE = bytes([0xD0, 0])
"""A PINGRESP that nobody asked for: it answers nothing."""


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(bytes([0x20, 2, 0, 1]), id="return-code-1-of-3.1.1"),
        pytest.param(bytes([0x20, 3, 0, 0x84, 0]), id="reason-code-0x84"),
        pytest.param(b"", id="closes-the-connection"),
        pytest.param(SILENCE, id="keeps-silent"),
    ],
)
async def test_a_broker_that_knows_no_mqtt_5_is_spoken_to_in_3_1_1(mosquitto: Mosquitto, answer: bytes) -> None:
    versions: list[int] = []

    def judge(data: bytes) -> bytes | None:
        if data[0] != 0x10:
            return None
        versions.append(data[8])  # protocol level of a CONNECT [MQTT 5 3.1.2.2]
        return answer if data[8] == 5 else None

    async with Front(at(mosquitto), judge) as broker, josev(broker) as connection:
        assert not connection.is_v5
        await connection.publish("cs/josev", b"in 3.1.1")
        assert (await connection.receive()).payload == b"in 3.1.1"
    assert versions == [5, 4]


@pytest.mark.parametrize("version", [V5, V311])
async def test_every_socket_has_tcp_nodelay(
    mosquitto: Mosquitto, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[socket.socket] = []
    create_connection = socket.create_connection

    def create(*arguments: object, **options: object) -> socket.socket:
        made.append(create_connection(*arguments, **options))  # type: ignore[arg-type] # passed on as they came
        return made[-1]

    monkeypatch.setattr(socket, "create_connection", create)
    connection = MqttConnection(at(mosquitto), client_id="station", persistent=True, protocol=version)
    async with connection:
        await connection.open()
        [sock] = made
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


async def test_a_connection_that_is_lost_says_so_to_all_who_wait(mosquitto: Mosquitto) -> None:
    async with josev(at(mosquitto)) as connection:
        waiting = asyncio.create_task(connection.receive())
        mosquitto.kill()
        for wait in (waiting, connection.publish("a", b""), connection.subscribe("a"), connection.receive()):
            with pytest.raises(ConnectionLost) as lost:
                await wait
            assert lost.value.reason == "connection_lost"
            assert str(at(mosquitto)) in lost.value.message  # words: which broker


async def test_what_was_received_before_the_loss_comes_first(mosquitto: Mosquitto) -> None:
    async with josev(at(mosquitto)) as connection:
        await connection.publish("cs/josev", b"one")
        first = await connection.receive()
        assert first.payload == b"one"
        await connection.publish("cs/josev", b"two")
        await connection.publish("cs/josev", b"three")  # acknowledged after the second was sent to us
        mosquitto.kill()
        await connection.lost
        assert (await connection.receive()).payload == b"two"
        first.acknowledge()  # too late, and harmless


async def test_no_broker_is_an_error_in_words() -> None:
    port = free_port()
    with pytest.raises(BrokerError) as error:
        await connect(Broker("127.0.0.1", port), client_id="station", persistent=True)
    assert error.value.reason == "broker_unreachable"
    assert f"mqtt://127.0.0.1:{port}" in error.value.message  # words: which broker


async def test_a_server_that_never_answers_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "MQTT5_TIMEOUT", 0.05)
    monkeypatch.setattr(mqtt, "CONNECT_TIMEOUT", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(BrokerError, match="MQTT") as error:
        await connect(Broker("127.0.0.1", server.getsockname()[1]), client_id="station", persistent=True)
    assert error.value.reason == "broker_unreachable"  # words: "MQTT" tells it from a broker that is not there


async def test_a_broker_that_wants_a_password_is_an_error_in_words(mosquitto: Mosquitto) -> None:
    mosquitto.terminate()
    configuration = mosquitto.directory / "mosquitto.conf"
    configuration.write_text(configuration.read_text().replace("allow_anonymous true", "allow_anonymous false"))
    mosquitto.start()
    with pytest.raises(BrokerError, match="Not authorized") as error:  # words: MQTT's own
        await connect(at(mosquitto), client_id="station", persistent=True)
    assert error.value.reason == "broker_refuses"


async def test_a_connection_that_the_broker_closes_without_a_word_is_called_that(mosquitto: Mosquitto) -> None:
    async with await connect(at(mosquitto), client_id="c", persistent=False) as connection:
        mosquitto.kill()
        with pytest.raises(ConnectionLost, match="closed") as error:  # words: not paho's "Unspecified error"
            await connection.receive()
    assert error.value.reason == "connection_lost"
    assert "nspecified" not in error.value.message  # words: same


async def test_a_broker_that_hangs_is_given_up(mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch) -> None:
    async with josev(at(mosquitto)) as connection:
        monkeypatch.setattr(mqtt, "CONNECT_TIMEOUT", 0.05)
        mosquitto.freeze()
        with pytest.raises(ConnectionLost, match=re.escape("0.05 s")) as error:  # words: the limit
            await connection.publish("cs/josev", b"")
    assert error.value.reason == "connection_lost"
