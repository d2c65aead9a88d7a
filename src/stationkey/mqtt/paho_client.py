"""paho's client, with bounded packets, and without packets that a broker must not send."""

from __future__ import annotations

from typing import Final

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from stationkey.mqtt.packet_limit import PacketBound

_CONNACK: Final = 0x20
_QOS_1: Final = 0x02
_RETAIN: Final = 0x01
_DUP: Final = 0x08
_PUBLISH: Final = 0x30
_FROM_BROKER: Final = frozenset(
    {
        *(_PUBLISH | retain | qos for retain in (0, _RETAIN) for qos in (0, _QOS_1, _QOS_1 | _DUP)),
        *(_CONNACK, 0x40, 0x90, 0xB0, 0xD0, 0xE0),  # CONNACK, PUBACK, SUBACK, UNSUBACK, PINGRESP, DISCONNECT
    }
)
"""First bytes, flags included, of the packets that a broker may send to a client that uses QoS 1 at most [MQTT 5 2.1.2,
2.1.3, 3.3.1; 3.8.3.1]. A PUBLISH of QoS 2 would be kept until its PUBREL comes."""

PROTOCOL_ERROR: Final = 0x82
TOPIC_NAME_INVALID: Final = 0x90
MALFORMED_PACKET: Final = 0x81
"""Reason codes of a DISCONNECT [MQTT 5 3.14.2.1]."""


class ProtocolViolation(Exception):
    """The broker violated the protocol.

    Args:
        code: reason code for the DISCONNECT.
        words: the violation, as text.
    """

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


class Client(paho.Client):
    """See the module. The first three methods override paho's before it keeps anything."""

    bound: PacketBound
    _greeted = False

    def _sock_recv(self, bufsize: int) -> bytes:
        return self.bound.read(bufsize, super()._sock_recv)

    def _packet_handle(self) -> MQTTErrorCode:
        first = self._in_packet["command"]
        if first not in _FROM_BROKER:
            raise ProtocolViolation(PROTOCOL_ERROR, f"a packet that begins with 0x{first:02x}")
        if (first == _CONNACK) is self._greeted:  # CONNACK is the first packet, and only that [MQTT-3.2.0-1, 3.2.0-2]
            raise ProtocolViolation(PROTOCOL_ERROR, "a second CONNACK" if self._greeted else "a packet before CONNACK")
        self._greeted = True
        return super()._packet_handle()

    def _handle_on_message(self, message: paho.MQTTMessage) -> None:
        """Pass a message on without paho's filters, whose closure keeps the topic until garbage collection."""
        callback = self.on_message
        assert callback is not None
        callback(self, None, message)

    def subscribe_once(self, topic: str) -> tuple[MQTTErrorCode, int | None]:
        """Subscribe at QoS 1; retained messages come only for a new subscription [MQTT 5 3.8.3.1]."""
        if self._protocol is not MQTTProtocolVersion.MQTTv5:
            return self.subscribe(topic, qos=1)
        options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB)
        return self.subscribe(topic, options=options)

    def leave(self, *, forget: bool = False, code: int = 0) -> None:
        """Send DISCONNECT; in MQTT 5 with a reason code, and with `forget` to end the session."""
        if self._protocol is not MQTTProtocolVersion.MQTTv5:
            self.disconnect()
            return
        properties = Properties(PacketTypes.DISCONNECT)  # type: ignore[no-untyped-call] # paho types its client only
        if forget:
            properties.SessionExpiryInterval = 0
        self.disconnect(ReasonCode(PacketTypes.DISCONNECT, identifier=code), properties)

    @property
    def unsent(self) -> int:
        """Number of packets that wait for the broker to read."""
        return len(self._out_packet)
