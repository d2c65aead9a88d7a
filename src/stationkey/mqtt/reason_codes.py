"""The reason codes that a broker may give, and their names [MQTT 5 2.4]."""

from __future__ import annotations

from typing import Final

CONNACK: Final = 0x20
PUBACK: Final = 0x40
SUBACK: Final = 0x90
UNSUBACK: Final = 0xB0
DISCONNECT: Final = 0xE0
"""Packet types, as the first byte of a packet has them [MQTT 5 2.1.2]."""

MALFORMED_PACKET: Final = 0x81
PROTOCOL_ERROR: Final = 0x82
UNSUPPORTED_VERSION: Final = 0x84
NOT_AUTHORIZED: Final = 0x87
TOPIC_NAME_INVALID: Final = 0x90
PACKET_TOO_LARGE: Final = 0x95
QUOTA_EXCEEDED: Final = 0x97
NO_MATCHING_SUBSCRIBERS: Final = 0x10
FAILURE: Final = 0x80
"""This code and those above it refuse something."""

_ALL: Final = (CONNACK, PUBACK, SUBACK, UNSUBACK, DISCONNECT)
_ENDS: Final = (CONNACK, DISCONNECT)
_TABLE: Final[tuple[tuple[int, str, tuple[int, ...]], ...]] = (
    (0x00, "Success", (CONNACK, PUBACK, UNSUBACK)),
    (0x00, "Normal disconnection", (DISCONNECT,)),
    (0x00, "Granted QoS 0", (SUBACK,)),
    (0x01, "Granted QoS 1", (SUBACK,)),
    (0x02, "Granted QoS 2", (SUBACK,)),
    (0x04, "Disconnect with will message", (DISCONNECT,)),
    (NO_MATCHING_SUBSCRIBERS, "No matching subscribers", (PUBACK,)),
    (0x11, "No subscription found", (UNSUBACK,)),
    (FAILURE, "Unspecified error", _ALL),
    (MALFORMED_PACKET, "Malformed packet", _ENDS),
    (PROTOCOL_ERROR, "Protocol error", _ENDS),
    (0x83, "Implementation specific error", _ALL),
    (UNSUPPORTED_VERSION, "Unsupported protocol version", (CONNACK,)),
    (0x85, "Client identifier not valid", (CONNACK,)),
    (0x86, "Bad user name or password", (CONNACK,)),
    (NOT_AUTHORIZED, "Not authorized", _ALL),
    (0x88, "Server unavailable", (CONNACK,)),
    (0x89, "Server busy", _ENDS),
    (0x8A, "Banned", (CONNACK,)),
    (0x8B, "Server shutting down", (DISCONNECT,)),
    (0x8C, "Bad authentication method", _ENDS),
    (0x8D, "Keep alive timeout", (DISCONNECT,)),
    (0x8E, "Session taken over", (DISCONNECT,)),
    (0x8F, "Topic filter invalid", (SUBACK, UNSUBACK, DISCONNECT)),
    (TOPIC_NAME_INVALID, "Topic name invalid", (CONNACK, PUBACK, DISCONNECT)),
    (0x91, "Packet identifier in use", (PUBACK, SUBACK, UNSUBACK)),
    (0x93, "Receive maximum exceeded", (DISCONNECT,)),
    (0x94, "Topic alias invalid", (DISCONNECT,)),
    # Not in a PUBACK by the standard; Mosquitto 2.0 refuses a message so that is larger than its message_size_limit.
    (PACKET_TOO_LARGE, "Packet too large", (CONNACK, PUBACK, DISCONNECT)),
    (0x96, "Message rate too high", (DISCONNECT,)),
    (QUOTA_EXCEEDED, "Quota exceeded", (CONNACK, PUBACK, SUBACK, DISCONNECT)),
    (0x98, "Administrative action", (DISCONNECT,)),
    (0x99, "Payload format invalid", (PUBACK, DISCONNECT)),
    (0x9A, "Retain not supported", _ENDS),
    (0x9B, "QoS not supported", _ENDS),
    (0x9C, "Use another server", _ENDS),
    (0x9D, "Server moved", _ENDS),
    (0x9E, "Shared subscription not supported", (SUBACK, DISCONNECT)),
    (0x9F, "Connection rate exceeded", _ENDS),
    (0xA0, "Maximum connect time", (DISCONNECT,)),
    (0xA1, "Subscription identifiers not supported", (SUBACK, DISCONNECT)),
    (0xA2, "Wildcard subscription not supported", (SUBACK, DISCONNECT)),
)
NAMES: Final[dict[int, dict[int, str]]] = {
    kind: {code: name for code, name, kinds in _TABLE if kind in kinds} for kind in _ALL
}
"""By packet type, the codes that it may have, and their names."""

RETURN_CODES: Final = {1: UNSUPPORTED_VERSION, 2: 0x85, 3: 0x88, 4: 0x86, 5: NOT_AUTHORIZED}
"""The return codes of a CONNACK [MQTT 3.1.1 3.2.2.3], as the reason codes that say the same."""
