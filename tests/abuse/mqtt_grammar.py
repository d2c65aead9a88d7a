"""Sessions of an MQTT broker that means harm, drawn from a seed.

A session is what the broker does on one connection: how it answers CONNECT, SUBSCRIBE and PUBLISH, and the packets that
it sends besides, legal and not, in any order and state. It can be written down as JSON, and cut to fewer packets.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Self

from flood import packet, request, status, text, wire

V311: Final = 4
V5: Final = 5

CONNACK, PUBLISH, PUBACK, SUBACK, UNSUBACK, PINGRESP, DISCONNECT = 0x20, 0x30, 0x40, 0x90, 0xB0, 0xD0, 0xE0
RESPONSES: Final = ("right", "right", "right", "silent", "wrong id", "twice", "wrong type", "refused", "half")
"""What becomes of a packet that the daemon sends; mostly the answer that it should get."""


@dataclass(frozen=True)
class Step:
    """Bytes that are sent.

    Attributes:
        data: the bytes, in hexadecimal.
        times: how often.
        number_at: offset of a packet identifier that is counted up with each time; -1 for none.
        drip: whether each byte is sent for itself.
        deaf: whether nothing is read meanwhile.
    """

    data: str
    times: int = 1
    number_at: int = -1
    drip: bool = False
    deaf: bool = False

    def packets(self) -> list[bytes]:
        """The bytes of each time; their total is bounded."""
        data = bytes.fromhex(self.data)
        times = max(1, min(self.times, MOST // max(1, len(data))))
        if self.number_at < 0:
            return [data] * times
        front, back = data[: self.number_at], data[self.number_at + 2 :]
        return [front + (1 + number % 65_535).to_bytes(2, "big") + back for number in range(times)]


MOST: Final = 24 * 1024 * 1024
"""Bytes of a step."""


@dataclass(frozen=True)
class Session:
    """What the broker does on one connection.

    Attributes:
        level: of MQTT that it speaks.
        connack: sent on CONNECT, in hexadecimal.
        subscribe: how SUBSCRIBE and UNSUBSCRIBE are answered; one of `RESPONSES`.
        publish: how PUBLISH is answered.
        steps: what is sent besides, after SUBACK or at once.
        early: whether the steps do not wait for SUBSCRIBE.
        end: ``fin``, ``rst`` or ``left``: how the connection ends, or that it is left open.
    """

    level: int = V5
    connack: str = ""
    subscribe: str = "right"
    publish: str = "right"
    steps: tuple[Step, ...] = ()
    early: bool = False
    end: str = "fin"

    @property
    def properties(self) -> bytes:
        """Empty properties, where the version has them."""
        return b"\0" if self.level == V5 else b""

    def encoded(self) -> str:
        """As JSON, for the corpus."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def decoded(cls, encoded: str) -> Self:
        """From the corpus."""
        fields: dict[str, Any] = json.loads(encoded)
        return cls(**{**fields, "steps": tuple(Step(**step) for step in fields["steps"])})

    def smaller(self) -> list[Session]:
        """This session with less in it, the smallest first."""
        plain = replace(self, connack="", subscribe="right", publish="right", early=False)
        half = len(self.steps) // 2
        shorter = [replace(self, steps=self.steps[:half]), replace(self, steps=self.steps[half:])] if half else []
        without = [replace(self, steps=self.steps[:at] + self.steps[at + 1 :]) for at in range(len(self.steps))]
        fewer = [
            replace(self, steps=(*self.steps[:at], simpler, *self.steps[at + 1 :]))
            for at, step in enumerate(self.steps)
            for simpler in (
                replace(step, times=1),
                replace(step, times=max(1, step.times // 2)),
                replace(step, drip=False),
                replace(step, deaf=False),
            )
            if simpler != step
        ]
        return [session for session in (*shorter, plain, *without, *fewer) if session != self]


@dataclass
class Grammar:
    """Draws sessions.

    Args:
        seed: the same seed draws the same sessions.
    """

    seed: int
    chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        """Begin with the seed."""
        self.chance = random.Random(self.seed)

    def session(self) -> Session:
        """Draw the next session."""
        chance = self.chance
        level = chance.choice([V311, V5, V5])
        session = Session(level=level)
        return Session(
            level=level,
            connack=self._connack(session).hex() if chance.random() < 0.25 else "",
            subscribe=chance.choice(RESPONSES) if chance.random() < 0.3 else "right",
            publish=chance.choice(RESPONSES) if chance.random() < 0.4 else "right",
            steps=tuple(self._step(session) for _ in range(chance.randint(0, 8))),
            early=chance.random() < 0.15,
            end=chance.choice(["fin", "fin", "rst", "left"]),
        )

    def _step(self, session: Session) -> Step:
        chance = self.chance
        kind = chance.random()
        if kind < 0.35:
            data = self._likely(session)
        elif kind < 0.75:
            data = self._any_packet(session)
        elif kind < 0.95:
            data = self._damaged(self._any_packet(session))
        else:
            data = chance.randbytes(chance.choice([1, 2, 7, 64, 3000]))
        times, number_at = 1, -1
        if chance.random() < 0.12:
            times = chance.choice([2, 70, 2000, 40_000])
            number_at = identifier_at(data)
        drip = len(data) * times < 600 and chance.random() < 0.15
        return Step(data.hex(), times, number_at, drip, deaf=times > 2 and chance.random() < 0.5)

    def _id(self) -> str:
        return str(uuid.UUID(int=self.chance.getrandbits(128), version=4))

    # Packets.

    def _likely(self, session: Session) -> bytes:
        """A PUBLISH as Josev's, or nearly."""
        chance = self.chance
        payloads: list[Callable[[], bytes]] = [
            lambda: wire(request(self._id())),
            lambda: wire(request(self._id())),
            lambda: wire(request(self._id(), common_name="x" * chance.choice([64, 65, 70_000]))),
            lambda: wire(
                request(self._id(), certificate_type=chance.choice(["v2g_certificate", "v2g20_certificate", "x"]))
            ),
            lambda: wire({**status(status=chance.choice(["installed", "deleted", "x"])), "id": self._id()}),
            lambda: b"",
            lambda: chance.randbytes(chance.choice([1, 100, 65_536, 140_000])),
            lambda: b"[" * chance.choice([10, 60_000]),
        ]
        payload = chance.choice(payloads)()
        identifier = chance.choice([1, 1, 2, 7, 65_535, chance.randint(1, 65_535)])
        head = PUBLISH | chance.choice([2, 2, 2, 0, 0x0A, 0x03])
        return publish(session, "josev/cs", payload, identifier, head=head, properties=self._properties(session))

    def _any_packet(self, session: Session) -> bytes:  # noqa: PLR0911 - a table whose cells draw
        """A packet of any type, with any flags, legal or not."""
        chance = self.chance
        identifier = chance.choice([0, 1, 2, 3, 7, 65_535]).to_bytes(2, "big")
        reason = chance.choice([0, 0x10, 0x80, 0x87, 0x97, chance.randrange(256)])
        properties = self._properties(session)
        match chance.randrange(12):
            case 0 | 1 | 2:
                topic = self._topic()
                body = len(topic).to_bytes(2, "big") + topic + identifier * chance.choice([0, 1, 1]) + properties
                body += chance.choice(
                    [b"", b"{}", wire(request(self._id())), bytes(chance.choice([10, 70_000, 300_000]))]
                )
                return packet(PUBLISH | chance.randrange(16), body)
            case 3:
                return self._connack(session)
            case 4 | 5:
                return packet(PUBACK, identifier + chance.choice([b"", bytes([reason]), bytes([reason]) + properties]))
            case 6:
                reasons = bytes(chance.randrange(256) for _ in range(chance.choice([0, 1, 1, 2, 100])))
                return packet(chance.choice([SUBACK, UNSUBACK]), identifier + properties + reasons)
            case 7:
                return packet(PINGRESP, chance.choice([b"", b"", b"\0", bytes(200)]))
            case 8:
                body = chance.choice([b"", bytes([reason]), bytes([reason]) + properties])
                return packet(DISCONNECT, body)
            case 9:
                return packet(0xF0, chance.choice([b"", b"\x18" + properties, bytes([reason])]))
            case 10:
                return packet(chance.choice([0x50, 0x62, 0x70]), identifier + chance.choice([b"", bytes([reason])]))
            case _:
                body = chance.choice([b"", b"\0\4MQTT\5\2\0\0\0\0\0", b"\0\1\0\0\1a\1", chance.randbytes(9)])
                return packet(chance.randrange(256), body)

    def _connack(self, session: Session) -> bytes:
        chance = self.chance
        code = chance.choice([0, 0, 0, 0, 1, 3, 0x80, 0x84, 0x87, 0x8A, chance.randrange(256)])
        flags = chance.choice([0, 0, 1, chance.randrange(256)])
        grants = b"".join(
            chance.choice(
                [
                    b"\x21" + chance.choice([0, 1, 2, 65_535]).to_bytes(2, "big"),  # Receive Maximum
                    b"\x24" + bytes([chance.choice([0, 1, 2, 255])]),  # Maximum QoS
                    b"\x25" + bytes([chance.choice([0, 1, 2])]),  # Retain Available
                    b"\x27" + chance.choice([0, 1, 20, 200, 2**32 - 1]).to_bytes(4, "big"),  # Maximum Packet Size
                    b"\x22" + chance.choice([0, 1, 65_535]).to_bytes(2, "big"),  # Topic Alias Maximum
                    b"\x13" + chance.choice([0, 1, 65_535]).to_bytes(2, "big"),  # Server Keep Alive
                    b"\x11" + chance.choice([0, 2**32 - 1]).to_bytes(4, "big"),  # Session Expiry Interval
                    b"\x12" + text("another-id"),  # Assigned Client Identifier
                    b"\x15" + text("SCRAM-SHA-1"),  # Authentication Method
                    b"\x28" + bytes([chance.choice([0, 1, 2])]),  # Wildcard Subscription Available
                ]
            )
            for _ in range(chance.choice([0, 1, 1, 2, 4]))
        )
        body = bytes([flags, code]) + (_with_length(grants) if session.level == V5 else b"")
        return packet(CONNACK, body) * chance.choice([1, 1, 1, 2])

    def _topic(self) -> bytes:
        chance = self.chance
        return chance.choice(
            [b"josev/cs"] * 6
            + [b"", b"cs/josev", b"josev/#", b"+", b"$SYS/x", b"josev/cs\0", b"\xed\xa0\x80", b"\xff", b"a" * 60_000]
            + [b"josev/other", "josev/ü".encode(), b"$share/g/josev/cs", chance.randbytes(5)]
        )

    def _properties(self, session: Session) -> bytes:
        """Properties with their length, legal for a PUBLISH or not."""
        chance = self.chance
        if session.level != V5:
            return b""
        if chance.random() < 0.5:
            return b"\0"
        known = [
            b"\x01\x01",  # Payload Format Indicator
            b"\x02\0\0\0\x05",  # Message Expiry Interval
            b"\x23" + chance.choice([0, 1, 65_535]).to_bytes(2, "big"),  # Topic Alias
            b"\x08" + text("cs/josev"),  # Response Topic
            b"\x09\0\4abcd",  # Correlation Data
            b"\x0b\x01",  # Subscription Identifier
            b"\x03" + text("application/json"),  # Content Type
            b"\x26" + text("k") + text("v" * chance.choice([0, 1, 900])),  # User Property
            b"\x1f" + text("why"),  # Reason String
            b"\x1c" + text("elsewhere"),  # Server Reference
            b"\x11\0\0\0\0",  # Session Expiry Interval
            b"\x7f\0",  # no property
            b"\x26\0\1k\0\2\xff\xff",  # not UTF-8
        ]
        drawn = b"".join(chance.choice(known) for _ in range(chance.choice([1, 1, 2, 5, 60])))
        lie = chance.choice([0, 0, 0, 0, 1, -1, 100])
        return _with_length(drawn, lie=lie)

    def _damaged(self, data: bytes) -> bytes:
        """A packet with bits flipped, cut, or with another length."""
        chance = self.chance
        match chance.randrange(5):
            case 0:
                at = chance.randrange(len(data))
                return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
            case 1:
                return data[: chance.randrange(len(data))] or b"\x30"
            case 2:
                body = data[2:][:1000]
                return data[:1] + chance.choice([b"\x80\x80\x80\x80\x01", b"\xff\xff\xff\x7f", b"\x80\0"]) + body
            case 3:
                return packet(data[0], data[2:200], filler=chance.choice([1, 100, 300_000]))
            case _:
                return data + chance.randbytes(chance.choice([1, 2, 5]))


def publish(
    session: Session, topic: str, payload: bytes, identifier: int, *, head: int = 0x32, properties: bytes | None = None
) -> bytes:
    """A PUBLISH."""
    number = identifier.to_bytes(2, "big") if head & 0x06 else b""
    return packet(head, text(topic) + number + (session.properties if properties is None else properties) + payload)


def _with_length(properties: bytes, *, lie: int = 0) -> bytes:
    length, digits = max(0, len(properties) + lie), bytearray()
    while True:
        length, digit = divmod(length, 128)
        digits.append(digit | (128 if length else 0))
        if not length:
            return bytes(digits) + properties


def identifier_at(data: bytes) -> int:
    """Return the offset of the packet identifier of a PUBLISH; -1 where there is none."""
    if not data or data[0] & 0xF0 != PUBLISH or not data[0] & 0x06:
        return -1
    front = 1
    while front < len(data) and data[front] & 128:
        front += 1
    front += 1
    at = front + 2 + int.from_bytes(data[front : front + 2], "big")
    return at if at + 2 <= len(data) else -1
