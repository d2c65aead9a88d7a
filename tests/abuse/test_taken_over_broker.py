"""A broker that is somebody else's by now: it keeps to no standard, and the daemon to its bounds."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest
from flood import BOUND, memory, packet, packets, request, text, wire
from peers import Daemon

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
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


@contextmanager
def serving(folder: Path, broker: Broker) -> Iterator[Daemon]:
    options = ("--broker", broker.url, "--state-dir", str(folder / "state"))
    software = ("--keystore", "software:", "--allow-software-keys")
    with Daemon(folder / "daemon", *options, *software) as daemon:
        yield daemon


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
