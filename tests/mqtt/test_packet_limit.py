"""MQTT packets in a stream: what is too large is cut, and what is not comes as it came."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stationkey.mqtt.packet_limit import PacketBound

MOST = 200


def length(number: int) -> bytes:
    """A Variable Byte Integer, written by the pseudo-code of the standard [MQTT 5 1.5.5]."""
    encoded = bytearray()
    while True:
        number, digit = divmod(number, 128)
        encoded.append(digit | 128 if number else digit)
        if not number:
            return bytes(encoded)


def packet(head: int, body: bytes) -> bytes:
    return bytes([head]) + length(len(body)) + body


class Stream:
    """Bytes that come in pieces, with nothing to read between one and the next."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.taken: list[int] = []
        self._pause = False

    def receive(self, size: int) -> bytes:
        self._pause = not self._pause
        if self._pause:
            raise BlockingIOError
        if not self._pieces:
            return b""
        given, self._pieces[0] = self._pieces[0][:size], self._pieces[0][size:]
        if not self._pieces[0]:
            del self._pieces[0]
        self.taken.append(len(given))
        return given


def read_all(bound: PacketBound, receive: Callable[[int], bytes], size: int) -> bytes:
    """Read to the end, as a reader does that comes back when there was nothing to read."""
    out = b""
    while True:
        try:
            data = bound.read(size, receive)
        except BlockingIOError:
            continue
        if not data:
            return out
        assert len(data) <= size
        out += data


@given(
    packets=st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=MOST * 3)), max_size=5),
    cuts=st.lists(st.integers(1, 3000), max_size=20),
    size=st.integers(1, 1000),
)
def test_each_packet_is_let_through_up_to_the_bound_however_it_comes_and_is_asked_for(
    packets: list[tuple[int, bytes]], cuts: list[int], size: int
) -> None:
    sent = b"".join(packet(head, body) for head, body in packets)
    places = [0, *sorted(cut for cut in cuts if cut < len(sent)), len(sent)]
    stream = Stream([sent[begin:end] for begin, end in itertools.pairwise(places)])
    assert read_all(PacketBound(MOST), stream.receive, size) == b"".join(
        packet(head, body[:MOST]) for head, body in packets
    )


def test_what_is_cut_off_is_never_held_together() -> None:
    largest = 268_435_455
    left = largest

    def receive(size: int) -> bytes:
        nonlocal left
        if left == largest:
            left -= 1
            return b"\x32"
        if header:
            return bytes([header.pop(0)])
        sizes.append(size)
        given = min(size, left)
        left -= given
        return bytes(given)

    header, sizes = list(length(largest - 1)), list[int]()
    bound = PacketBound(MOST)
    assert bound.read(1, receive) == b"\x32"
    assert read_all(bound, receive, largest) == length(MOST) + bytes(MOST)
    assert left == 0
    assert max(sizes) <= 64 * 1024


def test_what_is_cut_off_keeps_nobody_else_waiting_for_longer_than_a_mebibyte_takes() -> None:
    header = [b"\x32", *(bytes([byte]) for byte in length(100 * 1024 * 1024))]
    pieces = 0

    def receive(size: int) -> bytes:
        nonlocal pieces
        if header:
            return header.pop(0)
        pieces += 1
        return bytes(size)

    bound = PacketBound(MOST)
    while bound.read(MOST, receive) != bytes(MOST):
        pass
    pieces = 0
    with pytest.raises(BlockingIOError):
        bound.read(1, receive)
    assert pieces == 16


def test_a_stream_that_ends_anywhere_is_at_its_end() -> None:
    sent, seen = packet(0x32, bytes(2 * MOST)), packet(0x32, bytes(MOST))
    header = len(sent) - 2 * MOST
    for end in range(len(sent) + 1):
        given = read_all(PacketBound(MOST), Stream([sent[:end]]).receive, 1000)
        assert given == (seen[:end] if end >= header else b"")


def test_a_length_of_more_than_four_bytes_is_left_to_the_reader_to_refuse() -> None:
    sent = b"\x32\xff\xff\xff\xff\xff"
    assert read_all(PacketBound(MOST), Stream([sent]).receive, 1) == sent
