"""A connection to the broker, QoS 1 both ways, with explicit acknowledgements.

`stationkey.mqtt.codec` has the packets, `stationkey.mqtt.gateway` handles the messages. The event loop reads and writes
the socket; a thread connects it, because name resolution, TLS and a TPM block.

MQTT 5 is tried first, then 3.1.1. Every socket has TCP_NODELAY: with Nagle's algorithm and delayed acknowledgements a
request takes some 80 ms longer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, Self

from msgspec import Struct

from stationkey.config.settings import MqttTerms
from stationkey.contract.messages import MAX_PAYLOAD
from stationkey.errors import BrokerError
from stationkey.mqtt import codec
from stationkey.mqtt.bounds import (
    MAX_IN_HAND,
    MAX_RECEIVED_BYTES,
    MAX_UNSENT,
    MAX_WAITING,
    MESSAGE_OVERHEAD,
    PACKET_MARGIN,
)
from stationkey.mqtt.codec import V5, V311, ProtocolViolation
from stationkey.mqtt.introduction import Introduction, introduction
from stationkey.mqtt.reason_codes import (
    FAILURE,
    NO_MATCHING_SUBSCRIBERS,
    PUBACK,
    SUBACK,
    UNSUBACK,
    UNSUPPORTED_VERSION,
)
from stationkey.mqtt.server_limits import ServerLimits, refused_publication
from stationkey.mqtt.transport import Transport
from stationkey.mqtt.url import Broker
from stationkey.mqtt.waiting import CONNECT_TIMEOUT, in_thread
from stationkey.system.tasks import unforeseen

log = logging.getLogger(__name__)

KEEPALIVE: Final = 30
"""Seconds [MQTT 5 3.1.2.10]."""
LOOK: Final = 5.0
"""Seconds between two looks at a connection at most."""
MQTT5_TIMEOUT: Final = 3.0
"""Seconds to wait for the answer to an MQTT 5 CONNECT before 3.1.1 is tried: some brokers that know only 3.1.1 misread
the longer packet and wait for more bytes forever (amqtt 0.12)."""
SESSION_EXPIRY: Final = 7 * 24 * 3600
"""Seconds that the broker keeps the session while we are disconnected [MQTT 5 3.1.2.11.2]: time for a repair."""
PLAIN: Final = MqttTerms()
"""TLS only if the URL says so, and no credentials."""
ONLINE: Final = b"online"
OFFLINE: Final = b"offline"
"""The availability message [MQTT 5 3.1.2.5]."""


_CLOSED: Final = "connection closed by peer or lost"


class ConnectionLost(BrokerError):
    """The connection ended during an operation."""


class Overrun(ConnectionLost):
    """The broker sent more than there is room for. The connection works, but must be replaced."""


class ProtocolRefused(BrokerError):
    """The broker does not speak this version of MQTT: it says so, closes the connection, or does not answer."""


class Message(Struct, frozen=True, eq=False):
    """A message received, not acknowledged yet."""

    payload: bytes
    connection: MqttConnection
    mid: int
    qos: int
    received: float
    """Arrival, in the event loop's time."""
    topic: str = ""
    retained: bool = False
    """Whether the broker retained it from before the subscription."""
    redelivered: bool = False
    """Whether the broker may have sent it before [MQTT 5 3.3.1.1, DUP]."""

    @property
    def size(self) -> int:
        """Estimate of its memory in bytes."""
        return len(self.payload) + 4 * len(self.topic) + MESSAGE_OVERHEAD

    def acknowledge(self) -> None:
        """Acknowledge the message. Without effect on a lost connection: the broker redelivers it."""
        self.connection.acknowledge(self)


class MqttConnection:
    """One network connection to a broker, in the running event loop; `connect` makes one, ``async with`` closes it.

    Args:
        broker: where to connect to.
        client_id: client identifier; with `persistent`, the broker's session belongs to it.
        persistent: keep the session (subscriptions, unacknowledged messages) at the broker between connections.
        terms: TLS and credentials.
        will: topic on which the broker retains `OFFLINE` if this connection ends without a DISCONNECT.
        in_hand: messages that the broker may send before one of them is acknowledged.
        max_payload: bytes of a payload; a payload that is larger by more than a margin is cut.
        max_received: times `MAX_RECEIVED_BYTES` that the messages that wait may take.
        protocol: MQTT version to speak, `V5` or `V311` of `stationkey.mqtt.codec`.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        client_id: str,
        persistent: bool,
        terms: MqttTerms = PLAIN,
        will: str | None = None,
        in_hand: int = MAX_IN_HAND,
        max_payload: int = MAX_PAYLOAD,
        max_received: int = 1,
        protocol: int = V5,
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._terms = terms
        self._persistent = persistent
        self._will = None if will is None else (will, OFFLINE)
        self._in_hand = in_hand
        self._max_received = max_received
        self._version = protocol
        self._loop = asyncio.get_running_loop()
        self._decoder = codec.Decoder(protocol, max_payload + PACKET_MARGIN)
        self._received: asyncio.Queue[Message | None] = asyncio.Queue()  # None: no more messages
        self._received_bytes = 0
        self._overrun = False
        self._dropping = False
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._waiting: dict[int, tuple[int, asyncio.Future[int]]] = {}
        """By packet identifier, the type of packet that answers it, and the future of its reason code."""
        self._identifier = 0
        self.lost: asyncio.Future[str] = (
            self._loop.create_future()
        )  # done with the reason when the connection has ended
        self.limits = ServerLimits()  # until the broker has accepted the connection
        self._unacknowledged = asyncio.Semaphore(self.limits.receive_maximum)
        self._loss = partial(ConnectionLost, reason="connection_lost")
        self.resumed = False  # whether the broker had a session for us, or for a client with our user name
        self._transport: Transport | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._keep_alive_seconds: float = KEEPALIVE
        self._pinged: float | None = None
        self._failed: Exception | None = None
        self._why: str | None = None
        """Why the connection ends, which may take two attempts if memory is short."""
        self.is_v5 = protocol == V5
        """Whether MQTT 5 is used; with 3.1.1 a broker cannot report that it refuses a publication."""

    async def open(self) -> None:
        """Connect.

        Raises:
            ProtocolRefused: the broker does not speak this version of MQTT.
            BrokerError: no connection.
            ConfigurationError: a file of the settings is unreadable, or not applicable to this broker.
        """
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                we = await in_thread(self._dial)
        except (OSError, ValueError) as error:
            self._drop("not connected")  # after a timeout the thread goes on; see _watch
            why = getattr(error, "strerror", None) or str(error) or f"no connection within {CONNECT_TIMEOUT:g} s"
            hint = "does it speak TLS there?" if self._broker.tls and isinstance(error, ConnectionResetError) else ""
            raise BrokerError(f"no broker at {self._broker}: {why}", reason="broker_unreachable", hint=hint) from None
        except asyncio.CancelledError:
            self._drop("not connected")
            raise
        self._send(
            codec.connect(
                self._version,
                self._client_id,
                clean=not self._persistent,
                keep_alive=KEEPALIVE,
                session_expiry=SESSION_EXPIRY if self._persistent else 0,
                receive_maximum=self._in_hand,
                will=self._will,
                username=we.username,
                password=we.password,
            )
        )
        try:
            await asyncio.wait_for(asyncio.shield(self._accepted), MQTT5_TIMEOUT if self.is_v5 else CONNECT_TIMEOUT)
        except TimeoutError:
            self._drop("no answer to CONNECT")
            kind = ProtocolRefused if self.is_v5 else BrokerError
            raise kind(f"{self._broker} did not answer as an MQTT broker", reason="broker_unreachable") from None
        except BaseException:
            self._drop("not connected")
            raise
        self._keeper = self._loop.create_task(self._keep_alive(), name="mqtt-keepalive")

    def _dial(self) -> Introduction:
        """Do the blocking part of connecting: files, name resolution, TCP, TLS (perhaps with a TPM)."""
        we = introduction(self._terms, tls=self._broker.tls)
        host: Any = self._broker.host
        if host.isascii():
            host = host.encode()  # a text would have Python load the tables of IDNA
        sock = socket.create_connection((host, self._broker.port), timeout=CONNECT_TIMEOUT / 2)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            transport: Callable[..., Transport] = Transport
            if we.tls is not None:
                from stationkey.mqtt.tls import TlsTransport, shaken  # noqa: PLC0415 - with `ssl`

                sock, transport = shaken(we.tls, sock, self._broker), TlsTransport
            sock.setblocking(False)
            self._loop.call_soon_threadsafe(self._watch, sock, transport)
        except BaseException:
            sock.close()
            raise
        return we

    def _watch(self, sock: socket.socket, transport: Callable[..., Transport]) -> None:
        if self.lost.done():
            sock.close()  # the connection was given up meanwhile
            return
        self._transport = transport(sock, received=self._take_all, ended=self._ended)

    def _ended(self, error: Exception | None) -> None:
        if error is None:
            self._drop(_CLOSED)
        else:
            self.abandon(error)

    def _send(self, packet: bytes) -> None:
        if self._transport is not None:
            self._transport.send(packet)

    async def close(self, *, forget: bool = False) -> None:
        """Send DISCONNECT if possible, and close.

        Args:
            forget: have the broker end a persistent session, too (MQTT 5 only).
        """
        if self._keeper is not None:
            self._keeper.cancel()
        if self._transport is not None and not self.lost.done():
            self._send(codec.disconnect(self._version, forget=forget))
            if not self._transport.close_when_sent():  # a broker that does not read must not hold us
                await asyncio.wait({self.lost}, timeout=1.0)
        self._drop("closed")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def subscribe(self, topic: str) -> None:
        """Subscribe at QoS 1.

        With MQTT 5, a retained message comes once per session, not at each reconnect [3.8.3.1, Retain Handling].

        Raises:
            BrokerError: the broker refuses, for example for lack of rights.
            ConnectionLost: the connection ended.
        """
        identifier = self._next_identifier()
        self._ask(SUBACK, identifier, codec.subscribe(self._version, topic, identifier=identifier))
        granted = await self._answer(identifier)
        if granted >= FAILURE:
            raise BrokerError(
                f"the broker refuses a subscription to {topic}",
                reason="subscription_refused",
                hint="check its access control list",
            )
        if granted < 1:
            log.warning("the broker grants QoS 0 for %s: messages are lost while disconnected", topic)

    async def unsubscribe(self, topic: str) -> None:
        """End a subscription to just this topic, if there is one.

        Raises:
            ConnectionLost: the connection ended.
        """
        identifier = self._next_identifier()
        self._ask(UNSUBACK, identifier, codec.unsubscribe(self._version, topic, identifier=identifier))
        await self._answer(identifier)  # 3.1.1 gives no reason, and it does not matter whether it existed

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Publish at QoS 1 and wait for the PUBACK; at QoS 0 if the broker grants no more [MQTT-3.2.2-11].

        Args:
            topic: the topic.
            payload: the payload.
            retain: have the broker retain it, if it can [MQTT-3.2.2-14].

        Returns:
            False if the broker reports that it has no subscriber, which not every broker does.

        Raises:
            BrokerError: the message is too large, or refused (reported by MQTT 5 only).
            ConnectionLost: the connection ended; it is unknown whether the broker has the message.
        """
        self.limits.check_size(topic, payload)
        qos = min(1, self.limits.maximum_qos)
        retain = retain and self.limits.retain_available
        async with self._unacknowledged:
            identifier = self._send_publish(topic, payload, qos=qos, retain=retain)
            if not identifier:
                return True
            code = await self._answer(identifier)
        if code >= FAILURE:
            raise refused_publication(topic, code)
        return code != NO_MATCHING_SUBSCRIBERS

    @property
    def waiting(self) -> int:
        """Number of messages that `receive` would return at once."""
        return self._received.qsize()

    async def receive(self) -> Message:
        """Return the next message.

        Raises:
            Overrun: there was no room for the next message.
            ConnectionLost: the connection has ended, and every message received before was returned.
        """
        if self._overrun and self._received.empty():
            raise Overrun(
                f"{self._broker} sent more than may be in hand; reconnecting to have the rest redelivered",
                reason="connection_lost",
            )
        message = await self._received.get()
        if message is None:
            self._received.put_nowait(None)  # for the next caller
            raise self._connection_lost()
        self._received_bytes -= message.size
        self._dropping = self._dropping and not self._received.empty()
        return message

    def acknowledge(self, message: Message) -> None:
        """Send the PUBACK for a message of this connection; see `Message.acknowledge`."""
        if self._transport is not None and not self.lost.done() and message.qos > 0:
            self._transport.send(codec.puback(message.mid))
            if self._transport.unsent > MAX_UNSENT:
                self._drop("the broker reads nothing")

    def _send_publish(self, topic: str, payload: bytes, *, qos: int, retain: bool) -> int:
        """Send a PUBLISH; return its packet identifier, or 0 at QoS 0."""
        if qos == 0:
            self._check_open()
            self._send(codec.publish(self._version, topic, payload, retain=retain))
            return 0
        identifier = self._next_identifier()
        self._ask(
            PUBACK, identifier, codec.publish(self._version, topic, payload, identifier=identifier, retain=retain)
        )
        return identifier

    def _next_identifier(self) -> int:
        """Return a packet identifier that is not in use [MQTT-2.2.1-3]."""
        while True:
            self._identifier = self._identifier % 65_535 + 1
            if self._identifier not in self._waiting:
                return self._identifier

    def _ask(self, kind: int, identifier: int, packet: bytes) -> None:
        """Send a packet that is answered by one of type `kind`; `_answer` is next."""
        self._check_open()
        self._waiting[identifier] = kind, self._loop.create_future()
        self._send(packet)

    async def _answer(self, identifier: int) -> int:
        """Wait for the broker's answer to a packet; return its reason code."""
        late = f"no acknowledgement within {CONNECT_TIMEOUT:g} s"
        timer = self._loop.call_later(CONNECT_TIMEOUT, self._drop, late)
        try:
            return await self._waiting[identifier][1]
        finally:
            timer.cancel()
            del self._waiting[identifier]

    def _check_open(self) -> None:
        if self._transport is None or self.lost.done():
            raise self._connection_lost()

    def _connection_lost(self, why: str = "not connected") -> ConnectionLost:
        why = self.lost.result() if self.lost.done() else why
        return self._loss(f"the connection to {self._broker} ended: {why}")

    async def _keep_alive(self) -> None:
        while not self.lost.done():
            try:
                pause = self._look_for_life()
            except Exception as error:  # noqa: BLE001 - the boundary of this task: its error ends the connection
                self._failed, pause = self._failed or error, LOOK
            try:
                await asyncio.sleep(min(pause, LOOK))
            except MemoryError:
                await asyncio.sleep(0)  # needs next to none

    def _look_for_life(self) -> float:
        """Send PINGREQ if it is time, and end what could not be ended for lack of memory; return seconds to wait."""
        transport, now, limit = self._transport, self._loop.time(), self._keep_alive_seconds
        if self._failed is not None:
            self.abandon(self._failed)
        elif self._why is not None or transport is None or transport.closed:
            self._drop(self._why or _CLOSED)
        elif self._pinged is not None and transport.heard < self._pinged:
            if now - self._pinged >= limit:
                self._drop("no sign of life")
            return self._pinged + limit - now
        elif (quiet := now - min(transport.heard, transport.said)) < limit:
            self._pinged = None
            return limit - quiet
        else:
            transport.send(codec.PINGREQ)
            self._pinged = now
        return limit

    def abandon(self, error: Exception) -> None:
        """End the connection after an unhandled error: unacknowledged messages are redelivered."""
        self._failed = error
        cause = unforeseen(error)
        self._loss = partial(ConnectionLost, reason=cause.reason)
        self._drop(cause.message)

    def _drop(self, why: str) -> None:
        """End the connection from this side, in any state."""
        self._why = self._why or why
        if self._transport is not None:
            self._transport.close()
        self._end(why)

    def _end(self, why: str) -> None:
        """Tell all who wait. `lost` is last: if memory is short, this is repeated until it is done."""
        if self.lost.done():
            return
        for _, waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(self._connection_lost(why))
        if not self._accepted.done():
            self._accepted.set_exception(self._not_accepted(why))
            self._accepted.exception()  # retrieved, so that asyncio does not warn
        self._received.put_nowait(None)
        self.lost.set_result(why)

    def _not_accepted(self, why: str) -> BrokerError:
        """Return the error for a connection that ended before the CONNACK."""
        tls = self._broker.tls and self._transport is not None
        if self._transport is not None and tls:
            from stationkey.mqtt.tls import closed_without_a_word, refused  # noqa: PLC0415 - with `ssl`

            if self._transport.failure is not None:
                return refused(str(self._broker), self._transport.failure)
            closed_without_a_word()
        # Some brokers without MQTT 5 close the connection without an answer.
        return ProtocolRefused(
            f"{self._broker} closed the connection: {why}",
            reason="broker_refuses",
            hint="does it require a client certificate, and trust this one?" if tls else "",
        )

    def _take_all(self, data: bytes) -> None:
        """Take what has arrived."""
        if self._failed is not None:
            self.abandon(self._failed)
            return
        try:
            for packet in self._decoder.packets(data):
                self._take(packet)
                if self.lost.done():
                    return
        except ProtocolViolation as error:
            self._refuse(error)
        except Exception as error:  # noqa: BLE001 - the boundary of a callback: its error ends the connection
            self.abandon(error)

    def _refuse(self, violation: ProtocolViolation) -> None:
        """End the connection after a protocol violation, with the reason code of MQTT 5 [4.13.1]."""
        with suppress(Exception):  # whatever it is, the connection ends
            self._send(codec.disconnect(self._version, code=violation.code))
        self._loss = partial(ConnectionLost, reason="broker_violates_protocol")
        self._drop(f"the broker sent {violation}")

    def _take(self, packet: codec.Packet) -> None:
        match packet:
            case codec.Publish():
                self._take_message(packet)
            case codec.Acknowledgement():
                kind, waiting = self._waiting.get(packet.identifier, (0, None))
                if waiting is not None and kind == packet.kind and not waiting.done():
                    waiting.set_result(packet.code)
            case codec.Connack():
                self._take_connack(packet)
            case codec.Disconnect():
                self._drop(packet.words)
            case codec.Pingresp():
                pass  # a sign of life, as all that arrives

    def _take_connack(self, packet: codec.Connack) -> None:
        if self._accepted.done():
            return
        if packet.code < FAILURE:
            self.limits = limits = ServerLimits.of(packet.properties)
            self._unacknowledged = asyncio.Semaphore(limits.receive_maximum)
            self._keep_alive_seconds = min(KEEPALIVE, packet.properties.get(codec.SERVER_KEEP_ALIVE) or KEEPALIVE)
            self.resumed = packet.session_present
            self._accepted.set_result(None)
        elif packet.code == UNSUPPORTED_VERSION:
            self._accepted.set_exception(
                ProtocolRefused(f"{self._broker} does not speak this MQTT version", reason="broker_refuses")
            )
        else:
            self._accepted.set_exception(
                BrokerError(f"{self._broker} refuses the connection: {packet.words}", reason="broker_refuses")
            )

    def _take_message(self, message: codec.Publish) -> None:
        received = Message(
            message.payload,
            self,
            message.identifier,
            message.qos,
            self._loop.time(),
            topic=message.topic,
            retained=message.retain,
            redelivered=message.dup,
        )
        # Of two messages the first is not passed over for the second: their order may matter.
        self._overrun |= self._received_bytes + received.size > self._max_received * MAX_RECEIVED_BYTES
        if self._overrun:
            return
        if message.qos > 0 or self._received.qsize() < MAX_WAITING:
            self._received_bytes += received.size
            self._received.put_nowait(received)
        elif not self._dropping:
            self._dropping = True  # logged once, until every waiting message was taken
            log.warning("QoS 0 messages dropped: they arrive faster than they are answered")


async def connect(
    broker: Broker,
    *,
    client_id: str,
    persistent: bool,
    terms: MqttTerms = PLAIN,
    will: str | None = None,
    in_hand: int = MAX_IN_HAND,
    max_payload: int = MAX_PAYLOAD,
    max_received: int = 1,
) -> MqttConnection:
    """Connect with MQTT 5, else 3.1.1; ``async with`` closes the connection.

    The arguments are those of `MqttConnection`; only an MQTT 5 broker is told `in_hand`.

    Raises:
        BrokerError: neither version works.
        ConfigurationError: a file of `terms` cannot be read, or is not applicable to this broker.
    """
    for protocol in (V5, V311):
        connection = MqttConnection(
            broker,
            client_id=client_id,
            persistent=persistent,
            terms=terms,
            will=will,
            in_hand=in_hand,
            max_payload=max_payload,
            max_received=max_received,
            protocol=protocol,
        )
        try:
            await connection.open()
        except ProtocolRefused as error:
            if protocol == V311:
                raise
            log.debug("trying MQTT 3.1.1: %s", error)
        else:
            return connection
    raise AssertionError("unreachable")
