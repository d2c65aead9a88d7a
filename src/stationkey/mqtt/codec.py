"""MQTT packets as bytes, for a client that uses QoS 1 at most: both versions, no I/O.

The functions encode what a client sends. `Decoder` reads what a broker sends, in pieces of any size; it holds no more
than one packet up to its bound. Clauses are those of MQTT 5 unless another version is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from msgspec import Struct

from stationkey.mqtt.reason_codes import (
    CONNACK,
    DISCONNECT,
    FAILURE,
    MALFORMED_PACKET,
    NAMES,
    PROTOCOL_ERROR,
    PUBACK,
    RETURN_CODES,
    SUBACK,
    TOPIC_NAME_INVALID,
    UNSUBACK,
    UNSUPPORTED_VERSION,
)

V311: Final = 4
V5: Final = 5
"""Protocol versions, as CONNECT has them [3.1.2.2]."""

PINGREQ: Final = b"\xc0\0"
_CONNECT: Final = 0x10
_PUBLISH: Final = 0x30
_SUBSCRIBE: Final = 0x82
_UNSUBSCRIBE: Final = 0xA2
_PINGRESP: Final = 0xD0
_RETAIN, _QOS_1, _DUP = 0x01, 0x02, 0x08
_FROM_BROKER: Final = frozenset(
    {
        *(_PUBLISH | retain | qos for retain in (0, _RETAIN) for qos in (0, _QOS_1, _QOS_1 | _DUP)),
        *(CONNACK, PUBACK, SUBACK, UNSUBACK, _PINGRESP, DISCONNECT),
    }
)
"""First bytes, flags included, of the packets that a broker may send to a client that uses QoS 1 at most [2.1.2, 2.1.3,
3.3.1; 3.8.3.1]. A PUBLISH of QoS 2 would be kept until its PUBREL comes."""
_MOST_LENGTH: Final = 268_435_455
_MORE: Final = 0x80
"""Bit of a length byte that is followed by another, of at most four [1.5.5]."""

SESSION_EXPIRY: Final = 0x11
SERVER_KEEP_ALIVE: Final = 0x13
RECEIVE_MAXIMUM: Final = 0x21
MAXIMUM_QOS: Final = 0x24
RETAIN_AVAILABLE: Final = 0x25
MAXIMUM_PACKET_SIZE: Final = 0x27
"""Properties of a CONNACK that this client heeds [3.2.2.3]."""

_BYTE, _TWO_BYTES, _FOUR_BYTES, _VARIABLE, _BINARY, _TEXT, _PAIR = range(7)
_PROPERTIES: Final[dict[int, tuple[int, tuple[int, ...]]]] = {
    0x01: (_BYTE, (_PUBLISH,)),
    0x02: (_FOUR_BYTES, (_PUBLISH,)),
    0x03: (_TEXT, (_PUBLISH,)),
    0x08: (_TEXT, (_PUBLISH,)),
    0x09: (_BINARY, (_PUBLISH,)),
    0x0B: (_VARIABLE, (_PUBLISH,)),
    SESSION_EXPIRY: (_FOUR_BYTES, (CONNACK, DISCONNECT)),
    0x12: (_TEXT, (CONNACK,)),
    SERVER_KEEP_ALIVE: (_TWO_BYTES, (CONNACK,)),
    0x15: (_TEXT, (CONNACK,)),
    0x16: (_BINARY, (CONNACK,)),
    0x1A: (_TEXT, (CONNACK,)),
    0x1C: (_TEXT, (CONNACK, DISCONNECT)),
    0x1F: (_TEXT, (CONNACK, PUBACK, SUBACK, UNSUBACK, DISCONNECT)),
    RECEIVE_MAXIMUM: (_TWO_BYTES, (CONNACK,)),
    0x22: (_TWO_BYTES, (CONNACK,)),
    0x23: (_TWO_BYTES, (_PUBLISH,)),
    MAXIMUM_QOS: (_BYTE, (CONNACK,)),
    RETAIN_AVAILABLE: (_BYTE, (CONNACK,)),
    0x26: (_PAIR, (_PUBLISH, CONNACK, PUBACK, SUBACK, UNSUBACK, DISCONNECT)),
    MAXIMUM_PACKET_SIZE: (_FOUR_BYTES, (CONNACK,)),
    0x28: (_BYTE, (CONNACK,)),
    0x29: (_BYTE, (CONNACK,)),
    0x2A: (_BYTE, (CONNACK,)),
}
"""The properties that a broker may send: form, and packets that may have it [2.2.2.2]."""
_MAY_REPEAT: Final = (0x0B, 0x26)
_NOT_ZERO: Final = (0x0B, 0x23)
_FLAGS: Final = (0x01,)
"""Subscription Identifier and User Property; it and Topic Alias; Payload Format Indicator."""


class ProtocolViolation(Exception):
    """The broker violated the protocol.

    Args:
        code: reason code for the DISCONNECT [3.14.2.1].
        words: the violation, as text.
    """

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


class Connack(Struct, frozen=True):
    """The answer to CONNECT; in 3.1.1 the return code is given as the reason code that says the same."""

    session_present: bool
    code: int
    properties: dict[int, Any]

    @property
    def words(self) -> str:
        """The name of the code."""
        return NAMES[CONNACK][self.code]


class Publish(Struct, frozen=True):
    """A message; its identifier is 0 at QoS 0."""

    topic: str
    payload: bytes
    identifier: int
    qos: int
    retain: bool
    dup: bool


class Acknowledgement(Struct, frozen=True):
    """PUBACK, SUBACK or UNSUBACK, by `kind`; with the first code if there are several, and 0 where there is none."""

    kind: int
    identifier: int
    code: int

    @property
    def words(self) -> str:
        """The name of the code."""
        return NAMES[self.kind][self.code]


class Pingresp(Struct, frozen=True):
    """The answer to PINGREQ."""


class Disconnect(Struct, frozen=True):
    """The broker ends the connection."""

    code: int

    @property
    def words(self) -> str:
        """The name of the code."""
        return NAMES[DISCONNECT][self.code]


Packet = Connack | Publish | Acknowledgement | Pingresp | Disconnect


def connect(
    version: int,
    client_id: str,
    *,
    clean: bool,
    keep_alive: int,
    session_expiry: int = 0,
    receive_maximum: int = 65_535,
    will: tuple[str, bytes] | None = None,
    username: str | None = None,
    password: bytes | None = None,
) -> bytes:
    """Encode CONNECT [3.1].

    Args:
        version: `V5` or `V311`.
        client_id: client identifier.
        clean: begin a new session.
        keep_alive: seconds.
        session_expiry: seconds; MQTT 5 only.
        receive_maximum: messages of QoS 1 that may be unacknowledged; MQTT 5 only.
        will: topic and payload of a Last Will, retained, at QoS 1; or None.
        username: user name, or None.
        password: password, or None; not sent without a user name [3.1.1, 3.1.2.9].
    """
    flags = 0x02 * clean
    properties = no_properties = b""
    if version == V5:
        properties = b"\x08\x11%b\x21%b" % (session_expiry.to_bytes(4, "big"), receive_maximum.to_bytes(2, "big"))
        no_properties = b"\0"
    fields = _text(client_id)
    if will is not None:
        flags |= 0x04 | 0x08 | 0x20
        fields += no_properties + _text(will[0]) + _binary(will[1])
    if username is not None:
        flags |= 0x80
        fields += _text(username)
        if password is not None:
            flags |= 0x40
            fields += _binary(password)
    head = b"\0\4MQTT" + bytes([version, flags]) + keep_alive.to_bytes(2, "big")
    return _packet(_CONNECT, head + properties + fields)


def publish(version: int, topic: str, payload: bytes, *, identifier: int = 0, retain: bool = False) -> bytes:
    """Encode PUBLISH [3.3], at QoS 1 if it has a packet identifier, else at QoS 0.

    Raises:
        ValueError: topic or payload is too long, or the topic has a wildcard.
    """
    if "+" in topic or "#" in topic or not topic:
        raise ValueError("a topic to publish on is empty or has a wildcard")
    first = _PUBLISH | _RETAIN * retain
    middle = b"\0" if version == V5 else b""
    if identifier:
        first |= _QOS_1
        middle = identifier.to_bytes(2, "big") + middle
    return _packet(first, _text(topic) + middle + payload)


def puback(identifier: int) -> bytes:
    """Encode PUBACK for a message that was accepted [3.4]."""
    return b"\x40\x02" + identifier.to_bytes(2, "big")


def subscribe(version: int, topic_filter: str, *, identifier: int) -> bytes:
    """Encode SUBSCRIBE at QoS 1; in MQTT 5, retained messages come only for a new subscription [3.8.3.1]."""
    middle, options = (b"\0", b"\x11") if version == V5 else (b"", b"\x01")
    return _packet(_SUBSCRIBE, identifier.to_bytes(2, "big") + middle + _text(topic_filter) + options)


def unsubscribe(version: int, topic_filter: str, *, identifier: int) -> bytes:
    """Encode UNSUBSCRIBE [3.10]."""
    middle = b"\0" if version == V5 else b""
    return _packet(_UNSUBSCRIBE, identifier.to_bytes(2, "big") + middle + _text(topic_filter))


def disconnect(version: int, *, code: int = 0, forget: bool = False) -> bytes:
    """Encode DISCONNECT; in MQTT 5 with a reason code, and with `forget` to end the session [3.14]."""
    if version != V5:
        return b"\xe0\0"
    return _packet(DISCONNECT, bytes([code]) + (b"\x05\x11\0\0\0\0" if forget else b"\0"))


def packet_size(remaining: int) -> int:
    """Return the bytes of a packet by its Remaining Length [2.1.4]."""
    return 1 + max(1, (remaining.bit_length() + 6) // 7) + remaining


def _packet(first: int, body: bytes) -> bytes:
    length = len(body)
    if length < _MORE:
        return bytes((first, length)) + body
    if length > _MOST_LENGTH:
        raise ValueError("a packet of more than 256 MiB")
    head = bytearray((first,))
    while length >= _MORE:
        head.append(length & 0x7F | _MORE)
        length >>= 7
    head.append(length)
    return bytes(head) + body


def _text(text: str) -> bytes:
    return _binary(text.encode())


def _binary(data: bytes) -> bytes:
    if len(data) > 65_535:  # noqa: PLR2004 - of a Two Byte Integer [1.5.2]
        raise ValueError("a text of more than 64 KiB")
    return len(data).to_bytes(2, "big") + data


class Decoder:
    """Reads the packets of one connection.

    A packet may be 256 MiB [1.5.5, 3.1.1 2.2.3]. Disconnecting does not help: the broker redelivers a QoS 1 message at
    each connection. So one that is too large is read as if it ended at the bound, and its rest is discarded. Topic and
    packet identifier of a PUBLISH come first, so it can still be acknowledged. For MQTT 5's Maximum Packet Size
    [3.1.2.11.4] see `stationkey.mqtt.bounds.PACKET_MARGIN`.

    Args:
        version: `V5` or `V311`.
        most: largest packet in bytes, without its fixed header.
    """

    def __init__(self, version: int, most: int) -> None:
        self._v5 = version == V5
        self._most = most
        self._head = b""
        """The beginning of a fixed header."""
        self._first = 0
        self._body = bytearray()
        self._missing = 0
        """First byte of a packet that has not arrived whole, its bytes so far, and how many are missing."""
        self._surplus = 0
        """Bytes to discard after it."""
        self._greeted = False

    @property
    def held(self) -> int:
        """Bytes of a packet that has not arrived whole."""
        return len(self._head) + len(self._body)

    def packets(self, data: bytes) -> Iterator[Packet]:
        """Return the packets that are complete with these bytes, in order.

        Args:
            data: the next bytes of the stream.

        Raises:
            ProtocolViolation: the broker must not send this. Nothing can be read any more.
        """
        data, at, end = self._head + data, 0, len(self._head) + len(data)
        self._head = b""
        while True:
            if self._missing:
                piece = data[at : at + self._missing]
                at += len(piece)
                self._missing -= len(piece)
                self._body += piece
                if self._missing:
                    return
                body, self._body = bytes(self._body), bytearray()
                yield self._decode(self._first, body)
            if self._surplus:
                passed = min(self._surplus, end - at)
                at += passed
                self._surplus -= passed
            if at == end:
                return
            first = data[at]
            if first not in _FROM_BROKER:
                raise ProtocolViolation(PROTOCOL_ERROR, f"a packet that begins with 0x{first:02x}")
            try:
                length, begin = _variable(data, at + 1)
            except IndexError:  # it has not arrived whole
                self._head = data[at:]
                return
            except ValueError:
                raise ProtocolViolation(MALFORMED_PACKET, "a length of more than four bytes") from None
            kept = min(length, self._most)
            self._surplus = length - kept
            at = begin + kept
            if at <= end:
                yield self._decode(first, data[begin:at])
                continue
            self._first, self._body, self._missing = first, bytearray(data[begin:]), at - end
            return

    def _decode(self, first: int, body: bytes) -> Packet:
        if (first == CONNACK) is self._greeted:  # CONNACK is the first packet, and only that [MQTT-3.2.0-1, 3.2.0-2]
            raise ProtocolViolation(PROTOCOL_ERROR, "a second CONNACK" if self._greeted else "a packet before CONNACK")
        self._greeted = True
        try:
            if first & 0xF0 == _PUBLISH:
                return self._publish(first, body)
            if first == CONNACK:
                return self._connack(body)
            if first == _PINGRESP:
                _end(body, 0)
                return Pingresp()
            if first == DISCONNECT:
                return self._disconnect(body)
            return self._acknowledgement(first, body)
        except (IndexError, ValueError) as error:  # the packet is shorter than it says, or a text is not UTF-8
            raise ProtocolViolation(MALFORMED_PACKET, f"a malformed packet of type {first >> 4}: {error}") from None

    def _publish(self, first: int, body: bytes) -> Publish:
        at = 2 + (body[0] << 8 | body[1])
        topic = _utf8(body, 2, at)
        qos = first >> 1 & 3
        identifier = 0
        if qos:
            identifier = body[at] << 8 | body[at + 1]
            at += 2
        if self._v5:
            if body[at]:
                _, at = _properties(body, at, _PUBLISH)
            else:
                at += 1
        if not topic:  # there are no aliases [3.3.2.3.4]
            raise ProtocolViolation(PROTOCOL_ERROR if self._v5 else MALFORMED_PACKET, "a PUBLISH without a topic")
        if "+" in topic or "#" in topic or "\0" in topic:
            raise ProtocolViolation(TOPIC_NAME_INVALID, "a PUBLISH whose topic has a wildcard")
        if qos and not identifier:
            raise ProtocolViolation(PROTOCOL_ERROR, "a packet identifier of 0")  # [MQTT-2.2.1-3]
        return Publish(topic, body[at:], identifier, qos, bool(first & _RETAIN), bool(first & _DUP))

    def _connack(self, body: bytes) -> Connack:
        flags, code = body[0], body[1]
        properties: dict[int, Any] = {}
        if not self._v5:
            _end(body, 2)
            code = RETURN_CODES.get(code, FAILURE) if code else 0
        elif code == 1:  # of a broker that knows only 3.1.1
            code = UNSUPPORTED_VERSION
        else:
            _known(CONNACK, code)
            if len(body) > 2 or not code:  # noqa: PLR2004 - flags and code
                properties, at = _properties(body, 2, CONNACK)
                _end(body, at)
        return Connack(bool(flags & 1), code, properties)

    def _acknowledgement(self, kind: int, body: bytes) -> Acknowledgement:
        identifier, codes = body[0] << 8 | body[1], body[2:]
        if self._v5 and kind == PUBACK:
            if len(codes) > 1:
                _, at = _properties(codes, 1, PUBACK)
                _end(codes, at)
            codes = codes[:1] or b"\0"
        elif self._v5:
            _, at = _properties(codes, 0, kind)
            codes = codes[at:]
        elif kind != SUBACK:
            _end(body, 2)
            codes = b"\0"
        for code in codes:
            _known(kind, code)
        return Acknowledgement(kind, identifier, codes[0])

    def _disconnect(self, body: bytes) -> Disconnect:
        if not self._v5:
            raise ProtocolViolation(PROTOCOL_ERROR, "a DISCONNECT in MQTT 3.1.1")
        if not body:
            return Disconnect(0)
        _known(DISCONNECT, body[0])
        if len(body) > 1:
            _, at = _properties(body, 1, DISCONNECT)
            _end(body, at)
        return Disconnect(body[0])


def _known(kind: int, code: int) -> None:
    if code not in NAMES[kind]:
        raise ValueError(f"the reason code 0x{code:02x}")


def _end(body: bytes, at: int) -> None:
    if len(body) != at:
        raise ValueError("its length")


def _utf8(body: bytes, begin: int, end: int) -> str:
    if end > len(body):
        raise ValueError("its length")
    return body[begin:end].decode()


def _properties(body: bytes, at: int, kind: int) -> tuple[dict[int, Any], int]:
    """Read the properties at an offset [2.2.2]; return them by identifier, and the offset of what follows."""
    length, at = _variable(body, at)
    end = at + length
    if end > len(body):
        raise ValueError("the length of its properties")
    body = body[:end]
    found: dict[int, Any] = {}
    while at < end:
        identifier, at = _variable(body, at)
        form, kinds = _PROPERTIES.get(identifier, (0, ()))
        if kind not in kinds or (identifier in found and identifier not in _MAY_REPEAT):
            raise ValueError(f"the property 0x{identifier:02x}")
        value, at = _value(body, at, form)
        if (identifier in _NOT_ZERO and not value) or (identifier in _FLAGS and value > 1):
            raise ValueError(f"the value of the property 0x{identifier:02x}")
        found[identifier] = value
    return found, at


def _value(body: bytes, at: int, form: int) -> tuple[Any, int]:
    """Read the value of a property; return it, and the offset of what follows."""
    if form == _VARIABLE:
        return _variable(body, at)
    if form in {_BYTE, _TWO_BYTES, _FOUR_BYTES}:
        end = at + (1, 2, 4)[form]
        if end > len(body):
            raise ValueError("the length of a property")
        return int.from_bytes(body[at:end], "big"), end
    begin = at + 2
    end = begin + (body[at] << 8 | body[at + 1])
    if form == _BINARY:
        if end > len(body):
            raise ValueError("the length of a property")
        return body[begin:end], end
    text = _utf8(body, begin, end)
    if "\0" in text:
        raise ValueError("a NUL in a text")
    return _value(body, end, _TEXT) if form == _PAIR else (text, end)


def _variable(body: bytes, at: int) -> tuple[int, int]:
    """Read a Variable Byte Integer; return it, and the offset of what follows [1.5.5]."""
    number = 0
    for shift in (0, 7, 14, 21):
        byte = body[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < _MORE:
            return number, at
    raise ValueError("a number of more than four bytes")
