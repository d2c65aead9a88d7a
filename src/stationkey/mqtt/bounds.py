"""How much of what a broker sends is kept."""

from __future__ import annotations

from typing import Final

MAX_IN_HAND: Final = 64
"""Messages in hand at a time, by default. The broker holds the rest: an RSA key takes its time."""
MAX_WAITING: Final = 1024
"""How many messages of QoS 0 may wait for a free hand; what comes then is dropped, as QoS 0 permits. Those of QoS 1 the
broker itself holds back, by Receive Maximum [MQTT 5 3.3.4] or by its own bound, if it counts right. Reading never
pauses: behind the requests comes what the answers wait for, their acknowledgements."""
MAX_RECEIVED_BYTES: Final = 8 * 1024 * 1024
"""Bytes of memory that messages may take which came and are not taken up yet: payload, topic and `MESSAGE_OVERHEAD` of
each. It bounds what a broker can fill here, whatever it sends (Mosquitto 2.0.11 sends more than it may to a client that
publishes, its issue 2301). What comes beyond it is not acknowledged, and is asked for again by a new connection."""
MESSAGE_OVERHEAD: Final = 1024
"""Bytes that a message takes beside its payload and topic, counted generously."""
MAX_UNSENT: Final = 4096
"""Packets of ours that may wait for a broker to read them; one that reads nothing is left."""
PACKET_MARGIN: Final = 64 * 1024
"""Bytes that a packet may be larger than the largest payload that is read; of a larger one no more is kept than that,
and it is rejected by its id: see `stationkey.mqtt.packet_limit`. The broker is not asked to hold it back by Maximum
Packet Size [MQTT 5 3.1.2.11.4]: Mosquitto 2.0.21 counts a message of QoS 1 that it drops as in flight for ever, and
after `ReceiveMaximum` of them delivers nothing more."""
