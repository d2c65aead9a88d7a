"""Between the daemon and its broker: a proxy that cuts the connection in the middle of a PUBLISH."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Final

from between import Between, back
from peers import Mosquitto

PUBLISH: Final = 3
"""Control packet type [MQTT 5 2.1.2]."""


class CuttingProxy(Between):
    """Forwards everything, until it is told where to cut; after the cut it forwards again.

    Args:
        broker: where to.
    """

    def __init__(self, broker: Mosquitto) -> None:
        super().__init__()
        self._after: int | None = None
        self._port = self.listen(0, broker.port, self._cut_packets, back)
        self.was_cut = threading.Event()

    @property
    def url(self) -> str:
        """``mqtt://127.0.0.1:PORT``."""
        return f"mqtt://127.0.0.1:{self._port}"

    def cut(self, after: int) -> None:
        """Cut the next PUBLISH from the daemon after so many of its bytes; negative numbers count from its end."""
        self._after = after

    def _cut_packets(self, source: socket.socket, sink: socket.socket) -> None:
        for packet in _packets(source):
            if packet[0] >> 4 == PUBLISH and self._after is not None:
                sink.sendall(packet[: self._after if self._after >= 0 else len(packet) + self._after])
                self._after = None
                self.was_cut.set()
                break
            sink.sendall(packet)


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
