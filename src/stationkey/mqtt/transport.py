"""A connected socket in the event loop; `stationkey.mqtt.tls` has the one with TLS.

asyncio's own TLS does the handshake in the event loop, and a TPM that hangs would block it. So the socket comes
connected, and its handshake done.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

PIECE: Final = 16 * 1024
"""Bytes read at once: a TLS record [RFC 8446 5.1]. Other work gets its turn between two reads."""


class Transport:
    """Sends in order what the socket cannot take at once, and hands over what arrives.

    Args:
        sock: connected, without blocking.
        received: called with each piece that arrives.
        ended: called once with None if the peer closed the connection or it is lost, with the error if a call failed
            otherwise; not after `close`.

    Attributes:
        heard: when bytes arrived last, in the event loop's time.
        said: when something was sent last.
        failure: OpenSSL's name for the end of TLS, such as the broker's alert, or None.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        received: Callable[[bytes], None],
        ended: Callable[[Exception | None], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._received = received
        self._ended = ended
        self._unsent: deque[bytes | memoryview] = deque()
        self._read_again = False
        """Whether a read has to wait until something is written [SSL_read(3)]."""
        self._closing = self._closed = False
        self.heard = self.said = self._loop.time()
        self.failure: str | None = None
        self._loop.add_reader(sock, self._read)

    @property
    def unsent(self) -> int:
        """Number of packets that wait for the peer to read."""
        return len(self._unsent)

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._closed

    def send(self, packet: bytes) -> None:
        """Send a packet: as much as the socket takes now, and the rest when it is writable again."""
        if self._closed:
            return
        self.said = self._loop.time()
        if self._unsent:
            self._unsent.append(packet)
            return
        sent = self._write(packet)
        if sent < len(packet) and not self._closed:
            self._unsent.append(memoryview(packet)[sent:])
            self._loop.add_writer(self._sock, self._flush)

    def close_when_sent(self) -> bool:
        """End when everything is sent; return whether that is so already."""
        self._closing = True
        return not self._unsent

    def close(self) -> None:
        """Close the socket; a second time without effect."""
        if not self._closed:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._unsent.clear()
            self._sock.close()
            self._closed = True  # last: if memory is short, this is repeated until it is done

    def _end(self, error: Exception | None) -> None:
        if not self._closed:
            self.close()
            self._ended(error)

    def _write(self, data: bytes | memoryview) -> int:
        """Return how many bytes the socket has taken."""
        try:
            return self._put_into(data)
        except OSError:
            self._end(None)
        except Exception as error:  # noqa: BLE001 - part of the packet may be sent, and the peer would misread the next
            self._end(error)
        return 0

    def _flush(self) -> None:
        """Go on with what had to wait until the socket is writable."""
        if self._read_again:
            self._read_again = False
            self._read()
        while self._unsent:
            front = self._unsent[0]
            sent = self._write(front)
            if not self._unsent:
                return  # it has ended
            if sent < len(front):
                self._unsent[0] = memoryview(front)[sent:]
                return
            self._unsent.popleft()
        if self._closing:
            self._end(None)
        elif not self._closed and not self._read_again:
            self._loop.remove_writer(self._sock)

    def _read(self) -> None:
        """Hand over what has arrived."""
        if self._closed:
            return
        try:
            data = self._take_from()
            if data is None:
                return
            self.heard = self._loop.time()
            if data:
                self._received(data)
        except OSError:
            self._end(None)
            return
        except MemoryError as error:
            self._end(error)
            return
        if not data:
            self._end(None)
        elif self._has_more():
            self._loop.call_soon(self._read)

    def _read_when_writable(self) -> None:
        self._read_again = True
        self._loop.add_writer(self._sock, self._flush)

    # What TLS does otherwise.

    def _take_from(self) -> bytes | None:
        """Return what has arrived, empty at the end; None for nothing yet."""
        try:
            return self._sock.recv(PIECE)
        except BlockingIOError:
            return None

    def _put_into(self, data: bytes | memoryview) -> int:
        """Return how many bytes the socket has taken."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0

    def _has_more(self) -> bool:
        """Return whether something has arrived that the socket does not signal."""
        return False
