"""MQTT packets in a stream of bytes: one that is too large is cut, and no more of it is kept.

A packet may be 256 MiB [MQTT 5 1.5.5, 3.1.1 2.2.3], and its length comes first. To hang up would not do: a message of
QoS 1 that was sent to a topic of ours would be waiting at the next connection, and at each one after. Nor does MQTT 5's
Maximum Packet Size [3.1.2.11.4]: see `stationkey.mqtt.connection.PACKET_MARGIN`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_MORE: Final = 0x80
"""In each byte of a length that another one follows: a Variable Byte Integer, of four bytes at most [MQTT 5 1.5.5]."""
_LENGTH_BYTES: Final = 4
_PIECE: Final = 64 * 1024
_PIECES: Final = 16
"""What is thrown away is read in pieces of so many bytes, and so many of them at a time: others want to be served."""


class PacketBound:
    """What stands between a socket and a reader of MQTT packets.

    A packet that is too large looks, to the reader, as if it ended at the bound: of a PUBLISH topic and packet
    identifier are at the front, so that it can still be acknowledged, with a payload that lacks its end.

    Args:
        most: bytes of a packet, its fixed header apart, that are let through.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._header = b""
        self._out = b""
        """A fixed header that is to be given to the reader."""
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
        """Read a packet's type and length [MQTT 5 2.1]; whether they came before the end of the stream."""
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
    """A Variable Byte Integer."""
    encoded = b""
    while number >= _MORE:
        encoded += bytes([number % _MORE | _MORE])
        number //= _MORE
    return encoded + bytes([number])
