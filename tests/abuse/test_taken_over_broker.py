"""A broker that is somebody else's by now: it keeps to no standard, and the daemon to its bounds."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

import pytest
from flood import BOUND, memory, packet, packets, request, text, wire
from peers import Daemon

from stationkey.mqtt.connection import KEEPALIVE

MEMORY: Final = 16 * 1024
"""KiB that the daemon may grow by. A packet is 256 MiB."""
LARGEST: Final = 268_435_455
"""Bytes of a packet without its header [MQTT 5 1.5.5]."""
PIECE: Final = bytes(1024 * 1024)


class Broker:
    """Takes every connection, subscription and message, and sends what it is told to.

    Args:
        level: of MQTT that it speaks: 4 is 3.1.1, 5 is 5.
    """

    def __init__(self, level: int) -> None:
        self._level = level
        self._properties = b"\0" if level == 5 else b""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._listening.getsockname()[1]}"
        self.connections: queue.Queue[socket.socket] = queue.Queue()
        """Those on which a subscription stands."""
        self.acknowledged: queue.Queue[int] = queue.Queue()
        self.answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._one_packet = threading.Lock()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection, suppress(ConnectionError):  # the daemon may hang up at any moment
                for head, body in packets(connection):
                    if not self._take(connection, head, body):
                        break

    def _take(self, connection: socket.socket, head: int, body: bytes) -> bool:
        """Take in a packet; whether the connection is to go on."""
        match head >> 4:
            case 1 if body[6] > self._level:
                self._send(connection, packet(0x20, b"\0\1"))
                return False
            case 1:
                self._send(connection, packet(0x20, b"\0\0" + self._properties))
            case 8:
                self._send(connection, packet(0x90, body[:2] + self._properties + b"\1"))
                self.connections.put(connection)
            case 3:
                topic = 2 + int.from_bytes(body[:2], "big")
                self._send(connection, packet(0x40, body[topic : topic + 2]))
                self.answers.put(json.loads(body[topic + 2 + len(self._properties) :]))
            case 4:
                self.acknowledged.put(int.from_bytes(body[:2], "big"))
        return True

    def _send(self, connection: socket.socket, *parts: bytes) -> None:
        with self._one_packet:
            for part in parts:
                connection.sendall(part)

    def publish(self, connection: socket.socket, payload: bytes, number: int, *, size: int = 0) -> None:
        """Send a message, in a packet of `size` bytes if that is more than it takes."""
        front = text("josev/cs") + number.to_bytes(2, "big") + self._properties + payload
        filler = max(0, size - len(front))
        pieces = (PIECE[: filler - begin] for begin in range(0, filler, len(PIECE)))
        self._send(connection, packet(0x32, front, filler=filler), *pieces)


class HastyDaemon(Daemon):
    """`hasty_daemon.py`, in the place of ``stationkey serve``."""

    def command(self) -> list[str]:
        return [str(Path(__file__).with_name("hasty_daemon.py")), *super().command()[2:]]


@contextmanager
def serving(folder: Path, broker: Broker, daemon: type[Daemon] = Daemon) -> Iterator[Daemon]:
    options = ("--broker", broker.url, "--state-dir", str(folder / "state"))
    software = ("--keystore", "software:", "--allow-software-keys")
    with daemon(folder / "daemon", *options, *software) as running:
        yield running


@pytest.mark.parametrize("level", [pytest.param(4, id="3.1.1"), pytest.param(5, id="5")])
def test_a_packet_of_256_mib_is_refused_by_its_id_and_fills_no_memory(tmp_path: Path, level: int) -> None:
    with Broker(level) as broker, serving(tmp_path, broker) as daemon:
        connection = broker.connections.get(timeout=BOUND)
        small = request()
        broker.publish(connection, wire(small), 1)
        assert broker.answers.get(timeout=BOUND)["data"]["status"] == "accepted"
        before, _ = memory(daemon)
        large = request()
        for number in (2, 3):
            broker.publish(connection, wire(large), number, size=LARGEST)
            answer = broker.answers.get(timeout=BOUND)
            assert (answer["id"], answer["data"]["status"]) == (large["id"], "rejected")
        broker.publish(connection, wire(request()), 4)
        assert broker.answers.get(timeout=BOUND)["data"]["status"] == "accepted"
        assert [broker.acknowledged.get(timeout=BOUND) for _ in range(4)] == [1, 2, 3, 4]
        _, most = memory(daemon)
        assert most - before < MEMORY
        assert broker.connections.empty()  # it was one connection


def publish(
    topic: bytes, *, head: int = 0x32, number: int = 7, properties: bytes = b"\0", payload: bytes = b"{}"
) -> bytes:
    """A PUBLISH of MQTT 5, legal or not."""
    identifier = number.to_bytes(2, "big") if head & 0x06 else b""
    return packet(head, len(topic).to_bytes(2, "big") + topic + identifier + properties + payload)


ILLEGAL: Final = {
    "no topic": publish(b""),
    "no topic, QoS 0": publish(b"", head=0x30),
    "no topic, but an alias that was never given": publish(b"", properties=b"\3\x23\0\1"),
    "a wildcard in the topic": publish(b"josev/#"),
    "NUL in the topic": publish(b"josev/cs\0"),
    "half a character in the topic": publish(b"josev/\xed\xa0\x80"),
    "packet identifier 0": publish(b"josev/cs", number=0),
    "QoS 2": publish(b"josev/cs", head=0x34),
    "QoS 3": publish(b"josev/cs", head=0x36),
    "DUP at QoS 0": publish(b"josev/cs", head=0x38),
    "PUBREC": packet(0x50, b"\0\7"),
    "PUBREL": packet(0x62, b"\0\7"),
    "PUBCOMP": packet(0x70, b"\0\7"),
    "CONNECT": packet(0x10, b"\0\4MQTT\5\2\0\0\0\0\0"),
    "SUBSCRIBE": packet(0x82, b"\0\1\0\0\1a\1"),
    "PINGREQ": packet(0xC0, b""),
    "AUTH": packet(0xF0, b""),
    "a type that there is not": packet(0x00, b""),
    "flags on a PUBACK": packet(0x4F, b"\0\7"),
    "a length of five bytes": b"\x32\xff\xff\xff\xff\xff",
    "properties longer than the packet": b"\x32\x12\0\x08josev/cs\0\1\x05\xff\xff\xff\xff\xff",
    "an unknown property": publish(b"josev/cs", properties=b"\2\x7f\0"),
    "a PUBACK with a reason that it cannot have": packet(0x40, b"\0\7\x8d"),
    "a PUBACK of one byte": packet(0x40, b"\0"),
}


def test_no_packet_ends_the_daemon(tmp_path: Path) -> None:
    """Each ends its connection, and nothing else: the next one serves."""
    with Broker(5) as broker, serving(tmp_path, broker, HastyDaemon) as daemon:
        connection = broker.connections.get(timeout=BOUND)
        for name, illegal in ILLEGAL.items():
            broker._send(connection, illegal)  # noqa: SLF001 - raw bytes
            connection = broker.connections.get(timeout=KEEPALIVE)  # by the packet, not by a ping without an answer
            broker.publish(connection, wire(request()), 1)
            assert broker.answers.get(timeout=BOUND)["data"]["status"] == "accepted", name
        assert daemon.process is not None
        assert daemon.process.poll() is None
        assert not daemon.events(reason="internal_error")


@pytest.mark.parametrize(
    ("flood", "count"),
    [
        pytest.param(
            lambda number: publish(b"josev/cs", head=0x34, number=number, payload=PIECE[:65_000]), 999, id="QoS 2"
        ),
        pytest.param(lambda number: publish(b"t" * 60_000, number=number), 999, id="long topics"),
        pytest.param(lambda number: publish(b"josev/cs", number=number, payload=b""), 10_000, id="small, nothing read"),
        pytest.param(
            lambda number: publish(b"josev/cs", number=number, properties=b"\xc0\x46" + b"\x26\0\1k\0\2vv" * 1128),
            300,
            id="user properties",
        ),
    ],
)
def test_a_flood_of_any_kind_of_packet_fills_no_memory(
    tmp_path: Path, flood: Callable[[int], bytes], count: int
) -> None:
    """From a broker that acknowledges nothing, and reads nothing while it sends."""
    with Broker(5) as broker, serving(tmp_path, broker) as daemon:
        connection = broker.connections.get(timeout=BOUND)
        broker.publish(connection, wire(request()), 1)
        assert broker.answers.get(timeout=BOUND)["data"]["status"] == "accepted"
        before, _ = memory(daemon)
        with broker._one_packet, suppress(OSError):  # noqa: SLF001 - what is read meanwhile is answered by nobody
            for number in range(1, count):
                connection.sendall(flood(number))
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it, as a close would not
        latest = broker.connections.get(timeout=BOUND)
        broker.publish(latest, wire(request()), 1)
        assert broker.answers.get(timeout=BOUND)["data"]["status"] == "accepted"
        _, most = memory(daemon)

    assert most - before < MEMORY
