"""Between the daemon and its broker: a proxy that cuts the connection in the middle of a PUBLISH."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from peers import Mosquitto

PUBLISH: Final = 3
"""Control packet type [MQTT 5 2.1.2]."""


class CuttingProxy:
    """Forwards everything, until it is told where to cut; after the cut it forwards again.

    Args:
        broker: where to.
    """

    def __init__(self, broker: Mosquitto) -> None:
        self._broker = broker
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._after: int | None = None
        self._lock = threading.Lock()
        self.was_cut = threading.Event()

    @property
    def url(self) -> str:
        """``mqtt://127.0.0.1:PORT``."""
        return f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self, after: int) -> None:
        """Cut the next PUBLISH from the daemon after so many of its bytes; negative numbers count from its end."""
        self._after = after

    def __enter__(self) -> Self:
        self._run(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            _end(sock)
        for thread in self._threads:
            thread.join()

    def _run(self, work: object, *arguments: socket.socket) -> None:
        assert callable(work)
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the end
            while True:
                inner, _ = self._listener.accept()
                outer = socket.create_connection(("127.0.0.1", self._broker.port))
                with self._lock:
                    self._sockets += [inner, outer]
                for sock in (inner, outer):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._run(self._forward, outer, inner)
                self._run(self._forward_packets, inner, outer)

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        _end(source)
        _end(sink)

    def _forward_packets(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for packet in _packets(source):
                if packet[0] >> 4 == PUBLISH and self._after is not None:
                    sink.sendall(packet[: self._after if self._after >= 0 else len(packet) + self._after])
                    self._after = None
                    self.was_cut.set()
                    break
                sink.sendall(packet)
        _end(source)
        _end(sink)


def _packets(source: socket.socket) -> Iterator[bytes]:
    """The control packets of a stream: one byte, a length of one to four bytes, and so much [MQTT 5 2.1]."""
    with source.makefile("rb") as stream:
        while header := stream.read(1):
            length, shift = 0, 0
            while True:
                byte = stream.read(1)
                header += byte
                length |= (byte[0] & 0x7F) << shift
                shift += 7
                if not byte[0] & 0x80:
                    break
            yield header + stream.read(length)


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
