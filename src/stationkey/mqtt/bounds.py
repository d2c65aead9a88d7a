"""Bounds of memory for what a broker sends."""

from __future__ import annotations

from typing import Final

MAX_IN_HAND: Final = 64
"""Messages in flight, by default. The broker queues the rest: an RSA key takes long."""
STATUS_ROOM: Final = 4
"""In a site, statuses in flight for each place of `MAX_IN_HAND`. They may wait for a key store for hours, and then must
not hold the places of requests."""
MAX_WAITING: Final = 1024
"""QoS 0 messages that may wait to be processed; further ones are dropped, as QoS 0 permits. QoS 1 messages are held
back by the broker, by Receive Maximum [MQTT 5 3.3.4] or its own bound, if it counts correctly. Reading never pauses:
after the requests come the acknowledgements that the answers wait for."""
MAX_RECEIVED_BYTES: Final = 8 * 1024 * 1024
"""Bytes of memory for messages that wait to be processed: payload, topic and `MESSAGE_OVERHEAD` of each. It bounds the
memory that a broker can fill (Mosquitto 2.0.11 exceeds the Receive Maximum towards a client that publishes, its issue
2301). Messages beyond it are not acknowledged; a new connection has them redelivered."""
MESSAGE_OVERHEAD: Final = 1024
"""Upper estimate of the bytes of a message beside payload and topic."""
MAX_UNSENT: Final = 4096
"""Packets that may wait for the broker to read them; a broker that reads nothing is disconnected."""
PACKET_MARGIN: Final = 64 * 1024
"""Bytes that a packet may exceed the largest payload by. A larger packet is cut there and rejected by its id: see
`stationkey.mqtt.codec.Decoder`. Maximum Packet Size [MQTT 5 3.1.2.11.4] is not set: Mosquitto 2.0.21 counts a QoS 1
message that it drops as in flight forever, and delivers nothing after `ReceiveMaximum` of them."""
