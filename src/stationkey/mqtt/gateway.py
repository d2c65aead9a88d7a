"""The MQTT edge: receives requests and publishes answers, and loses none if broker or process stop.

A request is acknowledged only after the broker has its answer: until then the broker keeps it in the persistent session
and redelivers it.

**Many stations** share one session, in which the broker sends message after message. A message that is kept waiting
keeps others waiting behind it, so a station's flood must be handled, not held back:

- A station's requests beyond its share of the places are rejected by the service, at once (`station_places_taken`), and
  then acknowledged; one that was answered before gets its answer again. So at-least-once holds.
- Its copies of a request in flight are acknowledged without an answer beyond a few.
- Statuses are handled in the order of arrival. In a site they leave the places of requests to wait in a room of their
  own. What one station sends beyond its share of that is dropped and counted, the latest first, as with a single
  station. If the stations together fill the room, nothing more is received until a status is done: none is lost.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Final, NoReturn

from stationkey.config.settings import MqttTerms
from stationkey.contract.messages import (
    MAX_PAYLOAD,
    CertificateInstallationStatus,
    GenerateCsrRequest,
    GenerateCsrResponse,
    decode,
    encode,
)
from stationkey.errors import BrokerError, ConfigurationError, MessageError, ShardLost, StationKeyError
from stationkey.mqtt.answering import Answering, InHand, about
from stationkey.mqtt.bounds import MAX_IN_HAND, STATUS_ROOM
from stationkey.mqtt.connection import (
    OFFLINE,
    ONLINE,
    PLAIN,
    SESSION_EXPIRY,
    ConnectionLost,
    Message,
    MqttConnection,
    Overrun,
    connect,
)
from stationkey.mqtt.retained import RetainedTopic
from stationkey.mqtt.topics import Stations, availability
from stationkey.mqtt.url import Broker
from stationkey.mqtt.waiting import CONNECT_TIMEOUT, unless
from stationkey.system.backoff import Backoff
from stationkey.system.counters import Counts
from stationkey.system.tasks import keep_running, note_failure, unforeseen

log = logging.getLogger(__name__)

COPIES_SHARE: Final = 4
"""Divisor of the places that copies of requests in flight may take. A copy waits for the answer to the first: one id
sent repeatedly would block all others while a key is made. In a site, one station's copies get the square of it."""
FIRST_DELAY: Final = 0.1
LAST_DELAY: Final = 30.0
"""Seconds before the first reconnect, and at most; doubled each time, and shortened by up to a half at random so that
the stations of a site do not reconnect together."""
GIVE_UP_AFTER: Final = 5
"""Connections that may end while an answer is the only one in flight, before that answer is given up: a broker that
cannot report a refusal closes the connection each time."""
QUOTA_FIRST: Final = 1.0
QUOTA_LAST: Final = 60.0
"""Seconds before an answer is published again for which the broker had no room; doubled each time."""
STEADY: Final = 10.0
"""Seconds that a connection must last so that the reconnect delay starts over."""
UNSTEADY_DELAY: Final = 1.0
"""Longest reconnect delay in seconds after shorter connections: each may cost a TLS handshake signed by the TPM."""
SIGN_OFF: Final = 1.0
"""Seconds allowed to publish ``offline`` on the availability topic."""


class MqttEdge:
    """Passes requests from a broker to a service, and its answers back.

    Args:
        broker: where the broker is.
        service: answers the requests.
        client_id: client identifier of the persistent session; the same at every start.
        topic_prefix: of all topics; see `stationkey.mqtt.topics.topics`.
        stations: the stations that are served; by default the single one, with `topic_prefix`.
        serves: which of these stations are served; by default all. The messages of others are acknowledged and
            dropped: they are of another shard, whose session gets them, too.
        stale: topic filters to unsubscribe from: an earlier run's, with other stations.
        terms: TLS, credentials and availability topic.
        queue: messages in flight; the broker queues the rest.
        payload_bytes: largest payload.
        retained: a message to publish retained, or None.
        failures: counts failures of its tasks.
        on_ready: called after each subscription.
        on_away: called whenever a connection is lost or fails.
        connect: makes a connection.

    Raises:
        ConfigurationError: a topic is invalid.
    """

    def __init__(
        self,
        broker: Broker,
        service: Answering,
        *,
        client_id: str,
        topic_prefix: str = "",
        stations: Stations | None = None,
        serves: Callable[[str], bool] = lambda _: True,
        stale: Sequence[str] = (),
        terms: MqttTerms = PLAIN,
        queue: int = MAX_IN_HAND,
        payload_bytes: int = MAX_PAYLOAD,
        retained: RetainedTopic | None = None,
        failures: Counts | None = None,
        on_ready: Callable[[], None] = lambda: None,
        on_away: Callable[[], None] = lambda: None,
        connect: Callable[..., Coroutine[Any, Any, MqttConnection]] = connect,
    ) -> None:
        self._broker = broker
        self._dial = connect
        self._service = service
        self._client_id = client_id
        self._stations = stations = Stations(topic_prefix) if stations is None else stations
        self._serves = serves
        self._stale = stale
        self._terms = terms
        topic = terms.availability_topic
        self._availability = None if topic is None else availability(topic_prefix, topic, site=stations.several)
        self._announces = False
        self._told_unavailable = False
        self._retained = retained
        self._failures = failures or Counts()
        self._on_ready = on_ready
        self._on_away = on_away
        self._connection: MqttConnection | None = None
        self._connected = asyncio.Event()
        """Set while connected, and from `_ending` on."""
        self._ending = False
        self._queue = queue
        self._room = STATUS_ROOM * queue if stations.several else 0
        self._copies = max(1, queue // COPIES_SHARE ** (2 if stations.several else 1))
        self._payload_bytes = payload_bytes
        self._free = asyncio.Semaphore(queue)
        self._free_in_room = asyncio.Semaphore(self._room)
        self._in_hand: set[InHand] = set()
        self._suspects: Counter[tuple[str, str]] = Counter()
        """Answers that were in flight when a connection ended, and how often each was the only one."""
        self._one_at_a_time = asyncio.Lock()
        self._given_up: deque[tuple[str, str]] = deque(maxlen=queue)
        self._told: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        """Whether it is connected and subscribed."""
        return self._connection is not None

    @property
    def in_hand(self) -> int:
        """Number of messages in flight."""
        return len(self._in_hand)

    @property
    def waiting(self) -> int:
        """Number of received messages that wait to be processed."""
        return 0 if self._connection is None else self._connection.waiting

    async def run(self, stop: asyncio.Event, *, drain: float) -> None:
        """Serve until `stop` is set; then finish the messages in flight.

        Args:
            stop: ends the service.
            drain: seconds allowed to answer messages in flight. The broker redelivers the others at the next start.
        """
        self._free = asyncio.Semaphore(self._queue)  # a failed run may have left places taken
        self._free_in_room = asyncio.Semaphore(self._room)
        self._spawn(keep_running(self._deliver_recorded, "deliver-recorded", self._failures), "deliver-recorded")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        backoff, now = Backoff(FIRST_DELAY, LAST_DELAY, jitter=0.5), asyncio.get_running_loop().time
        try:
            while not stop.is_set():
                since = math.inf
                try:
                    connection = await unless(stopping, self._connect())
                    if connection is None:
                        break
                    since = now()
                    backoff.lower(UNSTEADY_DELAY)
                    await self._serve(connection, stopping, drain)
                except Exception as raised:  # noqa: BLE001 - nothing that a broker causes ends more than this connection
                    self._on_away()
                    if now() - since > STEADY:
                        backoff.reset()
                    error, wait = self._judged(raised), backoff.next()
                    log.warning("%s; trying again in %.1f s", error, wait, extra={"reason": error.reason})
                    await asyncio.wait([stopping], timeout=wait)
            await self._drain(drain)  # without a connection, messages in flight are at least recorded
        finally:
            stopping.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _judged(self, error: Exception) -> StationKeyError:
        """Return the error that ended a connection; count it if it is a fault of the broker or of ours."""
        match error:
            case ConnectionLost(reason="out_of_memory" | "internal_error" as reason):
                with suppress(Exception):
                    self._failures.add("mqtt", reason)
            case ConnectionLost(reason="broker_violates_protocol"):
                self._service.pass_over(error)
            case BrokerError() | ConfigurationError():  # a secret or a certificate may be being replaced
                pass
            case _:
                note_failure(error, "mqtt", self._failures)
                cause = unforeseen(error)
                error = BrokerError(f"the connection ended: {cause}", reason=cause.reason)
        return error

    async def _connect(self) -> MqttConnection:
        """Return a connection that is subscribed."""
        connection = await self._open()
        self._tell_limits(connection)
        try:
            for topic_filter in self._stations.filters:
                await connection.subscribe(topic_filter)
            for topic_filter in self._stale:
                await connection.unsubscribe(topic_filter)
            await self._announce(connection, ONLINE)
        except BaseException:
            await self._sign_off(connection)
            await connection.close()
            raise
        return connection

    def _tell_limits(self, connection: MqttConnection) -> None:
        """Log once per run which limits the broker sets, and the consequence."""
        limits = connection.limits
        short = limits.session_expiry is not None and limits.session_expiry < SESSION_EXPIRY
        notes = {
            "takes QoS 0 only: a lost answer is not sent again": limits.maximum_qos < 1,
            f"keeps the session for {limits.session_expiry} s only: later requests are lost": short,
        }
        for words in [words for words, true in notes.items() if true and words not in self._told]:
            self._told.add(words)
            grant = BrokerError(f"the broker {words}", reason="broker_grants_less", transient=False)
            log.warning("%s", grant, extra={"reason": grant.reason})

    async def _open(self) -> MqttConnection:
        """Connect, with a Last Will if there is an availability topic and the broker accepts one."""
        open_ = partial(
            self._dial,
            self._broker,
            client_id=self._client_id,
            persistent=True,
            terms=self._terms,
            in_hand=self._queue + self._room,
            max_payload=self._payload_bytes,
            **({"max_received": 1 + STATUS_ROOM} if self._room else {}),
        )
        self._announces = self._availability is not None
        try:
            return await open_(will=self._availability)
        except BrokerError as error:
            if error.reason != "broker_refuses" or not self._announces:
                raise
            try:  # some brokers refuse the client for its Last Will topic; Mosquitto only does not publish it
                connection = await open_()
            except BrokerError:
                raise error from None
        self._announces = False
        refusal = BrokerError("the broker refuses the Last Will", reason="publication_refused", transient=False)
        self._not_announced(refusal)
        return connection

    async def _announce(self, connection: MqttConnection, state: bytes) -> None:
        """Publish `state`, retained, on the availability topic, if the broker allows it."""
        if self._availability is None or not self._announces:
            return
        try:
            await connection.publish(self._availability, state, retain=True)
        except ConnectionLost:
            raise
        except BrokerError as error:
            self._not_announced(error)

    def _not_announced(self, error: BrokerError) -> None:
        """Log it once; requests are served anyway."""
        if not self._told_unavailable:
            log.warning("availability is not published: %s", error, extra={"reason": error.reason})
        self._told_unavailable = True

    async def _sign_off(self, connection: MqttConnection) -> None:
        """Publish ``offline``, because a DISCONNECT deletes the Last Will [MQTT 5 3.14.4]."""
        with suppress(ConnectionLost, TimeoutError):
            async with asyncio.timeout(SIGN_OFF):
                await self._announce(connection, OFFLINE)

    async def _serve(self, connection: MqttConnection, stopping: asyncio.Task[bool], drain: float) -> None:
        """Serve on one connection until it is lost, or until stopped and drained."""
        async with connection:
            self._connection = connection
            self._connected.set()
            self._on_ready()
            keeping = self._retained and asyncio.create_task(
                keep_running(partial(self._retained.keep, connection), "retained", self._failures), name="retained"
            )
            try:
                await unless(stopping, self._receive(connection))
                await self._drain(drain)
                await self._sign_off(connection)
            finally:
                if keeping:
                    keeping.cancel()
                self._disconnected(connection)

    def _disconnected(self, connection: MqttConnection) -> None:
        if self._connection is connection:
            self._connection = None
            if not self._ending:
                self._connected.clear()

    async def _receive(self, connection: MqttConnection) -> NoReturn:
        while True:
            try:
                message = await connection.receive()
            except Overrun:
                # What is not acknowledged before the connection ends comes again with the rest. But nothing waits for
                # long: a status may be in hand until the TPM is back.
                if self._tasks:
                    await asyncio.wait(self._tasks, timeout=CONNECT_TIMEOUT)
                raise
            station = self._stations.of(message.topic)
            if station is None:
                await self._leave(message)
                continue
            if not self._serves(station):
                message.acknowledge()
                continue
            if any(in_hand.takes_over(message) for in_hand in self._in_hand):
                continue
            acquire = self._free.acquire()
            # Messages in flight may wait for the next connection, so a loss must be noticed meanwhile.
            if not await (unless(connection.lost, acquire) if self._free.locked() else acquire):
                continue  # not acknowledged, so the broker redelivers it
            try:
                self._spawn(self._handle(InHand(message, station, self._free)), "answer")
            except BaseException:
                self._free.release()
                raise

    async def _leave(self, message: Message) -> None:
        """Ignore a message of a station whose name is not served, or on another topic, and unsubscribe from the latter.

        The broker's session keeps the subscriptions of an earlier run with another prefix, or of another client with
        our client id.
        """
        if flaw := self._stations.flaw(message.topic):
            words = f"the station's name in the topic {message.topic[:80]!r} {flaw}"
            self._service.pass_over(MessageError(words, reason="station_invalid"))
            message.acknowledge()
            return
        words = f"received on {message.topic[:80]!r}, which is not subscribed"
        self._service.pass_over(MessageError(words, reason="topic_foreign"))
        message.acknowledge()
        with suppress(ConnectionLost):  # then with the next such message
            await message.connection.unsubscribe(message.topic)

    async def _drain(self, seconds: float) -> None:
        """Finish the messages in flight. From now on nothing waits for another connection."""
        self._ending = True
        self._connected.set()
        if not self._tasks:
            return
        _, left = await asyncio.wait(self._tasks, timeout=seconds)
        for in_hand in self._in_hand:
            log.warning("not answered before shutdown; the broker will redeliver it", extra=in_hand.about())
        for task in left:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, in_hand: InHand) -> None:
        """Answer one message, and acknowledge it once the broker has the answer."""
        try:
            self._in_hand.add(in_hand)
            response = await self._respond(in_hand)
            if response is None or await self._deliver(response, in_hand.station):
                in_hand.message.acknowledge()
        except ShardLost as error:  # not acknowledged: the broker redelivers it to the daemon that answers
            log.warning("left to another daemon: %s", error, extra=in_hand.about() | {"reason": error.reason})
        except MemoryError as error:  # temporary: the message is redelivered over a new connection
            note_failure(error, "answer", self._failures, **in_hand.about())
            in_hand.message.connection.abandon(error)
        except Exception as error:  # noqa: BLE001 - the boundary of this task
            # Acknowledged anyway: the broker would redeliver it forever.
            note_failure(error, "answer", self._failures, **in_hand.about())
            in_hand.message.acknowledge()
        finally:
            self._in_hand.discard(in_hand)
            in_hand.place.release()

    async def _make_way(self, in_hand: InHand) -> None:
        """In a site, have a status leave its place to requests."""
        if self._room:
            await self._free_in_room.acquire()
            in_hand.place.release()
            in_hand.place = self._free_in_room

    async def _respond(self, in_hand: InHand) -> GenerateCsrResponse | None:
        station = in_hand.station
        try:
            message = decode(in_hand.message.payload, max_payload=self._payload_bytes)
        except MessageError as error:
            in_hand.request_id = error.request_id
            if error.request_id is not None:
                return await self._service.reject(error.request_id, error, station=station)
            self._service.pass_over(error, station=station)
            return None
        match message:
            case GenerateCsrRequest():
                in_hand.request_id = message.id
                if in_hand.message.redelivered and (station, message.id) in self._given_up:
                    return None
                if self._service.is_surplus(message, most=self._copies, station=station):
                    log.warning("duplicate of a request in flight; not answered twice", extra=in_hand.about())
                    return None
                waited = asyncio.get_running_loop().time() - in_hand.message.received
                return await self._service.answer(message, station=station, waited=waited)
            case CertificateInstallationStatus():
                await self._make_way(in_hand)
                await self._service.note_status(message, station=station, retained=in_hand.message.retained)
        return None

    async def _deliver(self, response: GenerateCsrResponse, station: str) -> bool:
        """Publish an answer to a station, over new connections if needed.

        Returns:
            Whether the request can be acknowledged; False if the service ends first.
        """
        payload, suspect = encode(response), (station, response.id)
        told = about(station, response.id)
        quota = Backoff(QUOTA_FIRST, QUOTA_LAST)
        try:
            while True:
                await self._connected.wait()
                if self._connection is None and self._ending:
                    log.warning("answer not published; it is published after the next start", extra=told)
                    return False
                try:
                    await self._publish(suspect, payload)
                except ConnectionLost:
                    if self._suspects[suspect] < GIVE_UP_AFTER:
                        continue
                    words = f"each of {GIVE_UP_AFTER} connections ended when an answer of {len(payload)} bytes was sent"
                    log.error("answer not delivered: %s", words, extra=told | {"reason": "publication_too_large"})
                    self._given_up.append(suspect)  # its request could not be acknowledged, and is redelivered
                    # Recorded as delivered below although it was not: else it would end five connections at every
                    # start.
                except BrokerError as error:
                    if error.transient and self._ending:
                        return False  # the broker redelivers the request
                    if error.transient:
                        await asyncio.sleep(quota.next())
                        continue
                    words = f"answer of {len(payload)} bytes not delivered"
                    log.error("%s: %s", words, error, extra=told | {"reason": error.reason})
                    return True
                await self._service.delivered(response, station=station)
                return True
        finally:
            self._suspects.pop(suspect, None)

    async def _publish(self, suspect: tuple[str, str], payload: bytes) -> None:
        """Publish an answer; alone, while any answer in flight was in flight when a connection ended.

        Raises:
            ConnectionLost: noted in `_suspects`, which counts how often it was the only one in flight.
            BrokerError: the broker refuses it.
        """
        alone = bool(self._suspects)
        async with self._one_at_a_time if alone else nullcontext():
            connection = self._connection
            if connection is None:
                raise ConnectionLost("the connection ended", reason="connection_lost")
            try:
                await connection.publish(self._stations.response_topic(suspect[0]), payload)
            except ConnectionLost:
                self._suspects[suspect] += alone
                self._disconnected(connection)
                raise

    async def _deliver_recorded(self) -> None:
        """Publish the answers that an earlier run could not deliver."""
        while self._connection is None:  # it may be lost again before this task runs
            if self._ending:
                return
            await self._connected.wait()
        try:
            for station, response in await self._service.undelivered():
                log.info("publishing an answer of an earlier run", extra=about(station, response.id))
                await self._deliver(response, station)
        except StationKeyError as error:
            log.error("answers of an earlier run cannot be published: %s", error, extra={"reason": error.reason})
