"""Cut MQTT packets that are too large, without keeping their rest.

A packet may be 256 MiB [MQTT 5 1.5.5, 3.1.1 2.2.3]. Disconnecting does not help: the broker redelivers a QoS 1 message
at each connection. For MQTT 5's Maximum Packet Size [3.1.2.11.4] see `stationkey.mqtt.bounds.PACKET_MARGIN`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_MORE: Final = 0x80
"""Bit of a length byte that is followed by another: a Variable Byte Integer of at most four bytes [MQTT 5 1.5.5]."""
_LENGTH_BYTES: Final = 4
_PIECE: Final = 64 * 1024
_PIECES: Final = 16
"""Size of the pieces in which discarded bytes are read, and pieces per turn of the event loop."""


class PacketBound:
    """A filter between a socket and a reader of MQTT packets.

    The reader sees a packet that is too large as ending at the bound. Topic and packet identifier of a PUBLISH come
    first, so it can still be acknowledged.

    Args:
        most: largest packet in bytes, without its fixed header.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._header = b""
        self._out = b""
        """A fixed header to give to the reader."""
        self._body = 0
        self._surplus = 0

    def read(self, size: int, receive: Callable[[int], bytes]) -> bytes:
        """Return the available bytes that the reader may see.

        Args:
            size: bytes at most.
            receive: reads so many bytes at most from the socket; empty at its end.

        Returns:
            Bytes; empty at the end of the stream.

        Raises:
            BlockingIOError: nothing is available; so does `receive`.
        """
        if not self._out and not self._body:
            if self._surplus and not self._pass_over(receive):
                return b""
            if not self._read_header(receive):
                return b""
        if self._out:
            given, self._out = self._out[:size], self._out[size:]
            return given
        data = receive(min(size, self._body))
        self._body -= len(data)
        return data

    def _read_header(self, receive: Callable[[int], bytes]) -> bool:
        """Read a packet's type and length [MQTT 5 2.1]; return whether they arrived before the end of the stream."""
        while not self._header[1:] or self._header[-1] & _MORE:
            if len(self._header[1:]) > _LENGTH_BYTES:  # an invalid length: the reader rejects it
                self._out, self._header = self._header, b""
                return True
            byte = receive(1)
            if not byte:
                return False
            self._header += byte
        length = sum((byte & ~_MORE) << 7 * place for place, byte in enumerate(self._header[1:]))
        self._body = min(length, self._most)
        self._surplus = length - self._body
        self._out = self._header[:1] + _variable(self._body) if self._surplus else self._header
        self._header = b""
        return True

    def _pass_over(self, receive: Callable[[int], bytes]) -> bool:
        """Discard the rest of a packet; return whether it arrived before the end of the stream."""
        for _ in range(_PIECES):
            piece = receive(min(self._surplus, _PIECE))
            if not piece:
                return False
            self._surplus -= len(piece)
            if not self._surplus:
                return True
        raise BlockingIOError


def _variable(number: int) -> bytes:
    """Encode a Variable Byte Integer."""
    encoded = b""
    while number >= _MORE:
        encoded += bytes([number % _MORE | _MORE])
        number //= _MORE
    return encoded + bytes([number])
