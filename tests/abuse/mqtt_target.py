"""MQTT packets as a target of fuzzing; see `targets`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hypothesis import strategies as st
from mqtt_packets import VERSIONS, greeting, packets, read_by_paho

from stationkey.mqtt.codec import Decoder, Packet, ProtocolViolation

PACKET_BOUND: Final = 300


def check_mqtt(content: bytes) -> None:
    """`Decoder`, on what follows a CONNACK; the first byte says which version, and where the stream is cut in two.

    However it comes, the same is read, and the same violation found; no more is held than the bound.
    """
    version = VERSIONS[content[0] & 1] if content else VERSIONS[0]
    stream = content[1:]
    at = content[0] >> 1 if content else 0
    whole = _read(version, [stream])
    assert whole == _read(version, [stream[:at], stream[at:]])
    assert whole == _read(version, [stream[place : place + 1] for place in range(len(stream))])
    if len(stream) <= PACKET_BOUND:
        _compare(version, stream, whole[0])


def _read(version: int, pieces: list[bytes]) -> tuple[list[Packet], int | None]:
    """The packets in a stream, and the reason code of the violation that ends it."""
    decoder, found = Decoder(version, PACKET_BOUND), list[Packet]()
    assert len(list(decoder.packets(greeting(version)))) == 1
    for piece in pieces:
        try:
            found.extend(decoder.packets(piece))
        except ProtocolViolation as violation:
            if violation.code not in {0x81, 0x82, 0x90} or not str(violation).isprintable():
                raise AssertionError(violation) from violation
            return [], violation.code  # how many were read before it depends on how they come
        assert decoder.held <= PACKET_BOUND
    return found, None


def _compare(version: int, stream: bytes, found: list[Packet]) -> None:
    """What is read, paho reads too, and the same; but for `PAHO_REFUSES`."""
    for packet in found:
        length, shift, begin = 0, 0, 1
        while True:
            byte = stream[begin]
            begin += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        head, body, stream = stream[0], stream[begin : begin + length], stream[begin + length :]
        read = read_by_paho(version, head, body)
        assert read == packet or (read is None and any(holds(body) for holds in PAHO_REFUSES.values())), (packet, read)


PAHO_REFUSES: Final[dict[str, Callable[[bytes], bool]]] = {
    "U+FEFF in a property, which MQTT-1.5.4-3 allows": lambda body: b"\xef\xbb\xbf" in body,
    "PUBACK 0x95, as Mosquitto sends it": lambda body: body[2:3] == b"\x95",
}
"""What paho does not read though it may be sent."""


@st.composite
def packet_streams(draw: st.DrawFn) -> bytes:
    """What `check_mqtt` takes, with packets that are right."""
    first = draw(st.integers(0, 255))
    drawn = draw(st.lists(packets(VERSIONS[first & 1]), max_size=3))
    return bytes([first]) + b"".join(encoded for encoded, _ in drawn)
