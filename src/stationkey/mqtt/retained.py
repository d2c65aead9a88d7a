"""A retained message, published at each connection and whenever it changes."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from stationkey.errors import BrokerError
from stationkey.mqtt.connection import ConnectionLost, MqttConnection
from stationkey.system.backoff import Backoff

log = logging.getLogger(__name__)

GIVE_UP_AFTER: Final = 5
"""Connections that may end while the message is in flight, before it is given up: a broker that refuses it may close
the connection each time, and requests are served on that connection, too."""
RETRY_FIRST: Final = 1.0
RETRY_LAST: Final = 60.0
"""Seconds before a publication is repeated for which the broker had no room; doubled each time."""


class RetainedTopic:
    """Keeps the last message of a topic retained at the broker. A failure is logged once, and has no other effect.

    Args:
        topic: the topic, its prefix included.
    """

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._payload: bytes | None = None
        self._changed = asyncio.Event()
        self._lost = 0
        self._told: set[str] = set()

    def set(self, payload: bytes) -> None:
        """Set the message; it is published unless the broker has it already."""
        if payload != self._payload:
            self._payload = payload
            self._changed.set()

    async def keep(self, connection: MqttConnection) -> None:
        """Publish the message, and again whenever it changes, until cancelled or the connection ends."""
        published = None
        backoff = Backoff(RETRY_FIRST, RETRY_LAST)
        if not connection.limits.retain_available:
            words = "the broker retains nothing: only present subscribers get it"
            self._tell(BrokerError(words, reason="broker_grants_less", transient=False))
        while self._lost < GIVE_UP_AFTER:
            self._changed.clear()
            payload = self._payload
            if payload is not None and payload != published:
                try:
                    await connection.publish(self._topic, payload, retain=True)
                except ConnectionLost:
                    self._lost += 1
                    return
                except BrokerError as error:
                    self._tell(error)
                    if error.transient:
                        await asyncio.sleep(backoff.next())
                        continue
                self._lost = 0
                backoff.reset()
                published = payload
            await self._changed.wait()
        words = f"each of {GIVE_UP_AFTER} connections ended when it was published"
        self._tell(BrokerError(words, reason="publication_refused", transient=False))

    def _tell(self, error: BrokerError) -> None:
        if error.reason not in self._told:
            self._told.add(error.reason)
            log.warning("not retained: %s", error, extra={"topic": self._topic, "reason": error.reason})
