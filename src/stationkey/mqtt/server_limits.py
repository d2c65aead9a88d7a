"""The limits of a broker's CONNACK [MQTT 5 3.2.2.3], and the reason codes of its PUBACK [MQTT 5 3.4.2.1]."""

from __future__ import annotations

from typing import Any, Final, Self

from msgspec import Struct

from stationkey.errors import BrokerError
from stationkey.mqtt.codec import (
    MAXIMUM_PACKET_SIZE,
    MAXIMUM_QOS,
    RECEIVE_MAXIMUM,
    RETAIN_AVAILABLE,
    SESSION_EXPIRY,
    ProtocolViolation,
    packet_size,
)
from stationkey.mqtt.reason_codes import NAMES, NOT_AUTHORIZED, PACKET_TOO_LARGE, PROTOCOL_ERROR, PUBACK, QUOTA_EXCEEDED

_PUBLISH_OVERHEAD: Final = 2 + 2 + 1
"""Bytes of a PUBLISH beside topic and payload: length of the topic, packet identifier, no properties [3.3]."""
_TAKES_LARGER: Final = "raise the broker's limit (Mosquitto: max_packet_size, message_size_limit)"


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
    def of(cls, properties: dict[int, Any]) -> Self:
        """Read the properties of a CONNACK; none for 3.1.1."""
        return cls(
            maximum_packet_size=properties.get(MAXIMUM_PACKET_SIZE),
            maximum_qos=properties.get(MAXIMUM_QOS, 2),
            retain_available=bool(properties.get(RETAIN_AVAILABLE, 1)),
            receive_maximum=properties.get(RECEIVE_MAXIMUM, 65_535),
            session_expiry=properties.get(SESSION_EXPIRY),
        )

    def check_size(self, topic: str, payload: bytes) -> None:
        """Refuse a message that is too large for the broker.

        Raises:
            BrokerError: its packet would be larger than Maximum Packet Size.
        """
        size = packet_size(len(topic.encode()) + len(payload) + _PUBLISH_OVERHEAD)
        if self.maximum_packet_size is not None and size > self.maximum_packet_size:
            raise BrokerError(
                f"the packet has {size} bytes, the broker's maximum is {self.maximum_packet_size}",
                reason="publication_too_large",
                hint=_TAKES_LARGER,
                transient=False,
            )


def refused_publication(topic: str, code: int) -> BrokerError:
    """Return the error for a PUBACK that refuses a message.

    Args:
        topic: of the message.
        code: reason code, 0x80 or more.
    """
    what = f"the broker refuses a message on {topic}: {NAMES[PUBACK][code]}"
    if code == QUOTA_EXCEEDED:
        return BrokerError(what, reason="publication_quota", hint="retrying")
    if code == PACKET_TOO_LARGE:
        return BrokerError(what, reason="publication_too_large", hint=_TAKES_LARGER, transient=False)
    hint = "check the broker's access control list" if code == NOT_AUTHORIZED else ""
    return BrokerError(what, reason="publication_refused", hint=hint, transient=False)
