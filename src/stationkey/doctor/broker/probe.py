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
import dataclasses
import json
import time
import uuid
from dataclasses import dataclass
from typing import Final

from stationkey.config.settings import MqttTerms
from stationkey.contract.messages import REQUEST_TOPIC, RESPONSE_TOPIC
from stationkey.errors import BrokerError, StationKeyError
from stationkey.mqtt.connection import ConnectionLost, MqttConnection, connect
from stationkey.mqtt.topics import topics
from stationkey.mqtt.url import Broker

_LOGIN: Final = 4.5
"""Seconds. Some brokers keep silent to a CONNECT of MQTT 5; what they say to one of 3.1.1 is waited for as well."""
_TALK: Final = 3.0
_ECHO: Final = 0.3
"""Seconds more for the broker to bring a message, after it has answered what was said later."""
_ROUNDS: Final = 14
_SLOW_START: Final = 6
"""Rounds in which a Linux kernel still acknowledges at once [tcp(7), TCP_QUICKACK]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """What an identity may do at the broker.

    Attributes:
        asks: it may publish on the topic of requests; None where that was not found out.
        answers: it may publish on the topic of responses; None likewise.
        listens: it was brought what another published on the topic of responses; None likewise.
    """

    asks: bool | None = None
    answers: bool | None = None
    listens: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What was seen at a broker.

    Attributes:
        requests: the topic that we read.
        responses: the topic that we write to.
        at: the broker, as the options of Mosquitto's clients name it.
        refused: why there is no connection, or None.
        named: whether we have a user name or a certificate there.
        mqtt5: whether MQTT 5 is spoken.
        maximum_qos: that the broker grants a message of ours.
        own: what we may do.
        why: what the broker said where we may not do what we must.
        too_large: what the broker said to a message of `LARGE` octets where it does not take it, or an empty text.
        subscribed: whether a subscription to the topic of requests is granted.
        josev: whether somebody is subscribed to the topic of responses; None where the broker does not say.
        retained: topics that a message lies on.
        single: seconds that one exchange takes, or None.
        pair: seconds that two at once take, or None.
        anonymous: what somebody without a name may do; None where he is not let in.
        anonymous_why: why that is not known, or an empty text.
        in_its_place: we were taken for the running daemon, and so went at once.
        cut: why the visit ended before its end, or an empty text.
    """

    requests: str = REQUEST_TOPIC
    responses: str = RESPONSE_TOPIC
    at: str = ""
    refused: StationKeyError | None = None
    named: bool = False
    mqtt5: bool = True
    maximum_qos: int = 2
    own: Rights = Rights()
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


def _usual(seconds: list[float]) -> float:
    """What three of four rounds take at the least: a busy machine adds to some of them, Nagle's algorithm to all."""
    settled = sorted(seconds[_SLOW_START:])
    return settled[len(settled) // 4]


_OURS: Final = "stationkey_doctor"
LARGE: Final = 4096
"""Octets. An answer with a CSR of RSA-3072 has some 2000."""


def _harmless(octets: int = 0) -> bytes:
    """A message that is nobody's business [contract, decision 3], and that is known again; of a length at the least."""
    return json.dumps({"name": _OURS, "type": "probe", "id": str(uuid.uuid4()), "data": "." * octets}).encode()


def _client_id() -> str:
    return f"stationkey-doctor-{uuid.uuid4().hex[:8]}"


async def visit(broker: Broker, terms: MqttTerms, prefix: str, *, daemon_running: bool) -> Visit:
    """Look around at the broker, with the daemon's identity and without any."""
    client_id, at = _client_id(), f"-h {broker.host} -p {broker.port}"
    requests, responses = topics(prefix)
    nothing = Visit(requests=requests, responses=responses, at=at)
    named = terms.username is not None or terms.certificate_file is not None
    stranger = asyncio.create_task(_as_a_stranger(broker, terms), name="stranger") if named else None
    try:
        async with asyncio.timeout(_LOGIN):
            connection = await connect(broker, client_id=client_id, persistent=named, terms=terms)
    except TimeoutError:
        silent = BrokerError(
            f"{broker} takes the connection and says nothing", reason="broker_unreachable", hint="is it an MQTT broker?"
        )
        return dataclasses.replace(nothing, refused=silent, named=named, anonymous=await _let_in(stranger))
    except StationKeyError as error:
        return dataclasses.replace(nothing, refused=error, named=named, anonymous=await _let_in(stranger))
    if connection.resumed and daemon_running:
        await connection.close()
        anonymous = await _let_in(stranger)
        return dataclasses.replace(nothing, named=True, mqtt5=connection.is_v5, in_its_place=True, anonymous=anonymous)
    cut = False
    try:
        begin = dataclasses.replace(
            nothing, named=named, mqtt5=connection.is_v5, maximum_qos=connection.limits.maximum_qos
        )
        look = _Round(connection, begin)
        try:
            async with asyncio.timeout(_TALK):
                await look.look_around()
        except (TimeoutError, ConnectionLost) as error:
            look.note(cut=str(error) or "the broker stopped answering")
        if stranger is not None:
            await _take_the_stranger_round(stranger, look)
        await look.weigh()
    finally:
        cut = connection.lost.done()
        await connection.close(forget=named and not connection.resumed)
    if named and not connection.resumed and (cut or not connection.is_v5):
        await _forget(broker, terms, client_id)
    return look.seen


async def _forget(broker: Broker, terms: MqttTerms, client_id: str) -> None:
    """End a session that no DISCONNECT of ours ended: a clean one takes its place, and ends with its connection."""
    try:
        async with asyncio.timeout(_LOGIN):
            await (await connect(broker, client_id=client_id, persistent=False, terms=terms)).close()
    except (TimeoutError, StationKeyError):
        pass  # the broker ends it by its own rules


async def _as_a_stranger(broker: Broker, terms: MqttTerms) -> MqttConnection | str:
    """A connection without a name; or why there is none, where that says nothing. An empty text: not let in."""
    nobody = MqttTerms(ca_file=terms.ca_file, server_name=terms.server_name)
    try:
        async with asyncio.timeout(_LOGIN):
            return await connect(broker, client_id=_client_id(), persistent=False, terms=nobody)
    except TimeoutError:
        return "the broker does not answer"
    except StationKeyError as error:
        return "" if error.reason == "broker_refuses" else error.message


async def _let_in(stranger: asyncio.Task[MqttConnection | str] | None) -> Rights | None:
    """Whether somebody without a name is let in where we are not; then sent away again."""
    there = "" if stranger is None else await stranger
    if isinstance(there, str):
        return None
    await there.close()
    return Rights()


async def _take_the_stranger_round(stranger: asyncio.Task[MqttConnection | str], look: _Round) -> None:
    """See what somebody without a name may do, while we are there to be listened to."""
    there = await stranger
    if isinstance(there, str):
        look.note(anonymous_why=there)
        return
    async with there:
        try:
            async with asyncio.timeout(_TALK):
                look.note(anonymous=await look.rights_of(there))
        except (TimeoutError, ConnectionLost):
            look.note(anonymous=Rights())


class _Round:
    """A look around on one connection; what was seen so far is in `seen`, whatever comes."""

    def __init__(self, connection: MqttConnection, begin: Visit) -> None:
        self._connection = connection
        self._requests = begin.requests
        self._responses = begin.responses
        self.seen = begin

    def note(self, **what: object) -> None:
        self.seen = dataclasses.replace(self.seen, **what)  # type: ignore[arg-type] # names and types are those of Visit

    async def look_around(self) -> None:
        """What we must be allowed to, then what we must not, then how quick it is."""
        answers, josev, why = await self._publish(self._connection, self._responses, _harmless())
        self.note(own=Rights(answers=answers), josev=josev, why=why)
        asks, _, _ = await self._publish(self._connection, self._requests, _harmless())
        self.note(own=Rights(answers=answers, asks=asks))
        try:
            await self._connection.subscribe(self._requests)
        except ConnectionLost:
            raise
        except BrokerError as error:
            self.note(subscribed=False, why=error.message)
            return
        self.note(subscribed=True)
        if asks:  # acknowledged; a broker may do so and pass nothing on
            probe = _harmless()
            await self._publish(self._connection, self._requests, probe)
            brought = await self._brought(self._connection, self._requests, probe)
            self.note(own=Rights(answers=answers, asks=brought))
        else:
            await self._brought(self._connection, self._requests, None)
        await self._measure()

    async def _publish(self, connection: MqttConnection, topic: str, payload: bytes) -> tuple[bool, bool | None, str]:
        """Whether the broker takes it, whether anybody gets it (where it says so), and what it said."""
        try:
            heard = await connection.publish(topic, payload)
        except ConnectionLost:
            raise
        except BrokerError as error:
            return False, None, error.message
        return True, heard if connection.is_v5 else None, ""

    async def _brought(self, connection: MqttConnection, topic: str, probe: bytes | None) -> bool:
        """Whether the broker brings a message on `topic`; what lies there is noted by the way.

        A subscription is answered after what was published before it, so hardly anything is waited for besides.
        """
        await connection.subscribe(topic)
        try:
            async with asyncio.timeout(_ECHO):
                while True:
                    message = await connection.receive()
                    if _OURS.encode() in message.payload:  # else it may be a request that waits for the daemon
                        message.acknowledge()
                    if message.retained:
                        self.note(retained=(*dict.fromkeys((*self.seen.retained, message.topic)),))
                    if message.payload == probe:
                        return True
        except TimeoutError:
            return False

    async def _measure(self) -> None:
        """One exchange, and two at once: Nagle's algorithm holds the second answer until the first is acknowledged."""
        singles, pairs = [], []
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            await self._connection.subscribe(self._requests)
            middle = time.perf_counter()
            await asyncio.gather(*(self._connection.subscribe(self._requests) for _ in range(2)))
            singles.append(middle - begin)
            pairs.append(time.perf_counter() - middle)
        self.note(single=_usual(singles), pair=_usual(pairs))

    async def weigh(self) -> None:
        """Whether the broker takes a message as large as an answer; the last of all, for it may end the connection."""
        if not self.seen.own.answers or self._connection.lost.done():
            return
        try:
            async with asyncio.timeout(_TALK):
                taken, _, why = await self._publish(self._connection, self._responses, _harmless(LARGE))
        except TimeoutError:
            taken, why = False, "no answer to it"
        except ConnectionLost as error:
            taken, why = False, str(error)
        if not taken:
            self.note(too_large=why)

    async def rights_of(self, stranger: MqttConnection) -> Rights:
        """What somebody else may do, with our help to be listened to."""
        listens: bool | None = None
        try:
            await stranger.subscribe(self._responses)
            probe = _harmless()
            taken, _, _ = await self._publish(self._connection, self._responses, probe)
            listens = await self._brought(stranger, self._responses, probe) if taken else None
        except ConnectionLost:
            raise
        except BrokerError:
            listens = False
        answers, _, _ = await self._publish(stranger, self._responses, _harmless())
        probe = _harmless()
        asks, _, _ = await self._publish(stranger, self._requests, probe)
        if asks and self.seen.subscribed:
            asks = await self._brought(self._connection, self._requests, probe)
        if answers and not stranger.is_v5:
            return Rights(asks=asks, answers=None, listens=listens)
        return Rights(asks=asks, answers=answers, listens=listens)
