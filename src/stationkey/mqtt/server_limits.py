"""The limits of a broker's CONNACK [MQTT 5 3.2.2.3], and the reason codes of its PUBACK [MQTT 5 3.4.2.1]."""

from __future__ import annotations

from typing import Any, Final, Self

from msgspec import Struct

from stationkey.errors import BrokerError
from stationkey.mqtt.paho_client import PROTOCOL_ERROR, ProtocolViolation

_PUBLISH_OVERHEAD: Final = 2 + 2 + 1
"""Bytes of a PUBLISH beside topic and payload: length of the topic, packet identifier, no properties [3.3]."""
_NOT_AUTHORIZED: Final = 0x87
_QUOTA_EXCEEDED: Final = 0x97


class ServerLimits(Struct, frozen=True):
    """The limits for the client; the defaults are those of a CONNACK without limits, and of 3.1.1.

    Attributes:
        maximum_packet_size: bytes of a whole packet [MQTT-3.2.2-15]; None for no limit.
        maximum_qos: of a PUBLISH, 0 to 2 [MQTT-3.2.2-11].
        retain_available: whether a PUBLISH may be retained [MQTT-3.2.2-14].
        receive_maximum: PUBLISH packets of QoS 1 that may be unacknowledged [3.2.2.3.3].
        session_expiry: seconds that the session is kept; None if as requested [3.2.2.3.2].

    Raises:
        ProtocolViolation: a limit of 0, which is a protocol error [3.2.2.3.3, 3.2.2.3.6].
    """

    maximum_packet_size: int | None = None
    maximum_qos: int = 2
    retain_available: bool = True
    receive_maximum: int = 65_535
    session_expiry: int | None = None

    def __post_init__(self) -> None:
        """Refuse limits that allow no publication at all."""
        if not self.receive_maximum or self.maximum_packet_size == 0:
            raise ProtocolViolation(PROTOCOL_ERROR, "a CONNACK with a limit of 0")

    @classmethod
    def of(cls, properties: object) -> Self:
        """Read the properties of a CONNACK, as paho gives them; None for 3.1.1."""

        def value(name: str, default: Any) -> Any:
            return getattr(properties, name, default)

        return cls(
            maximum_packet_size=value("MaximumPacketSize", None),
            maximum_qos=value("MaximumQoS", 2),
            retain_available=bool(value("RetainAvailable", 1)),
            receive_maximum=value("ReceiveMaximum", 65_535),
            session_expiry=value("SessionExpiryInterval", None),
        )

    def check_size(self, topic: str, payload: bytes) -> None:
        """Refuse a message that is too large for the broker.

        Raises:
            BrokerError: its packet would be larger than Maximum Packet Size.
        """
        size = _packet_size(len(topic.encode()) + len(payload) + _PUBLISH_OVERHEAD)
        if self.maximum_packet_size is not None and size > self.maximum_packet_size:
            raise BrokerError(
                f"the packet has {size} bytes, the broker's maximum is {self.maximum_packet_size}",
                reason="publication_too_large",
                hint="raise the broker's limit (Mosquitto: max_packet_size)",
                transient=False,
            )


def _packet_size(remaining: int) -> int:
    """The bytes of a packet by its Remaining Length, a variable byte integer [MQTT 5 1.5.5, 2.1.4]."""
    return 1 + max(1, (remaining.bit_length() + 6) // 7) + remaining


def refused_publication(topic: str, code: int, words: str) -> BrokerError:
    """Return the error for a PUBACK that refuses a message.

    Args:
        topic: of the message.
        code: reason code, 0x80 or more.
        words: name of the reason code.
    """
    what = f"the broker refuses a message on {topic}: {words}"
    if code == _QUOTA_EXCEEDED:
        return BrokerError(what, reason="publication_quota", hint="retrying")
    hint = "check the broker's access control list" if code == _NOT_AUTHORIZED else ""
    return BrokerError(what, reason="publication_refused", hint=hint, transient=False)
