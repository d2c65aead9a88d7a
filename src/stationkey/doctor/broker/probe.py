"""A visit to the broker, with the daemon's identity and without any, to find out what each may do.

What is published is a message that the contract has everybody pass over (decision 3: another `name` than ours). No
request is made, nothing is retained, and the daemon's own session is left as it is.

The doctor has a client id of its own; but a broker may take the user name in its place (``use_username_as_clientid``),
and then it has one session for us and the daemon. To begin anew would be to end it, with all that waits in it. So the
doctor resumes whatever there is, acknowledges nothing but what it published itself, and ends only a session that it has
begun. While the daemon runs, it goes as soon as it finds itself in its place: the daemon connects anew, and nothing is
lost.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Final

from stationkey.config.settings import MqttTerms
from stationkey.contract.messages import REQUEST_TOPIC, RESPONSE_TOPIC
from stationkey.errors import BrokerError, StationKeyError
from stationkey.mqtt.connection import ConnectionLost, MqttConnection, connect
from stationkey.mqtt.topics import Stations
from stationkey.mqtt.url import Broker

_LOGIN: Final = 4.5
"""Seconds. Some brokers keep silent to a CONNECT of MQTT 5; what they say to one of 3.1.1 is waited for as well."""
_TALK: Final = 3.0
_ECHO: Final = 0.3
"""Seconds more for the broker to bring a message, after it has answered what was said later."""
_ROUNDS: Final = 14
_SLOW_START: Final = 6
"""Rounds in which a Linux kernel still acknowledges at once [tcp(7), TCP_QUICKACK]."""


@dataclass(slots=True, kw_only=True)
class Rights:
    """What an identity may do at the broker; None where that was not found out.

    Attributes:
        asks: it may publish on the topic of requests.
        answers: it may publish on the topic of responses.
        listens: it was brought what another published on the topic of responses.
    """

    asks: bool | None = None
    answers: bool | None = None
    listens: bool | None = None


@dataclass(slots=True, kw_only=True)
class Visit:
    """What was seen at a broker so far.

    Attributes:
        site: whether the topics are those of a station that the doctor made up.
        filters: the topic filters that the daemon subscribes to.
        at: the broker, as the options of Mosquitto's clients name it.
        refused: why there is no connection.
        named: whether we have a user name or a certificate there.
        maximum_qos: that the broker grants a message of ours.
        why: what the broker said where we may not do what we must.
        too_large: what the broker said to a message of `LARGE` octets, or to a short one where `own` does not say that
            we may answer, for which it is too large; or an empty text.
        josev: whether somebody is subscribed to the topic of responses; None where the broker does not say.
        retained: topics that a message lies on.
        single: seconds that one exchange takes; `pair`: two at once.
        anonymous: what somebody without a name may do; None where he is not let in.
        anonymous_why: why that is not known, or an empty text.
        in_its_place: we were taken for the running daemon, and so went at once.
        cut: why the visit ended before its end, or an empty text.
    """

    requests: str = REQUEST_TOPIC
    responses: str = RESPONSE_TOPIC
    site: bool = False
    filters: tuple[str, ...] = (REQUEST_TOPIC,)
    at: str = ""
    refused: StationKeyError | None = None
    named: bool = False
    mqtt5: bool = True
    maximum_qos: int = 2
    own: Rights = field(default_factory=Rights)
    why: str = ""
    too_large: str = ""
    subscribed: bool | None = None
    josev: bool | None = None
    retained: tuple[str, ...] = ()
    single: float | None = None
    pair: float | None = None
    anonymous: Rights | None = None
    anonymous_why: str = ""
    in_its_place: bool = False
    cut: str = ""


_OURS: Final = "stationkey_doctor"
_STATION: Final = "doctor"
"""In a site, any level of the station's name that the doctor makes up."""
LARGE: Final = 4096
"""Octets. An answer with a CSR of RSA-3072 has some 2000."""


def _harmless(octets: int = 0) -> bytes:
    """A message that is nobody's business [contract, decision 3], and that is known again; of a length at the least."""
    return json.dumps({"name": _OURS, "type": "probe", "id": str(uuid.uuid4()), "data": "." * octets}).encode()


def _client_id() -> str:
    return f"stationkey-doctor-{uuid.uuid4().hex[:8]}"


async def visit(broker: Broker, terms: MqttTerms, stations: Stations, *, daemon_running: bool) -> Visit:
    """Look around at the broker, with the daemon's identity and without any; in a site, as a made-up station."""
    station, client_id = stations.example(_STATION), _client_id()
    requests, responses = stations.request_topic(station), stations.response_topic(station)
    named = terms.username is not None or terms.certificate_file is not None
    seen = Visit(requests=requests, responses=responses, at=f"-h {broker.host} -p {broker.port}", named=named)
    seen.site, seen.filters = stations.several, stations.filters
    nobody = MqttTerms(ca_file=terms.ca_file, server_name=terms.server_name)
    connection, stranger = await asyncio.gather(
        _enter(broker, terms, client_id, persistent=named, goes_if_resumed=daemon_running),
        _enter(broker, nobody, _client_id()) if named else asyncio.sleep(0),
    )
    if isinstance(stranger, MqttConnection):
        seen.anonymous = Rights()
    elif stranger is not None and stranger.reason != "broker_refuses":
        seen.anonymous_why = stranger.message
    if isinstance(connection, StationKeyError):
        seen.refused = connection
    else:
        begun = named and not connection.resumed
        seen.mqtt5, seen.maximum_qos = connection.is_v5, connection.limits.maximum_qos
        seen.in_its_place = connection.resumed and daemon_running
        try:
            if not seen.in_its_place:
                await _Round(connection, seen).look(stranger if isinstance(stranger, MqttConnection) else None)
        finally:
            cut = connection.lost.done()
            await connection.close(forget=begun)
        if begun and (cut or not connection.is_v5):
            # No DISCONNECT of ours ended the session: a clean one takes its place, and ends with its connection.
            clean = await _enter(broker, terms, client_id)
            if isinstance(clean, MqttConnection):
                await clean.close()
    if isinstance(stranger, MqttConnection):
        await stranger.close()
    return seen


async def _enter(
    broker: Broker, terms: MqttTerms, client_id: str, *, persistent: bool = False, goes_if_resumed: bool = False
) -> MqttConnection | StationKeyError:
    try:
        async with asyncio.timeout(_LOGIN):
            connection = await connect(broker, client_id=client_id, persistent=persistent, terms=terms)
    except TimeoutError:
        hint = "is it an MQTT broker?"
        return BrokerError(f"{broker} accepts the connection and is silent", reason="broker_unreachable", hint=hint)
    except StationKeyError as error:
        return error
    if goes_if_resumed and connection.resumed:
        await connection.close()
    return connection


async def _until_lost(look: Awaitable[None]) -> str:
    """Look for some seconds; return why that ended before its end, or an empty text."""
    try:
        async with asyncio.timeout(_TALK):
            await look
    except (TimeoutError, ConnectionLost) as error:
        return str(error) or "the broker stopped answering"
    return ""


def _usual(seconds: list[float]) -> float:
    """What three of four rounds take at the least: a busy machine adds to some of them, Nagle's algorithm to all."""
    settled = sorted(seconds[_SLOW_START:])
    return settled[len(settled) // 4]


async def _subscribe(connection: MqttConnection, topics: Sequence[str]) -> None:
    for topic in topics:
        await connection.subscribe(topic)


class _Round:
    """A look around on one connection; what was seen so far is in `seen`, whatever comes."""

    def __init__(self, connection: MqttConnection, seen: Visit) -> None:
        self._connection = connection
        self._seen = seen

    async def look(self, stranger: MqttConnection | None) -> None:
        """Look with our identity, then without any; last with what may end the connection."""
        self._seen.cut = await _until_lost(self._look_around())
        if self._seen.too_large:  # what is refused for its length says nothing of rights
            self._seen.anonymous, self._seen.anonymous_why = None, self._seen.too_large
        elif stranger is not None:
            await _until_lost(self._try_as(stranger))
        if self._seen.own.answers and not self._connection.lost.done():
            self._seen.too_large = await _until_lost(self._weigh()) or self._seen.too_large

    async def _look_around(self) -> None:
        """What we must be allowed to, then what we must not, then how quick it is."""
        seen, own = self._seen, self._seen.own
        own.answers, seen.josev, refusal = await self._publish(self._connection, seen.responses, _harmless())
        if refusal is not None and refusal.reason == "publication_too_large":
            own.answers, seen.too_large = None, refusal.message
            return
        seen.why = "" if refusal is None else refusal.message
        own.asks, _, _ = await self._publish(self._connection, seen.requests, _harmless())
        try:
            await _subscribe(self._connection, seen.filters)
        except ConnectionLost:
            raise
        except BrokerError as error:
            seen.subscribed, seen.why = False, error.message
            return
        seen.subscribed = True
        own.asks = await self._passes_on(own.asks, self._connection)
        await self._measure()

    async def _passes_on(self, acknowledged: bool, sender: MqttConnection) -> bool:
        """Whether the broker brings us a request of `sender`: it may acknowledge one, and pass nothing on."""
        probe = _harmless()
        if acknowledged:
            await self._publish(sender, self._seen.requests, probe)
        return await self._brought(self._connection, self._seen.filters, probe)

    async def _publish(
        self, connection: MqttConnection, topic: str, payload: bytes
    ) -> tuple[bool, bool | None, BrokerError | None]:
        """Whether the broker takes it, whether anybody gets it (where it says so), and why it does not take it."""
        try:
            heard = await connection.publish(topic, payload)
        except ConnectionLost:
            raise
        except BrokerError as error:
            return False, None, error
        return True, heard if connection.is_v5 else None, None

    async def _brought(self, connection: MqttConnection, topics: Sequence[str], probe: bytes) -> bool:
        """Whether the broker brings a message on one of `topics`; what lies there is noted by the way.

        A subscription is answered after what was published before it, so hardly anything is waited for besides.
        """
        await _subscribe(connection, topics)
        try:
            async with asyncio.timeout(_ECHO):
                while True:
                    message = await connection.receive()
                    if _OURS.encode() in message.payload:  # else it may be a request that waits for the daemon
                        message.acknowledge()
                    if message.retained:
                        self._seen.retained = (*dict.fromkeys((*self._seen.retained, message.topic)),)
                    if message.payload == probe:
                        return True
        except TimeoutError:
            return False

    async def _measure(self) -> None:
        """One exchange, and two at once: Nagle's algorithm holds the second answer until the first is acknowledged."""
        singles, pairs = [], []
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            await self._connection.subscribe(self._seen.filters[0])
            middle = time.perf_counter()
            await asyncio.gather(*(self._connection.subscribe(self._seen.filters[0]) for _ in range(2)))
            singles.append(middle - begin)
            pairs.append(time.perf_counter() - middle)
        self._seen.single, self._seen.pair = _usual(singles), _usual(pairs)

    async def _weigh(self) -> None:
        _, _, refusal = await self._publish(self._connection, self._seen.responses, _harmless(LARGE))
        self._seen.too_large = "" if refusal is None else refusal.message

    async def _try_as(self, stranger: MqttConnection) -> None:
        """What somebody without a name may do, with our help to be listened to."""
        seen, rights, probe = self._seen, Rights(), _harmless()
        try:
            await stranger.subscribe(seen.responses)
            taken, _, _ = await self._publish(self._connection, seen.responses, probe)
            rights.listens = await self._brought(stranger, (seen.responses,), probe) if taken else None
        except ConnectionLost:
            raise
        except BrokerError:
            rights.listens = False
        answers, _, _ = await self._publish(stranger, seen.responses, _harmless())
        rights.answers = answers if stranger.is_v5 or not answers else None
        rights.asks, _, _ = await self._publish(stranger, seen.requests, _harmless())
        if rights.asks and seen.subscribed:
            rights.asks = await self._passes_on(True, stranger)
        seen.anonymous = rights
