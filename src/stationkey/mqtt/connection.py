"""A connection to the broker, QoS 1 both ways, with explicit acknowledgements.

It uses paho-mqtt directly, because aiomqtt acknowledges by itself (checked in 2.5.1). `stationkey.mqtt.gateway` handles
the messages.

MQTT 5 is tried first, then 3.1.1. Every socket has TCP_NODELAY: with Nagle's algorithm and delayed acknowledgements a
request takes some 80 ms longer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from contextlib import suppress
from functools import partial
from typing import Any, Final, Self

import paho.mqtt.client as paho
from msgspec import Struct
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from stationkey.config.settings import MqttTerms
from stationkey.contract.messages import MAX_PAYLOAD
from stationkey.errors import BrokerError
from stationkey.mqtt.bounds import (
    MAX_IN_HAND,
    MAX_RECEIVED_BYTES,
    MAX_UNSENT,
    MAX_WAITING,
    MESSAGE_OVERHEAD,
    PACKET_MARGIN,
)
from stationkey.mqtt.packet_limit import PacketBound
from stationkey.mqtt.paho_client import (
    MALFORMED_PACKET,
    PROTOCOL_ERROR,
    TOPIC_NAME_INVALID,
    Client,
    ProtocolViolation,
)
from stationkey.mqtt.server_limits import ServerLimits, refused_publication
from stationkey.mqtt.tls import BrokerSocket, closed_without_a_word, introduction, no_handshake, refused
from stationkey.mqtt.url import Broker
from stationkey.mqtt.waiting import CONNECT_TIMEOUT, in_thread
from stationkey.system.tasks import unforeseen

log = logging.getLogger(__name__)

KEEPALIVE: Final = 30
"""Seconds [MQTT 5 3.1.2.10]."""
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
_NO_MATCHING_SUBSCRIBERS: Final = 0x10
"""[MQTT 5 3.4.2.1]."""
_UNSPECIFIED_ERROR: Final = 0x80
"""[MQTT 5 3.14.2.1]."""
_UNSUPPORTED_PROTOCOL_VERSION: Final = 132
"""MQTT 5 reason code 0x84; paho gives the same for return code 1 of 3.1.1."""


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
        protocol: MQTT version to speak.
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
        protocol: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv5,
    ) -> None:
        self._broker = broker
        self._terms = terms
        self._persistent = persistent
        self._in_hand = in_hand
        self._max_payload = max_payload
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._received: asyncio.Queue[Message | None] = asyncio.Queue()  # None: no more messages
        self._received_bytes = 0
        self._overrun = False
        self._dropping = False
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._waiting: dict[tuple[int, int], asyncio.Future[ReasonCode]] = {}  # by type and identifier of the answer
        self.lost: asyncio.Future[str] = (
            self._loop.create_future()
        )  # done with the reason when the connection has ended
        self.limits = ServerLimits()  # until the broker has accepted the connection
        self._unacknowledged = asyncio.Semaphore(self.limits.receive_maximum)
        self._loss = partial(ConnectionLost, reason="connection_lost")
        self.resumed = False  # whether the broker had a session for us, or for a client with our user name
        self._sock: socket.socket | None = None
        self._tls: BrokerSocket | None = None  # the same, with TLS; kept after the end, to say why it ended
        self._keeper: asyncio.Task[None] | None = None
        self.is_v5 = protocol is MQTTProtocolVersion.MQTTv5
        """Whether MQTT 5 is used; with 3.1.1 a broker cannot report that it refuses a publication."""
        self._client = client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=protocol,
            clean_session=None if self.is_v5 else not persistent,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.bound = PacketBound(max_payload + PACKET_MARGIN)
        client.connect_timeout = CONNECT_TIMEOUT / 2
        if will is not None:
            client.will_set(will, OFFLINE, qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_unsubscribe
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_socket_register_write
        client.on_socket_unregister_write = self._on_socket_unregister_write

    async def open(self) -> None:
        """Connect.

        Raises:
            ProtocolRefused: the broker does not speak this version of MQTT.
            BrokerError: no connection.
            ConfigurationError: a file of the settings is unreadable, or not applicable to this broker.
        """
        properties = None
        arguments: dict[str, Any] = {}
        if self.is_v5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho types its client only
            properties.SessionExpiryInterval = SESSION_EXPIRY if self._persistent else 0
            properties.ReceiveMaximum = self._in_hand
            arguments = {"clean_start": not self._persistent, "properties": properties}
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await in_thread(lambda: self._dial(arguments))
        except ssl.SSLError as error:
            raise no_handshake(str(self._broker), error) from None
        except (OSError, ValueError) as error:
            self._drop("not connected")  # after a timeout the thread goes on; see _watch
            why = getattr(error, "strerror", None) or str(error) or f"no connection within {CONNECT_TIMEOUT:g} s"
            hint = "does it speak TLS there?" if self._broker.tls and isinstance(error, ConnectionResetError) else ""
            raise BrokerError(f"no broker at {self._broker}: {why}", reason="broker_unreachable", hint=hint) from None
        except asyncio.CancelledError:
            self._drop("not connected")
            raise
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

    def _dial(self, arguments: dict[str, Any]) -> None:
        """Do the blocking part of connecting: files, name resolution, TCP, TLS (perhaps with a TPM)."""
        we = introduction(self._terms, tls=self._broker.tls)
        self._client.username_pw_set(we.username, we.password)  # type: ignore[arg-type] # a password is binary data
        if we.tls is not None:
            self._client.tls_set_context(we.tls)
        self._client.connect(self._broker.host, self._broker.port, KEEPALIVE, **arguments)

    async def close(self, *, forget: bool = False) -> None:
        """Send DISCONNECT if possible, and close.

        Args:
            forget: have the broker end a persistent session, too (MQTT 5 only).
        """
        if self._keeper is not None:
            self._keeper.cancel()
        if not self.lost.done():
            self._client.leave(forget=forget)
            # paho ends the connection once the DISCONNECT is written; a broker that does not read must not hold us.
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
        code, mid = self._client.subscribe_once(topic)
        granted = await self._answer(PacketTypes.SUBACK, code, mid)
        if granted.is_failure:
            raise BrokerError(
                f"the broker refuses a subscription to {topic}",
                reason="subscription_refused",
                hint="check its access control list",
            )
        if granted.value < 1:
            log.warning("the broker grants QoS 0 for %s: messages are lost while disconnected", topic)

    async def unsubscribe(self, topic: str) -> None:
        """End a subscription to just this topic, if there is one.

        Raises:
            ConnectionLost: the connection ended.
        """
        await self._answer(PacketTypes.UNSUBACK, *self._client.unsubscribe(topic))

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
            info = self._client.publish(topic, payload, qos=qos, retain=retain)
            if qos == 0 and info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
                return True
            reason = await self._answer(PacketTypes.PUBACK, info.rc, info.mid)
        if reason.is_failure:
            raise refused_publication(topic, reason.value, str(reason))
        return reason.value != _NO_MATCHING_SUBSCRIBERS

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
        if not self.lost.done() and message.qos > 0:
            self._client.ack(message.mid, message.qos)
            if self._client.unsent > MAX_UNSENT:
                self._drop("the broker reads nothing")

    async def _answer(self, kind: int, code: MQTTErrorCode, mid: int | None) -> ReasonCode:
        """Wait for the broker's answer, of a type of `PacketTypes`, to the packet `mid`."""
        if self.lost.done() or code != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            raise self._connection_lost()
        waiting: asyncio.Future[ReasonCode] = self._loop.create_future()
        self._waiting[kind, mid] = waiting
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                return await waiting
        except TimeoutError:
            self._drop(f"no acknowledgement within {CONNECT_TIMEOUT:g} s")
            raise self._connection_lost() from None
        finally:
            self._waiting.pop((kind, mid), None)

    def _connection_lost(self) -> ConnectionLost:
        why = self.lost.result() if self.lost.done() else "not connected"
        return self._loss(f"the connection to {self._broker} ended: {why}")

    async def _keep_alive(self) -> None:
        try:
            while self._client.loop_misc() == MQTTErrorCode.MQTT_ERR_SUCCESS:  # noqa: ASYNC110 - paho must be polled
                await asyncio.sleep(1.0)
            self._drop("no sign of life")
        except Exception as error:  # noqa: BLE001 - the boundary of this task: its error ends the connection
            self.abandon(error)

    def abandon(self, error: Exception) -> None:
        """End the connection after an unhandled error: unacknowledged messages are redelivered."""
        cause = unforeseen(error)
        self._loss = partial(ConnectionLost, reason=cause.reason)
        self._drop(cause.message)

    def _drop(self, why: str) -> None:
        """End the connection from this side, in any state."""
        sock = self._sock
        self._on_socket_close(self._client, None, sock)
        if sock is not None:
            sock.close()
        self._end(why)

    def _end(self, why: str) -> None:
        if self.lost.done():
            return
        self.lost.set_result(why)
        self._received.put_nowait(None)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(self._connection_lost())
        if not self._accepted.done():
            self._accepted.set_exception(self._not_accepted(why))
            self._accepted.exception()  # retrieved, so that asyncio does not warn

    def _not_accepted(self, why: str) -> BrokerError:
        """Return the error for a connection that ended before the CONNACK."""
        if self._tls is not None and self._tls.failure is not None:
            return refused(str(self._broker), self._tls.failure)
        if self._tls is not None:
            closed_without_a_word()
        # Some brokers without MQTT 5 close the connection without an answer.
        return ProtocolRefused(
            f"{self._broker} closed the connection: {why}",
            reason="broker_refuses",
            hint="" if self._tls is None else "does it require a client certificate, and trust this one?",
        )

    # paho's callbacks. During connect, those about the socket come from the connecting thread.
    def _on_socket_open(self, client: paho.Client, userdata: object, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        if isinstance(sock, BrokerSocket):
            self._tls = sock
        self._loop.call_soon_threadsafe(self._watch, sock)

    def _watch(self, sock: socket.socket) -> None:
        if self.lost.done():
            sock.close()  # the connection was given up meanwhile
        elif sock.fileno() != -1:
            self._loop.add_reader(sock, self._read, sock)

    def _read(self, sock: socket.socket) -> None:
        """Read packets. With TLS, decrypted data may contain further packets, which the socket does not signal."""
        if sock.fileno() == -1:
            return
        try:
            self._client.loop_read()
        except ProtocolViolation as error:
            self._refuse(error.code, str(error))
        except MemoryError as error:
            self.abandon(error)
        except Exception as error:  # noqa: BLE001 - paho raises anything over an invalid packet
            self._refuse(MALFORMED_PACKET, f"an invalid packet ({type(error).__name__})")
        if isinstance(sock, BrokerSocket) and sock.fileno() != -1 and sock.pending() > 0:
            self._loop.call_soon(self._read, sock)

    def _refuse(self, code: int, what: str) -> None:
        """End the connection after a protocol violation, with the reason code of MQTT 5 [4.13.1]."""
        with suppress(Exception):  # whatever it is, the connection ends
            self._client.leave(code=code)
        self._loss = partial(ConnectionLost, reason="broker_violates_protocol")
        self._drop(f"the broker sent {what}")

    def _on_socket_close(self, client: paho.Client, userdata: object, sock: Any) -> None:
        if self._sock is not None and self._sock.fileno() != -1:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
        self._sock = None

    def _on_socket_register_write(self, client: paho.Client, userdata: object, sock: Any) -> None:
        if threading.get_ident() == self._thread:
            self._write(sock)  # at once: paho asks only when a packet is complete
        else:
            self._loop.call_soon_threadsafe(self._write, sock)

    def _write(self, sock: socket.socket) -> None:
        """Write as much as the socket takes now, and the rest when it is writable again."""
        try:
            if sock.fileno() != -1:
                self._client.loop_write()
        except Exception as error:  # noqa: BLE001 - paho has lost the packet, and the broker would misread the next
            self.abandon(error)
        if sock.fileno() == -1:
            return
        if self._client.want_write():
            self._loop.add_writer(sock, self._write, sock)
        elif isinstance(sock, BrokerSocket) and sock.reading_wants_to_write:
            self._loop.add_writer(sock, self._read_on, sock)

    def _read_on(self, sock: socket.socket) -> None:
        """Continue reading after TLS had to wait for a write."""
        self._loop.remove_writer(sock)
        self._read(sock)

    def _on_socket_unregister_write(self, client: paho.Client, userdata: object, sock: Any) -> None:
        if sock.fileno() != -1:
            self._loop.remove_writer(sock)

    def _on_connect(
        self, client: paho.Client, userdata: object, flags: paho.ConnectFlags, reason: ReasonCode, properties: object
    ) -> None:
        if self._accepted.done():
            return
        if not reason.is_failure:
            self.limits = limits = ServerLimits.of(properties)
            self._unacknowledged = asyncio.Semaphore(limits.receive_maximum)
            self.resumed = flags.session_present
            self._accepted.set_result(None)
        elif reason.value == _UNSUPPORTED_PROTOCOL_VERSION:
            self._accepted.set_exception(
                ProtocolRefused(f"{self._broker} does not speak this MQTT version", reason="broker_refuses")
            )
        else:
            self._accepted.set_exception(
                BrokerError(f"{self._broker} refuses the connection: {reason}", reason="broker_refuses")
            )

    def _on_disconnect(
        self,
        client: paho.Client,
        userdata: object,
        flags: paho.DisconnectFlags,
        reason: ReasonCode,
        properties: object,
    ) -> None:
        # paho reports an unspecified error if no reason was given.
        closed = reason.value == _UNSPECIFIED_ERROR and not flags.is_disconnect_packet_from_server
        self._end("connection closed by peer or lost" if closed else str(reason))

    def _on_message(self, client: paho.Client, userdata: object, message: paho.MQTTMessage) -> None:
        topic = message.topic
        if not topic:
            raise ProtocolViolation(PROTOCOL_ERROR, "a PUBLISH without a topic")  # there are no aliases [3.3.2.3.4]
        if {"+", "#", "\0"} & set(topic):
            raise ProtocolViolation(TOPIC_NAME_INVALID, "a PUBLISH whose topic has a wildcard")
        if message.qos > 0 and message.mid == 0:
            raise ProtocolViolation(PROTOCOL_ERROR, "a packet identifier of 0")  # [MQTT-2.2.1-3]
        received = Message(
            bytes(message.payload),
            self,
            message.mid,
            message.qos,
            self._loop.time(),
            topic=topic,
            retained=bool(message.retain),
            redelivered=bool(message.dup),
        )
        # Of two messages the first is not passed over for the second: their order may matter.
        self._overrun |= self._received_bytes + received.size > MAX_RECEIVED_BYTES
        if self._overrun:
            return
        if message.qos > 0 or self._received.qsize() < MAX_WAITING:
            self._received_bytes += received.size
            self._received.put_nowait(received)
        elif not self._dropping:
            self._dropping = True  # logged once, until every waiting message was taken
            log.warning("QoS 0 messages dropped: they arrive faster than they are answered")

    def _on_publish(
        self, client: paho.Client, userdata: object, mid: int, reason: ReasonCode, properties: object
    ) -> None:
        self._answered(PacketTypes.PUBACK, mid, reason)

    def _on_subscribe(
        self, client: paho.Client, userdata: object, mid: int, reasons: list[ReasonCode], properties: object
    ) -> None:
        self._answered(PacketTypes.SUBACK, mid, reasons[0])

    def _on_unsubscribe(
        self, client: paho.Client, userdata: object, mid: int, reasons: list[ReasonCode], properties: object
    ) -> None:
        # 3.1.1 gives no reason, and it does not matter whether the subscription existed.
        self._answered(PacketTypes.UNSUBACK, mid, ReasonCode(PacketTypes.UNSUBACK, "Success"))

    def _answered(self, kind: int, mid: int, reason: ReasonCode) -> None:
        waiting = self._waiting.get((kind, mid))
        if waiting is not None and not waiting.done():
            waiting.set_result(reason)


async def connect(
    broker: Broker,
    *,
    client_id: str,
    persistent: bool,
    terms: MqttTerms = PLAIN,
    will: str | None = None,
    in_hand: int = MAX_IN_HAND,
    max_payload: int = MAX_PAYLOAD,
) -> MqttConnection:
    """Connect with MQTT 5, else 3.1.1; ``async with`` closes the connection.

    The arguments are those of `MqttConnection`; only an MQTT 5 broker is told the last two.

    Raises:
        BrokerError: neither version works.
        ConfigurationError: a file of `terms` cannot be read, or is not applicable to this broker.
    """
    for protocol in (MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311):
        connection = MqttConnection(
            broker,
            client_id=client_id,
            persistent=persistent,
            terms=terms,
            will=will,
            in_hand=in_hand,
            max_payload=max_payload,
            protocol=protocol,
        )
        try:
            await connection.open()
        except ProtocolRefused as error:
            if protocol is MQTTProtocolVersion.MQTTv311:
                raise
            log.debug("trying MQTT 3.1.1: %s", error)
        else:
            return connection
    raise AssertionError("unreachable")
