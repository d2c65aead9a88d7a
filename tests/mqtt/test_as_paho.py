"""What a connection sends is, byte for byte, what paho-mqtt sends for the same calls."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from mqtt_packets import CONNACK, PUBACK, SUBACK, UNSUBACK, VERSIONS, greeting, packet, text
from mqtt_sides import BOUND
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from secured import write_secret
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import MqttTerms
from stationkey.mqtt.codec import V5, V311
from stationkey.mqtt.connection import KEEPALIVE, OFFLINE, SESSION_EXPIRY, MqttConnection
from stationkey.mqtt.url import Broker

NAME, PASSWORD, WILL = "Prüfstand", "correct horse", "cs/stationkey/availability"
LARGE = bytes(20_000)


class Scribe:
    """A broker that writes down what it is sent, answers each packet, and sends one message after a SUBSCRIBE."""

    def __init__(self, version: int) -> None:
        self._version = version
        self.heard: list[bytes] = []
        self.ended = asyncio.Event()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Broker]:
        async with await asyncio.start_server(self._client, "127.0.0.1", 0) as server:
            yield Broker("127.0.0.1", server.sockets[0].getsockname()[1])

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        empty = b"\0" if self._version == V5 else b""
        try:
            while head := await reader.read(1):
                size = shift = 0
                front = head
                while True:
                    byte = await reader.readexactly(1)
                    front += byte
                    size |= (byte[0] & 127) << shift
                    shift += 7
                    if byte[0] < 128:
                        break
                body = await reader.readexactly(size)
                self.heard.append(front + body)
                match head[0] & 0xF0:
                    case 0x10:
                        writer.write(greeting(self._version))
                    case 0x30 if head[0] & 0x06:
                        begin = 2 + int.from_bytes(body[:2], "big")
                        writer.write(packet(PUBACK, body[begin : begin + 2]))
                    case 0x80:
                        writer.write(packet(SUBACK, body[:2] + empty + b"\1"))
                        writer.write(packet(0x32, text("josev/cs") + b"\1\2" + empty + b"{}"))
                    case 0xA0:
                        writer.write(packet(UNSUBACK, body[:2] + empty + empty))
        finally:
            self.ended.set()
            writer.close()


def by_paho(port: int, version: int, *, persistent: bool) -> None:
    """The calls, as this project made them when it used paho."""
    is_v5, news = version == V5, threading.Semaphore(0)
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id="station",
        protocol=MQTTProtocolVersion(version),
        clean_session=None if is_v5 else not persistent,
        manual_ack=True,
    )
    client.will_set(WILL, OFFLINE, qos=1, retain=True)
    client.username_pw_set(NAME, PASSWORD)
    for heard in ("on_connect", "on_message", "on_publish", "on_unsubscribe", "on_disconnect"):
        setattr(client, heard, lambda *_: news.release())
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho types its client only
    properties.SessionExpiryInterval = SESSION_EXPIRY if persistent else 0
    properties.ReceiveMaximum = 7
    if is_v5:
        client.connect("127.0.0.1", port, KEEPALIVE, clean_start=not persistent, properties=properties)
    else:
        client.connect("127.0.0.1", port, KEEPALIVE)
    client.loop_start()
    try:

        def wait() -> None:
            assert news.acquire(timeout=BOUND)

        wait()
        if is_v5:
            client.subscribe("josev/cs", options=SubscribeOptions(1, retainHandling=1))
        else:
            client.subscribe("josev/cs", qos=1)
        wait()
        client.ack(0x102, 1)
        for payload, qos, retain in ((b"{}", 1, False), (LARGE, 1, False), (b"", 1, True), (b"at 0", 0, False)):
            client.publish("cs/josev", payload, qos=qos, retain=retain)
            wait()
        client.unsubscribe("josev/cs")
        wait()
        if is_v5:
            end = Properties(PacketTypes.DISCONNECT)  # type: ignore[no-untyped-call] # same
            if persistent:
                end.SessionExpiryInterval = 0
            client.disconnect(ReasonCode(PacketTypes.DISCONNECT, identifier=0), end)
        else:
            client.disconnect()
        wait()
    finally:
        client.loop_stop()


async def by_us(broker: Broker, version: int, *, persistent: bool, directory: Path) -> None:
    """The same calls of `MqttConnection`."""
    by = MqttTerms(username=NAME, password=SecretReference(str(write_secret(directory / "password", PASSWORD))))
    connection = MqttConnection(
        broker, client_id="station", persistent=persistent, terms=by, will=WILL, in_hand=7, protocol=version
    )
    await connection.open()
    await connection.subscribe("josev/cs")
    message = await connection.receive()
    assert (message.payload, message.mid, message.topic) == (b"{}", 0x102, "josev/cs")
    message.acknowledge()
    await connection.publish("cs/josev", b"{}")
    await connection.publish("cs/josev", LARGE)
    await connection.publish("cs/josev", b"", retain=True)
    connection._send_publish("cs/josev", b"at 0", qos=0, retain=False)  # noqa: SLF001 - no broker's limit asks for it
    await connection.unsubscribe("josev/cs")
    await connection.close(forget=persistent)


@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "clean"])
@pytest.mark.parametrize("version", VERSIONS)
async def test_each_packet_is_the_one_that_paho_sends(version: int, persistent: bool, tmp_path: Path) -> None:
    ours, theirs = Scribe(version), Scribe(version)
    async with asyncio.timeout(BOUND):
        async with ours.listening() as broker:
            await by_us(broker, version, persistent=persistent, directory=tmp_path)
            await ours.ended.wait()
        async with theirs.listening() as broker:
            await asyncio.to_thread(by_paho, broker.port, version, persistent=persistent)
            await theirs.ended.wait()

    # paho counts a packet identifier for a message at QoS 0, too, which it does not send.
    assert [_without_identifier(sent) for sent in ours.heard] == [_without_identifier(sent) for sent in theirs.heard]
    assert [sent for sent in ours.heard if sent[0] != 0xA2] == [sent for sent in theirs.heard if sent[0] != 0xA2]
    assert len(ours.heard) == 9


def _without_identifier(sent: bytes) -> bytes:
    return sent if sent[0] != 0xA2 else sent[:2] + sent[4:]


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_violation_is_answered_as_the_version_has_it(version: int) -> None:
    """By MQTT 5, 4.13.1, with the reason code; 3.1.1 has none."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = MqttConnection(
            Broker("127.0.0.1", listener.getsockname()[1]), client_id="station", persistent=True, protocol=version
        )
        opening = asyncio.create_task(connection.open())
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(BOUND):
            peer, _ = await loop.sock_accept(listener)
            with peer:
                assert (await loop.sock_recv(peer, 1000))[0] == 0x10
                await loop.sock_sendall(peer, greeting(version))
                await opening
                await loop.sock_sendall(peer, packet(CONNACK, b"\0\0\0"))
                await connection.lost
                expected = b"\xe0\2\x82\0" if version == V5 else b"\xe0\0"
                assert await loop.sock_recv(peer, 1000) == expected
    assert version in {V5, V311}
