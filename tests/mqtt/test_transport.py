"""A socket in the event loop: nothing is lost or changes its order, and its end is told once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from mqtt_packets import greeting, packet
from mqtt_sides import BOUND, at
from peers import Mosquitto

from stationkey.mqtt import connection as mqtt
from stationkey.mqtt.codec import V5
from stationkey.mqtt.connection import ConnectionLost, MqttConnection
from stationkey.mqtt.transport import Transport
from stationkey.mqtt.url import Broker
from stationkey.system.tasks import unforeseen


class Ends:
    """A transport on one end of a pair of sockets, and the other end."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        for sock in (ours, self.peer):
            sock.setblocking(False)
        self.sock = ours
        self.received: list[bytes] = []
        self.ended: asyncio.Queue[Exception | None] = asyncio.Queue()
        self.transport = Transport(ours, received=self.received.append, ended=self.ended.put_nowait)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    both = Ends()
    yield both
    both.transport.close()
    both.peer.close()


async def taken(peer: socket.socket, size: int) -> bytes:
    """So many bytes that arrive at the peer."""
    whole = b""
    async with asyncio.timeout(BOUND):
        while len(whole) < size:
            piece = await asyncio.get_running_loop().sock_recv(peer, 65_536)
            assert piece
            whole += piece
    return whole


async def test_what_does_not_fit_is_sent_in_order_when_there_is_room(ends: Ends) -> None:
    packets = [bytes([number]) * 100_000 for number in range(20)]
    for one in packets:
        ends.transport.send(one)
    assert ends.transport.unsent > 0
    assert await taken(ends.peer, 2_000_000) == b"".join(packets)
    ends.transport.send(b"more")
    assert ends.transport.unsent == 0
    assert await taken(ends.peer, 4) == b"more"


async def test_the_end_comes_when_all_is_sent(ends: Ends) -> None:
    ends.transport.send(bytes(2_000_000))
    assert not ends.transport.close_when_sent()
    await taken(ends.peer, 2_000_000)
    assert await ends.ended.get() is None
    assert ends.sock.fileno() == -1


async def test_with_nothing_to_send_there_is_nothing_to_wait_for(ends: Ends) -> None:
    assert ends.transport.close_when_sent()


async def test_a_peer_that_hangs_up_is_told_of_once(ends: Ends) -> None:
    ends.peer.close()
    assert await ends.ended.get() is None
    ends.transport.send(b"too late")
    ends.transport.close()
    assert ends.ended.empty()


async def test_sending_to_a_peer_that_has_gone_ends_it(ends: Ends) -> None:
    ends.peer.close()
    ends.transport.send(b"before it is known")
    assert await ends.ended.get() is None
    assert ends.transport.unsent == 0


class Failing(socket.socket):
    """A socket whose calls fail as they are told to."""

    error: type[Exception] | None = None

    def _maybe(self, call: Callable[..., Any], *arguments: Any) -> Any:
        if self.error is not None:
            raise self.error
        return call(*arguments)

    def recv(self, *arguments: Any) -> Any:
        return self._maybe(super().recv, *arguments)

    def send(self, *arguments: Any) -> Any:
        return self._maybe(super().send, *arguments)


@pytest.mark.parametrize("act", ["recv", "send"])
async def test_for_lack_of_memory_the_connection_ends_by_that_error(act: str) -> None:
    ours, peer = socket.socketpair()
    sock = Failing(fileno=ours.detach())
    sock.setblocking(False)
    ended: asyncio.Queue[Exception | None] = asyncio.Queue()
    transport = Transport(sock, received=lambda _: None, ended=ended.put_nowait)
    sock.error = MemoryError
    with peer:
        if act == "send":
            transport.send(b"x")
        else:
            peer.send(b"x")
        async with asyncio.timeout(BOUND):
            assert isinstance(await ended.get(), MemoryError)
    assert sock.fileno() == -1


# Signs of life.


async def test_a_silent_broker_is_asked_for_a_sign_of_life_and_given_up() -> None:
    """By MQTT 5, 3.1.2.10: one PINGREQ is answered, one is not. The broker asks for a shorter time [3.2.2.3.14]."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"MQTT\x05")
        await reader.read(1000)
        writer.write(packet(0x20, b"\0\0\3\x13\0\1"))  # Server Keep Alive: 1 s
        await heard.put(await reader.read(100))
        writer.write(packet(0xD0, b""))
        await heard.put(await reader.read(100))
        await heard.put(await reader.read(100))
        writer.close()

    async with asyncio.timeout(BOUND), await asyncio.start_server(client, "127.0.0.1", 0) as server:
        connection = MqttConnection(
            Broker("127.0.0.1", server.sockets[0].getsockname()[1]), client_id="station", persistent=True
        )
        async with connection:
            await connection.open()
            with pytest.raises(ConnectionLost, match="no sign of life"):  # words: not that it was closed
                await connection.receive()
        assert [await heard.get() for _ in range(3)] == [b"\xc0\0", b"\xc0\0", b""]


async def test_an_end_that_fails_for_lack_of_memory_is_repeated(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "LOOK", 0.01)
    failures = iter([MemoryError, MemoryError])

    def short(error: Exception) -> Any:
        for failure in failures:
            raise failure
        return unforeseen(error)

    async with await mqtt.connect(at(mosquitto), client_id="station", persistent=False) as connection:
        monkeypatch.setattr("stationkey.mqtt.connection.unforeseen", short)
        receiving = asyncio.create_task(connection.receive())
        with pytest.raises(MemoryError):
            connection.abandon(RuntimeError("a fault"))
        async with asyncio.timeout(BOUND):
            await connection.lost
            with pytest.raises(ConnectionLost) as lost:
                await receiving
        assert lost.value.reason == "internal_error"


async def test_a_packet_identifier_in_use_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By MQTT-2.2.1-3, also when they begin again after 65,535."""
    monkeypatch.setattr(mqtt, "CONNECT_TIMEOUT", BOUND)
    identifiers: asyncio.Queue[int] = asyncio.Queue()
    left = asyncio.Event()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"MQTT\x05")
        await reader.read(1000)
        writer.write(greeting(V5))
        while body := await reader.read(9):
            await identifiers.put(int.from_bytes(body[5:7], "big"))
        writer.close()
        await writer.wait_closed()
        left.set()

    async with asyncio.timeout(BOUND), await asyncio.start_server(client, "127.0.0.1", 0) as server:
        connection = MqttConnection(
            Broker("127.0.0.1", server.sockets[0].getsockname()[1]), client_id="station", persistent=True
        )
        async with connection:
            await connection.open()
            asked = []
            for _ in range(2):
                asked.append(asyncio.create_task(connection.publish("t", b"x")))
                await identifiers.get()
            connection._identifier = 65_534  # noqa: SLF001 - as after as many publications
            for expected in (65_535, 3):
                asked.append(asyncio.create_task(connection.publish("t", b"x")))
                assert await identifiers.get() == expected
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        await left.wait()
