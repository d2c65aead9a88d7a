"""MQTT packets as bytes: what is sent is what paho sends; what comes is read, cut, or refused by its reason code."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mqtt_packets import (
    CONNACK,
    DISCONNECT,
    PINGRESP,
    PUBACK,
    PUBLISH,
    SUBACK,
    UNSUBACK,
    VERSIONS,
    greeting,
    identifiers,
    length,
    packet,
    packets,
    properties,
    read_by_paho,
    text,
    topics,
)

from stationkey.mqtt import codec
from stationkey.mqtt.codec import V5, V311, Connack, Decoder, Packet, ProtocolViolation, Publish

MOST = 200
versions = st.sampled_from(VERSIONS)
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""How fast it is on a busy machine is no part of what these state."""


def greeted(version: int, most: int = MOST) -> Decoder:
    """A decoder that has read a CONNACK."""
    decoder = Decoder(version, most)
    assert list(decoder.packets(greeting(version))) == [Connack(False, 0, {})]
    return decoder


def read(decoder: Decoder, *pieces: bytes) -> list[Packet]:
    return [found for piece in pieces for found in decoder.packets(piece)]


# What is read.


@unhurried
@given(data=st.data(), version=versions, cuts=st.lists(st.integers(1, 400), max_size=20))
def test_what_a_broker_says_is_read_however_it_comes(data: st.DataObject, version: int, cuts: list[int]) -> None:
    drawn = data.draw(st.lists(packets(version), max_size=6))
    sent = b"".join(encoded for encoded, _ in drawn)
    places = [0, *sorted(cut for cut in cuts if cut < len(sent)), len(sent)]
    pieces = [sent[begin:end] for begin, end in itertools.pairwise(places)]

    assert read(greeted(version, 4096), *pieces) == [said for _, said in drawn]


@unhurried
@given(data=st.data(), version=versions)
def test_paho_reads_the_same(data: st.DataObject, version: int) -> None:
    encoded, said = data.draw(packets(version))
    begin = 2 if encoded[1] < 128 else 3
    assert read_by_paho(version, encoded[0], encoded[begin:]) == said


@unhurried
@given(data=st.data(), present=st.booleans())
def test_a_connack_is_read_with_its_properties(data: st.DataObject, present: bool) -> None:
    has = data.draw(properties(CONNACK))
    body = bytes([present, 0]) + has
    [found] = read(Decoder(V5, 4096), packet(CONNACK, body))
    expected = read_by_paho(V5, CONNACK, body)
    assert isinstance(found, Connack)
    assert isinstance(expected, Connack)
    found.properties.pop(0x26, None)
    assert found == expected


@pytest.mark.parametrize(("version", "code"), [*((V5, code) for code in (1, 0x84)), (V311, 1)])
def test_a_broker_of_another_version_is_understood(version: int, code: int) -> None:
    [found] = read(Decoder(version, MOST), packet(CONNACK, bytes([0, code])))
    assert isinstance(found, Connack)
    assert (found.code, found.words) == (0x84, "Unsupported protocol version")


def test_an_unknown_return_code_of_3_1_1_is_a_refusal() -> None:
    [found] = read(Decoder(V311, MOST), packet(CONNACK, b"\0\x63"))
    assert isinstance(found, Connack)
    assert found.code == 0x80


# What is sent.


@unhurried
@given(version=versions, topic=topics, payload=st.binary(max_size=300), identifier=identifiers, retain=st.booleans())
def test_a_message_comes_back_as_it_was_sent(
    version: int, topic: str, payload: bytes, identifier: int, retain: bool
) -> None:
    sent = codec.publish(version, topic, payload, identifier=identifier, retain=retain)
    once = codec.publish(version, topic, payload, retain=retain)

    assert read(greeted(version, 4096), sent + once) == [
        Publish(topic, payload, identifier, 1, retain, False),
        Publish(topic, payload, 0, 0, retain, False),
    ]
    assert read(greeted(version), codec.puback(identifier)) == [codec.Acknowledgement(PUBACK, identifier, 0)]


@pytest.mark.parametrize("topic", ["", "a/+", "#", "x" * 65_536])
def test_no_packet_is_made_of_what_is_no_topic(topic: str) -> None:
    with pytest.raises(ValueError, match=r"topic|text"):
        codec.publish(V5, topic, b"")


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152])
def test_the_length_is_written_as_the_standard_has_it(size: int) -> None:
    sent = codec.publish(V311, "t", bytes(size))
    assert sent == packet(PUBLISH, b"\0\1t" + bytes(size))
    assert len(sent) == codec.packet_size(3 + size)


# What is cut.


@unhurried
@given(
    bodies=st.lists(st.binary(max_size=MOST * 3), max_size=5),
    cuts=st.lists(st.integers(1, 3000), max_size=20),
)
def test_each_packet_is_let_through_up_to_the_bound_however_it_comes(bodies: list[bytes], cuts: list[int]) -> None:
    front = text("t") + b"\0\7\0"
    sent = b"".join(packet(0x32, front + body) for body in bodies)
    places = [0, *sorted(cut for cut in cuts if cut < len(sent)), len(sent)]
    pieces = [sent[begin:end] for begin, end in itertools.pairwise(places)]

    assert read(greeted(V5), *pieces) == [
        Publish("t", (front + body)[len(front) : MOST], 7, 1, False, False) for body in bodies
    ]


def test_what_is_cut_off_is_never_held_together() -> None:
    left = 268_435_455
    decoder, found, piece = greeted(V5), list[Packet](), bytes(64 * 1024)
    found += read(decoder, b"\x32" + length(left) + b"\0\1t\0\7\0")
    left -= 6
    while left:
        part = piece[:left]
        left -= len(part)
        found += read(decoder, part)
        assert decoder.held < MOST
    assert found == [Publish("t", bytes(MOST - 6), 7, 1, False, False)]
    assert read(decoder, packet(PINGRESP, b"")) == [codec.Pingresp()]


def test_what_is_cut_can_be_acknowledged_before_its_rest_comes() -> None:
    front = b"\0\1t\0\7\0"
    [found] = read(greeted(V5), b"\x32" + length(268_435_455) + front + bytes(MOST - len(front)))
    assert isinstance(found, Publish)
    assert found.identifier == 7


def test_a_packet_is_held_up_to_the_bound_and_not_beyond_it() -> None:
    decoder = greeted(V5)
    for byte in b"\x32" + length(100_000) + b"\0\1t\0\7\0" + bytes(MOST):
        read(decoder, bytes([byte]))
        assert decoder.held <= MOST


# What is refused.

MALFORMED, PROTOCOL, TOPIC = 0x81, 0x82, 0x90
both = pytest.mark.parametrize("version", VERSIONS)


@both
@pytest.mark.parametrize(
    ("sent", "code"),
    [
        pytest.param(packet(0x34, text("t") + b"\0\1\0"), PROTOCOL, id="QoS 2"),
        pytest.param(packet(0x36, text("t") + b"\0\1\0"), PROTOCOL, id="QoS 3"),
        pytest.param(packet(0x38, text("t") + b"\0"), PROTOCOL, id="DUP at QoS 0"),
        pytest.param(packet(0x62, b"\0\1"), PROTOCOL, id="PUBREL"),
        pytest.param(packet(0x10, b""), PROTOCOL, id="CONNECT"),
        pytest.param(packet(0xC0, b""), PROTOCOL, id="PINGREQ"),
        pytest.param(packet(0xF0, b""), PROTOCOL, id="AUTH"),
        pytest.param(packet(0x41, b"\0\1"), PROTOCOL, id="PUBACK with flags"),
        pytest.param(packet(CONNACK, b"\0\0\0"), PROTOCOL, id="a second CONNACK"),
        pytest.param(packet(0x32, text("t") + b"\0\0\0"), PROTOCOL, id="identifier 0"),
        pytest.param(packet(0x32, text("a/#") + b"\0\1\0"), TOPIC, id="wildcard #"),
        pytest.param(packet(0x30, text("a/+") + b"\0"), TOPIC, id="wildcard +"),
        pytest.param(packet(0x30, text("a\0") + b"\0"), TOPIC, id="NUL in a topic"),
        pytest.param(packet(0x30, b"\0\1\xff\0"), MALFORMED, id="topic not UTF-8"),
        pytest.param(packet(0x30, b"\0\3\xed\xa0\x80\0"), MALFORMED, id="topic with half a character"),
        pytest.param(packet(0x30, b"\0\7t"), MALFORMED, id="topic beyond the end"),
        pytest.param(packet(0x32, b"\0\1t\0"), MALFORMED, id="half an identifier"),
        pytest.param(packet(0x30, b"\0"), MALFORMED, id="half a length"),
        pytest.param(packet(0x30, b""), MALFORMED, id="an empty PUBLISH"),
        pytest.param(packet(PUBACK, b"\0"), MALFORMED, id="a short PUBACK"),
        pytest.param(packet(PUBACK, b"\0\1\x42\0"), MALFORMED, id="PUBACK with an unknown code"),
        pytest.param(packet(SUBACK, b"\0\1"), MALFORMED, id="SUBACK without a code"),
        pytest.param(packet(SUBACK, b"\0\1\x42"), MALFORMED, id="SUBACK with an unknown code"),
        pytest.param(packet(UNSUBACK, b"\0"), MALFORMED, id="a short UNSUBACK"),
        pytest.param(packet(PINGRESP, b"\0"), MALFORMED, id="PINGRESP with a body"),
        pytest.param(b"\x30\xff\xff\xff\xff", MALFORMED, id="a length of five bytes"),
    ],
)
def test_what_a_broker_must_not_send_is_refused_by_its_code(version: int, sent: bytes, code: int) -> None:
    with pytest.raises(ProtocolViolation) as refused:
        read(greeted(version), sent)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        pytest.param(packet(0x30, b"\0\0\0"), PROTOCOL, id="no topic"),
        pytest.param(packet(0x30, b"\0\0\3\x23\0\1"), PROTOCOL, id="no topic, but an alias"),
        pytest.param(packet(0x30, text("t")), MALFORMED, id="no properties"),
        pytest.param(packet(0x30, text("t") + b"\5"), MALFORMED, id="properties beyond the end"),
        pytest.param(packet(0x30, text("t") + b"\xff\xff\xff\xff\1"), MALFORMED, id="properties without an end"),
        pytest.param(packet(0x30, text("t") + b"\2\x7f\0"), MALFORMED, id="an unknown property"),
        pytest.param(packet(0x30, text("t") + b"\5\x11\0\0\0\0"), MALFORMED, id="a property of another packet"),
        pytest.param(packet(0x30, text("t") + b"\4\1\0\1\0"), MALFORMED, id="a property twice"),
        pytest.param(packet(0x30, text("t") + b"\2\1\2"), MALFORMED, id="a flag of 2"),
        pytest.param(packet(0x30, text("t") + b"\3\x23\0\0"), MALFORMED, id="an alias of 0"),
        pytest.param(packet(0x30, text("t") + b"\3\2\0\0"), MALFORMED, id="half a property"),
        pytest.param(packet(0x30, text("t") + b"\5\3\0\7ab"), MALFORMED, id="a text beyond its properties"),
        pytest.param(packet(0x30, text("t") + b"\4\3\0\1\0"), MALFORMED, id="NUL in a property"),
        pytest.param(packet(PUBACK, b"\0\1\0\0\0"), MALFORMED, id="more after the properties"),
        pytest.param(packet(SUBACK, b"\0\1\0"), MALFORMED, id="SUBACK without a code, but properties"),
        pytest.param(packet(DISCONNECT, b"\x42"), MALFORMED, id="DISCONNECT with an unknown code"),
    ],
)
def test_what_mqtt_5_forbids_is_refused_by_its_code(sent: bytes, code: int) -> None:
    with pytest.raises(ProtocolViolation) as refused:
        read(greeted(V5), sent)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        pytest.param(packet(0x30, b"\0\0"), MALFORMED, id="no topic"),
        pytest.param(packet(DISCONNECT, b""), PROTOCOL, id="DISCONNECT"),
        pytest.param(packet(PUBACK, b"\0\1\0"), MALFORMED, id="a long PUBACK"),
        pytest.param(packet(UNSUBACK, b"\0\1\0"), MALFORMED, id="a long UNSUBACK"),
    ],
)
def test_what_mqtt_3_1_1_forbids_is_refused_by_its_code(sent: bytes, code: int) -> None:
    with pytest.raises(ProtocolViolation) as refused:
        read(greeted(V311), sent)
    assert refused.value.code == code


@both
@pytest.mark.parametrize("sent", [packet(PINGRESP, b""), packet(0x30, text("t") + b"\0"), packet(PUBACK, b"\0\1")])
def test_nothing_comes_before_connack(version: int, sent: bytes) -> None:
    with pytest.raises(ProtocolViolation) as refused:
        read(Decoder(version, MOST), sent)
    assert refused.value.code == PROTOCOL


@pytest.mark.parametrize(
    ("version", "body"),
    [(V5, b""), (V5, b"\0"), (V5, b"\0\0"), (V5, b"\0\x42\0"), (V311, b"\0"), (V311, b"\0\0\0")],
)
def test_a_connack_that_is_none_is_refused(version: int, body: bytes) -> None:
    with pytest.raises(ProtocolViolation) as refused:
        read(Decoder(version, MOST), packet(CONNACK, body))
    assert refused.value.code == MALFORMED


def test_what_came_before_a_violation_is_read() -> None:
    stream = greeted(V5).packets(packet(PINGRESP, b"") + b"\x62\0")
    assert next(stream) == codec.Pingresp()
    with pytest.raises(ProtocolViolation):
        next(stream)


def test_the_words_of_a_code_are_those_of_its_packet() -> None:
    assert codec.Disconnect(0).words == "Normal disconnection"
    assert codec.Acknowledgement(PUBACK, 1, 0x97).words == "Quota exceeded"
    assert codec.Acknowledgement(SUBACK, 1, 1).words == "Granted QoS 1"
