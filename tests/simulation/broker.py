"""A broker at QoS 1, and the connection to it that the gateway is given in place of paho's.

What either side says lies in a pipe until the scheduler lets the other side read it. A connection that ends takes what
is in the pipes with it, but for what the broker has read already; what was delivered and not acknowledged is delivered
again.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from stationkey.errors import BrokerError
from stationkey.mqtt.connection import ConnectionLost, Message, MqttConnection
from stationkey.mqtt.server_limits import ServerLimits
from stationkey.mqtt.url import Broker as Address
from stationkey.mqtt.waiting import CONNECT_TIMEOUT

ADDRESS: Final = Address.parse("mqtt://broker:1883")


@dataclass(slots=True, eq=False)
class Entry:
    """A message that the broker holds for the session.

    Attributes:
        payload: the message.
        about: id of the request or status in it.
        number: its place in what Josev said.
        on: the connection that it was delivered on and not acknowledged.
        again: whether it was delivered before.
    """

    payload: bytes
    about: str
    number: int
    on: SimulatedConnection | None = None
    again: bool = False


@dataclass(slots=True)
class Ears:
    """Who is told what the broker reads.

    Attributes:
        answered: a payload on the topic of responses.
        acknowledging: the gateway acknowledges a message, and whether the broker can hear it.
    """

    answered: Callable[[bytes], None] = lambda _: None
    acknowledging: Callable[[Entry, bool], None] = lambda _entry, _heard: None


@dataclass(slots=True)
class Broker:
    """The broker.

    Attributes:
        up: whether it takes connections.
        session: whether it has a session for the station.
        queue: what it holds for the station, in order.
        connection: of the station.
    """

    rng: random.Random
    ears: Ears = field(default_factory=Ears)
    up: bool = True
    session: bool = False
    queue: list[Entry] = field(default_factory=list)
    connection: SimulatedConnection | None = None
    knocking: deque[asyncio.Future[bool]] = field(default_factory=deque)
    refuses: bool = False
    _snapshot: list[Entry] = field(default_factory=list)

    async def connect(self, _broker: Address, *, in_hand: int, **_: Any) -> MqttConnection:
        """What the gateway has in place of `stationkey.mqtt.connection.connect`."""
        knock: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.knocking.append(knock)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                resumed = await knock
        except TimeoutError:
            raise _unreachable("no answer") from None
        connection = SimulatedConnection(self, in_hand, resumed=resumed)
        self.connection = connection
        return connection

    def take(self, payload: bytes, about: str, number: int) -> bool:
        """Take a message of Josev's; False where there is nobody to hold it for."""
        if self.up and self.session:
            self.queue.append(Entry(payload, about, number))
            return True
        return False

    def turns(self) -> list[Callable[[], None]]:
        """What can happen next."""
        found: list[Callable[[], None]] = []
        if self.knocking:
            found.append(self._open)
        connection = self.connection
        if connection is None:
            return found
        if connection.up:
            found.append(connection.read_up)
        if connection.down:
            found.append(connection.read_down)
        if connection.subscribed and self._next(connection) is not None:
            found.append(self._deliver)
        return found

    def _open(self) -> None:
        knock = self.knocking.popleft()
        if knock.done():
            return
        if not self.up:
            knock.set_exception(_unreachable("connection refused"))
            return
        if self.connection is not None:  # the session is taken over [MQTT-3.1.4-3]
            self.cut("session taken over")
        knock.set_result(self.session)
        self.session = True

    def _next(self, connection: SimulatedConnection) -> Entry | None:
        if sum(entry.on is connection for entry in self.queue) >= connection.in_hand:
            return None
        return next((entry for entry in self.queue if entry.on is None), None)

    def _deliver(self) -> None:
        connection = self.connection
        assert connection is not None
        entry = self._next(connection)
        assert entry is not None
        entry.on = connection
        connection.deliver(entry)
        entry.again = True

    def acknowledge(self, entry: Entry) -> None:
        if entry in self.queue:
            self.queue.remove(entry)

    # What goes wrong.

    def cut(self, why: str = "connection reset") -> None:
        """End the connection; the broker has read some of what was under way."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        for _ in range(self.rng.randint(0, len(connection.up))):
            connection.read_up(answer=False)
        connection.end(why)
        for entry in self.queue:
            if entry.on is connection:
                entry.on = None

    def remember(self) -> None:
        """Write the sessions to disk."""
        self._snapshot = list(self.queue)

    def crash(self) -> list[Entry]:
        """Lose what was not written to disk; what was acknowledged since comes again.

        Returns:
            What was lost.
        """
        self.cut("broker gone")
        gone = [entry for entry in self.queue if entry not in self._snapshot]
        for entry in self._snapshot:
            entry.on = None
        self.queue = list(self._snapshot)
        self.up = False
        return gone

    def forget(self) -> list[Entry]:
        """Forget the session and what was held in it."""
        self.cut("session expired")
        gone, self.queue, self._snapshot, self.session = self.queue, [], [], False
        return gone


class SimulatedConnection(MqttConnection):
    """A connection to `Broker`, for the gateway."""

    def __init__(self, broker: Broker, in_hand: int, *, resumed: bool) -> None:
        loop = asyncio.get_running_loop()
        self._at = broker
        self._loop = loop
        self.in_hand = in_hand
        self.lost = loop.create_future()
        self.limits = ServerLimits()
        self.violated = False
        self.resumed = resumed
        self.is_v5 = True
        self.subscribed = resumed
        self.up: deque[tuple[str, Any, asyncio.Future[int] | None]] = deque()
        self.down: deque[tuple[asyncio.Future[int], int]] = deque()
        self._came: asyncio.Queue[Message | None] = asyncio.Queue()
        self._entries: dict[int, Entry] = {}
        self._identifier = 0

    # The gateway's side.

    @property
    def waiting(self) -> int:
        return self._came.qsize()

    async def receive(self) -> Message:
        message = await self._came.get()
        if message is None:
            self._came.put_nowait(None)
            raise self._gone()
        return message

    async def subscribe(self, topic: str) -> None:
        await self._say("subscribe", topic)

    async def unsubscribe(self, topic: str) -> None:
        await self._say("unsubscribe", topic)

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:  # noqa: ARG002 - an answer
        code = await self._say("publish", payload)
        if code:
            raise BrokerError("quota", reason="publication_refused", transient=True)
        return True

    def acknowledge(self, message: Message) -> None:
        entry = self._entries[message.mid]
        self._at.ears.acknowledging(entry, not self.lost.done())
        if not self.lost.done():
            self.up.append(("acknowledge", entry, None))

    async def close(self, *, forget: bool = False) -> None:  # noqa: ARG002 - a session is the broker's to keep
        if not self.lost.done():
            while self.up:  # a DISCONNECT comes after what was said before
                self.read_up(answer=False)
            if self._at.connection is self:
                self._at.cut("closed")
        self.end("closed")

    async def _say(self, what: str, value: object) -> int:
        if self.lost.done():
            raise self._gone()
        answer: asyncio.Future[int] = self._loop.create_future()
        self.up.append((what, value, answer))
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                return await answer
        except TimeoutError:
            if self._at.connection is self:
                self._at.cut("no acknowledgement")
            self.end("no acknowledgement")
            raise self._gone() from None

    def _gone(self) -> ConnectionLost:
        return ConnectionLost("the connection ended", reason="connection_lost")

    # The broker's side.

    def deliver(self, entry: Entry) -> None:
        self._identifier += 1
        self._entries[self._identifier] = entry
        message = Message(
            entry.payload, self, self._identifier, 1, self._loop.time(), topic="josev/cs", redelivered=entry.again
        )
        self._came.put_nowait(message)

    def read_up(self, *, answer: bool = True) -> None:
        what, value, waiting = self.up.popleft()
        code = 0
        match what:
            case "acknowledge":
                self._at.acknowledge(value)
            case "publish":
                if self._at.refuses:
                    code = 0x97
                else:
                    self._at.ears.answered(value)
            case "subscribe":
                self.subscribed = self._at.session = True
            case _:
                pass
        if waiting is not None and answer:
            self.down.append((waiting, code))

    def read_down(self) -> None:
        waiting, code = self.down.popleft()
        if not waiting.done():
            waiting.set_result(code)

    def end(self, why: str) -> None:
        if self.lost.done() or self._loop.is_closed():
            return
        self.lost.set_result(why)
        self._came.put_nowait(None)
        for _, _, waiting in self.up:
            if waiting is not None and not waiting.done():
                waiting.set_exception(self._gone())
                waiting.exception()
        for waiting, _ in self.down:
            if not waiting.done():
                waiting.set_exception(self._gone())
                waiting.exception()
        self.up.clear()
        self.down.clear()


def _unreachable(why: str) -> BrokerError:
    return BrokerError(f"no broker: {why}", reason="broker_unreachable")
