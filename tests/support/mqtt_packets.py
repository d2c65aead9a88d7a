"""Packets of a broker, encoded by the pseudo-code of the standard, and what paho reads in them."""

from __future__ import annotations

from typing import Any, Final

from hypothesis import strategies as st
from paho.mqtt import _packet
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.exception import MQTTException

from stationkey.mqtt.codec import V5, V311, Acknowledgement, Connack, Disconnect, Packet, Pingresp, Publish

VERSIONS: Final = (V5, V311)
CONNACK, PUBLISH, PUBACK, SUBACK, UNSUBACK, PINGRESP, DISCONNECT = 0x20, 0x30, 0x40, 0x90, 0xB0, 0xD0, 0xE0


def length(number: int) -> bytes:
    """A Variable Byte Integer [MQTT 5 1.5.5]."""
    encoded = bytearray()
    while True:
        number, digit = divmod(number, 128)
        encoded.append(digit | 128 if number else digit)
        if not number:
            return bytes(encoded)


def packet(head: int, body: bytes) -> bytes:
    return bytes([head]) + length(len(body)) + body


def text(value: str) -> bytes:
    encoded = value.encode()
    return len(encoded).to_bytes(2, "big") + encoded


def greeting(version: int) -> bytes:
    """A CONNACK that grants all."""
    return packet(CONNACK, b"\0\0\0" if version == V5 else b"\0\0")


texts: Final = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=20)
topics: Final = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0+#\ufeff"), min_size=1, max_size=20
)
identifiers: Final = st.integers(1, 65_535)


def _property(identifier: int, value: st.SearchStrategy[bytes]) -> st.SearchStrategy[tuple[int, bytes]]:
    return st.tuples(st.just(identifier), value.map(lambda encoded: bytes([identifier]) + encoded))


def _number(size: int, least: int = 0, most: int | None = None) -> st.SearchStrategy[bytes]:
    return st.integers(least, 256**size - 1 if most is None else most).map(lambda number: number.to_bytes(size, "big"))


_text = texts.map(text)
_pair = st.tuples(_text, _text).map(b"".join)
_binary = st.binary(max_size=20).map(lambda data: len(data).to_bytes(2, "big") + data)
_variable = st.integers(1, 268_435_455).map(length)
_ANSWER: Final = (_property(0x1F, _text), _property(0x26, _pair))
_PROPERTIES: Final = {
    PUBLISH: (
        *(_property(0x01, _number(1, most=1)), _property(0x02, _number(4)), _property(0x03, _text)),
        *(_property(0x08, _text), _property(0x09, _binary), _property(0x0B, _variable)),
        *(_property(0x23, _number(2, 1)), _property(0x26, _pair)),
    ),
    CONNACK: (
        *(_property(0x11, _number(4)), _property(0x12, _text), _property(0x13, _number(2)), _property(0x15, _text)),
        *(_property(0x16, _binary), _property(0x1A, _text), _property(0x1C, _text), _property(0x21, _number(2, 1))),
        *(_property(0x22, _number(2)), _property(0x24, _number(1, most=1)), _property(0x25, _number(1, most=1))),
        *(_property(0x27, _number(4, 1, 268_435_455)), _property(0x28, _number(1, most=1))),
        *(_property(0x29, _number(1, most=1)), _property(0x2A, _number(1, most=1)), *_ANSWER),
    ),
    PUBACK: _ANSWER,
    SUBACK: _ANSWER,
    UNSUBACK: _ANSWER,
    DISCONNECT: (_property(0x11, _number(4)), _property(0x1C, _text), *_ANSWER),
}


@st.composite
def properties(draw: st.DrawFn, kind: int) -> bytes:
    """Valid properties of a packet, with their length; those that may repeat do."""
    drawn = draw(st.lists(st.one_of(_PROPERTIES[kind]), max_size=4))
    once: dict[Any, bytes] = {}
    for number, (identifier, encoded) in enumerate(drawn):
        once[(identifier, number) if identifier in {0x0B, 0x26} else identifier] = encoded
    whole = b"".join(once.values())
    return length(len(whole)) + whole


@st.composite
def packets(draw: st.DrawFn, version: int) -> tuple[bytes, Packet]:
    """A packet that a broker may send after its CONNACK, and what it says."""
    kinds = [PUBLISH, PUBLISH, PUBACK, SUBACK, UNSUBACK, PINGRESP] + [DISCONNECT] * (version == V5)
    kind = draw(st.sampled_from(kinds))
    has = draw(properties(kind)) if version == V5 and kind != PINGRESP else b""
    identifier = draw(identifiers)
    front = identifier.to_bytes(2, "big")
    if kind == PUBLISH:
        qos = draw(st.integers(0, 1))
        retain, dup = draw(st.booleans()), qos > 0 and draw(st.booleans())
        topic, payload = draw(topics), draw(st.binary(max_size=50))
        head = PUBLISH | retain | qos << 1 | dup << 3
        said = Publish(topic, payload, identifier if qos else 0, qos, retain, dup)
        return packet(head, text(topic) + (front if qos else b"") + has + payload), said
    if kind == PINGRESP:
        return packet(kind, b""), Pingresp()
    codes = {
        PUBACK: [0, 0x10, 0x80, 0x87, 0x97],
        SUBACK: [0, 1, 0x80, 0x87],
        UNSUBACK: [0, 0x11, 0x80],
        DISCONNECT: [0, 0x81, 0x8E, 0x98],
    }
    code = draw(st.sampled_from(codes[kind]))
    if kind == DISCONNECT:
        body = draw(st.sampled_from([bytes([code]) + has, bytes([code]), b""]))
        return packet(kind, body), Disconnect(code if body else 0)
    if kind == PUBACK:
        bodies = [bytes([code]) + has, bytes([code]), b""] if version == V5 else [b""]
        body = draw(st.sampled_from(bodies))
        return packet(kind, front + body), Acknowledgement(kind, identifier, code if body else 0)
    if version == V311:
        code = 0 if kind == UNSUBACK else draw(st.sampled_from([0, 1, 0x80]))
        return packet(kind, front + bytes([code]) * (kind == SUBACK)), Acknowledgement(kind, identifier, code)
    return packet(kind, front + has + bytes([code])), Acknowledgement(kind, identifier, code)


def read_by_paho(version: int, head: int, body: bytes) -> Packet | None:  # noqa: PLR0911 - a table of packets
    """What paho-mqtt reads in a packet; None if it refuses it."""
    spoken = MQTTProtocolVersion(version)
    try:
        match head & 0xF0:
            case 0x30:
                read = _packet.decode_publish(head, body, spoken)
                topic = read.topic.decode()
                return Publish(topic, bytes(read.payload), read.mid, read.qos, read.retain, read.dup)
            case 0x20:
                seen = _packet.decode_connack(head, body, spoken)
                return Connack(bool(seen.flags & 1), seen.reason.value, _by_identifier(seen.properties))
            case 0x40:
                answer = _packet.decode_puback(head, body, spoken)
                return Acknowledgement(0x40, answer.mid, answer.reason.value)
            case 0x90:
                granted = _packet.decode_suback(head, body, spoken)
                return Acknowledgement(0x90, granted.mid, granted.reason_codes[0].value)
            case 0xB0:
                ended = _packet.decode_unsuback(head, body, spoken)
                codes = [code.value for code in ended.reason_codes] or ([0] if version == V311 else [])
                return Acknowledgement(0xB0, ended.mid, codes[0])
            case 0xD0:
                return None if body else Pingresp()
            case _:
                left = _packet.decode_disconnect(head, body, spoken)
                return Disconnect(0 if left.reason is None else left.reason.value) if version == V5 else None
    except (MQTTException, UnicodeDecodeError, IndexError):
        return None


def _by_identifier(found: Any) -> dict[int, Any]:
    """The properties of paho, but for those that may repeat."""
    values = {} if found is None else vars(found)
    named = {name.replace(" ", ""): number for name, number in values.get("names", {}).items()}
    return {named[name]: value for name, value in values.items() if name in named and name != "UserProperty"}
