"""The broker: whether it can be reached, and whether it lets through what it should, and nothing else.

What is published is a message that the contract has everybody pass over (decision 3: another `name` than ours). No
request is made, nothing is retained, and the daemon's own session is left alone: the doctor has a client id of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import ssl
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from stationkey.doctor.certificates import MONTH
from stationkey.doctor.configuration import is_loopback
from stationkey.doctor.device import listeners_on
from stationkey.doctor.findings import CannotLookError, Finding, failure, listed, not_checked, ok, warning
from stationkey.doctor.running import within
from stationkey.doctor.subject import Subject
from stationkey.errors import BrokerError, ConfigurationError, StationKeyError
from stationkey.mqtt import Broker, ConnectionLost, MqttConnection, connect, topics
from stationkey.terms import MqttTerms
from stationkey.trust import introduction, no_handshake

IDS: Final = (
    *("broker.url", "broker.name", "broker.port", "broker.tls", "broker.login", "broker.version"),
    *("broker.publish", "broker.subscribe", "broker.own_rights", "broker.anonymous", "broker.josev", "broker.daemon"),
    *("broker.retained", "broker.delay"),
)
DEADLINE: Final = 9.0

_NAME: Final = 2.0
_PORT: Final = 2.0
_LOGIN: Final = 4.5
"""Seconds. Some brokers keep silent to a CONNECT of MQTT 5; what they say to one of 3.1.1 is waited for as well."""
_TALK: Final = 2.5
_ECHO: Final = 0.4
"""Seconds for the broker to bring a message that it took, on a connection that is there already."""
_ROUNDS: Final = 14
_SLOW_START: Final = 6
"""Rounds in which a Linux kernel still acknowledges at once [tcp(7), TCP_QUICKACK]."""
_NAGLE: Final = 0.020
"""Seconds that nothing but a delayed acknowledgement adds; it is 40 ms on Linux."""


def check_broker(subject: Subject) -> Iterator[Finding]:
    """From its URL to its rights, as far as it goes."""
    settings = subject.settings
    try:
        broker = Broker.parse(settings.broker)
        topics(settings.topic_prefix)
    except ConfigurationError as error:
        yield failure("broker.url", error.message, error.hint or "correct it in the configuration")
        raise CannotLookError("there is no usable address of a broker") from None
    local = is_loopback(broker.host)
    yield judge_url(broker, local=local, port_in_use_for_tls=8883)
    addresses = _resolve(broker)
    yield judge_name(broker, addresses)
    if isinstance(addresses, str):
        raise CannotLookError("its name leads nowhere")
    reached = _dial(addresses)
    yield judge_port(broker, reached)
    if reached:
        raise CannotLookError("the broker cannot be reached")
    yield from _check_tls(broker, settings.mqtt, local=local)
    seen = asyncio.run(_visit(broker, settings.mqtt, settings.topic_prefix))
    if seen.refused is not None:
        yield judge_refused(broker, seen.refused, speaks_tls=not broker.tls and _speaks_tls(broker))
    reach = None if local and not _listens_beyond(broker.port) else _beyond(broker, local=local)
    yield from judge_visit(seen, reach=reach, daemon_running=subject.daemon.running)


def judge_url(broker: Broker, *, local: bool, port_in_use_for_tls: int) -> Finding:
    """The address, as it stands."""
    name = "broker.url"
    if not broker.tls and broker.port == port_in_use_for_tls:
        return warning(name, f"{broker} has the port that is for TLS, and no TLS", f"mqtts://{broker.host}")
    return ok(name, f"the broker is {broker}" + (", on this machine" if local else ""))


def _resolve(broker: Broker) -> list[tuple[int, tuple[object, ...]]] | str:
    """The addresses that a name stands for, or what is wrong with it."""

    def ask() -> list[tuple[int, tuple[object, ...]]] | str:
        try:
            found = socket.getaddrinfo(broker.host, broker.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            return getattr(error, "strerror", None) or str(error)
        return [(int(family), address) for family, _, _, _, address in found]

    return within(_NAME, ask, f"no answer within {_NAME:g} s")


def judge_name(broker: Broker, addresses: list[tuple[int, tuple[object, ...]]] | str) -> Finding:
    """What the name stands for."""
    name = "broker.name"
    if isinstance(addresses, str):
        return failure(
            name,
            f"the name {broker.host} leads nowhere: {addresses}",
            "is it written right, and does the name server answer (resolvectl query, /etc/resolv.conf)? An address works "
            "without one",
        )
    return ok(name, f"{broker.host} is {listed(dict.fromkeys(str(address[0]) for _, address in addresses))}")


def _dial(addresses: list[tuple[int, tuple[object, ...]]]) -> str:
    """An empty text where one of the addresses takes a connection; else why none does."""
    why, end = "it has no address", time.monotonic() + _PORT
    for family, address in addresses:
        left = end - time.monotonic()
        if left <= 0:
            break
        try:
            with socket.socket(family, socket.SOCK_STREAM) as connection:
                connection.settimeout(left)
                connection.connect(address)
                return ""
        except TimeoutError:
            why = f"no answer within {_PORT:g} s"
        except OSError as error:
            why = error.strerror or str(error)
    return why


def judge_port(broker: Broker, why: str) -> Finding:
    """Whether anything listens. `why`: it does not, or an empty text."""
    name = "broker.port"
    if why:
        return failure(
            name,
            f"nothing takes a connection at {broker}: {why}",
            "is the broker running (systemctl status mosquitto), on this port and address, and no firewall in between?",
        )
    return ok(name, f"something listens at {broker}")


def _check_tls(broker: Broker, terms: MqttTerms, *, local: bool) -> Iterator[Finding]:
    name = "broker.tls"
    if not broker.tls:
        if local:
            yield ok(name, "no TLS, which does not matter on this machine itself")
        else:
            yield warning(
                name,
                f"what goes to and from {broker.host} can be read and changed on the way: there is no TLS",
                'broker = "mqtts://HOST[:8883]" and [mqtt] ca_file, and a listener with TLS at the broker',
            )
        return
    try:
        # Without the client's own certificate: whose turn it is to show one comes later, and its key may be in the TPM.
        bare = dataclasses.replace(terms, certificate_file=None, key_file=None, username=None, password=None)
        context = introduction(bare, tls=True).tls
        assert context is not None
        with (
            socket.create_connection((broker.host, broker.port), _PORT) as connection,
            context.wrap_socket(connection, server_hostname=broker.host) as session,
        ):
            certificate = session.getpeercert() or {}
            yield judge_tls(session.version() or "", str(certificate.get("notAfter", "")), datetime.now(UTC))
    except ssl.SSLError as error:
        if "_ALERT_" in (error.reason or ""):  # it wants a certificate; whether it takes ours, the login tells
            yield ok(name, "TLS is spoken, and a certificate of the client is wanted")
            return
        said = no_handshake(str(broker), error)
        hint = said.hint or _tls_hint(error)
        yield failure(name, said.message, hint)
    except TimeoutError:
        yield failure(
            name, f"{broker} takes the connection and does not answer to TLS", "is it a port without TLS (1883)?"
        )
    except StationKeyError as error:
        yield failure(name, error.message, error.hint or "correct it under [mqtt]")
    except OSError as error:
        yield failure(name, f"no TLS with {broker}: {error.strerror or error}", "is it a port without TLS (1883)?")


def _tls_hint(error: ssl.SSLError) -> str:
    if error.reason == "WRONG_VERSION_NUMBER":
        return "that port speaks no TLS: name the port that does, or begin the URL with mqtt://"
    return "TLS 1.2 is the least that is accepted; see the broker's log"


def judge_tls(version: str, ends: str, now: datetime) -> Finding:
    """The broker's certificate, which is verified, and how long it lasts."""
    name = "broker.tls"
    try:
        end = datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)
    except ValueError:
        return ok(name, f"{version}, and the broker's certificate is verified")
    if end - now < MONTH:
        return warning(
            name,
            f"the broker's certificate ends in {(end - now).days} days, on {end:%Y-%m-%d}",
            "have a new one made for the broker in time: afterwards no connection is made",
        )
    return ok(name, f"{version}, and the broker's certificate is verified (until {end:%Y-%m-%d})")


def _speaks_tls(broker: Broker) -> bool:
    """Whether a port that refuses plain MQTT speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # nothing is said to it; it is asked what it speaks
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection((broker.host, broker.port), 1.0) as connection:
            connection.settimeout(1.0)
            with context.wrap_socket(connection):
                return True
    except ssl.SSLError as error:
        return "_ALERT_" in (error.reason or "")
    except OSError:
        return False


def _listens_beyond(port: int) -> bool:
    """Whether what listens on this machine at a port is to be reached from others."""
    return any(not _is_loopback_row(address) for address in listeners_on(port))


def _is_loopback_row(address: str) -> bool:
    """An address as ``/proc/net/tcp`` has it: hexadecimal, each four octets backwards."""
    octets = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
    mapped = octets.startswith(bytes(10) + b"\xff\xff")
    return octets[-4] == 127 if len(octets) == 4 or mapped else octets == bytes(15) + b"\1"  # noqa: PLR2004 - 127.0.0.0/8


def _beyond(broker: Broker, *, local: bool) -> str:
    return (
        f"every machine that reaches port {broker.port} of this one"
        if local
        else f"every machine that reaches {broker.host}"
    )


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
        refused: why there is no connection, or None.
        named: whether we have a user name or a certificate there.
        mqtt5: whether MQTT 5 is spoken.
        own: what we may do.
        why: what the broker said where we may not do what we must.
        subscribed: whether a subscription to the topic of requests is granted.
        josev: whether somebody is subscribed to the topic of responses; None where the broker does not say.
        daemon: whether somebody is subscribed to the topic of requests; None likewise.
        retained: topics that a message lies on.
        single: least seconds for one exchange, or None.
        pair: least seconds for two at once, or None.
        anonymous: what somebody without a name may do; None where he is not let in.
        anonymous_why: why that is not known, or an empty text.
        cut: why the visit ended before its end, or an empty text.
    """

    refused: StationKeyError | None = None
    named: bool = False
    mqtt5: bool = True
    own: Rights = Rights()
    why: str = ""
    subscribed: bool | None = None
    josev: bool | None = None
    daemon: bool | None = None
    retained: tuple[str, ...] = ()
    single: float | None = None
    pair: float | None = None
    anonymous: Rights | None = None
    anonymous_why: str = ""
    cut: str = ""


def _harmless() -> bytes:
    """A message that is nobody's business [contract, decision 3], and that is known again."""
    return json.dumps({"name": "stationkey_doctor", "type": "probe", "id": str(uuid.uuid4())}).encode()


def _client_id() -> str:
    return f"stationkey-doctor-{uuid.uuid4().hex[:8]}"


async def _visit(broker: Broker, terms: MqttTerms, prefix: str) -> Visit:
    """Look around at the broker, with the daemon's identity and without any."""
    named = terms.username is not None or terms.certificate_file is not None
    stranger = asyncio.create_task(_as_a_stranger(broker, terms), name="stranger") if named else None
    try:
        async with asyncio.timeout(_LOGIN):
            connection = await connect(broker, client_id=_client_id(), persistent=False, terms=terms)
    except TimeoutError:
        silent = BrokerError(
            f"{broker} takes the connection and says nothing", reason="broker_unreachable", hint="is it an MQTT broker?"
        )
        return Visit(refused=silent, named=named, anonymous=await _let_in(stranger))
    except StationKeyError as error:
        return Visit(refused=error, named=named, anonymous=await _let_in(stranger))
    async with connection:
        visit = _Round(connection, *topics(prefix), named=named)
        try:
            async with asyncio.timeout(_TALK):
                await visit.look_around()
        except (TimeoutError, ConnectionLost) as error:
            visit.note(cut=str(error) or "the broker stopped answering")
        if stranger is not None:
            await _take_the_stranger_round(stranger, visit)
    return visit.seen


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


async def _take_the_stranger_round(stranger: asyncio.Task[MqttConnection | str], visit: _Round) -> None:
    """See what somebody without a name may do, while we are there to be listened to."""
    there = await stranger
    if isinstance(there, str):
        visit.note(anonymous_why=there)
        return
    async with there:
        try:
            async with asyncio.timeout(_TALK):
                visit.note(anonymous=await visit.rights_of(there))
        except (TimeoutError, ConnectionLost):
            visit.note(anonymous=Rights())


class _Round:
    """A look around on one connection; what was seen so far is in `seen`, whatever comes."""

    def __init__(self, connection: MqttConnection, requests: str, responses: str, *, named: bool) -> None:
        self._connection = connection
        self._requests = requests
        self._responses = responses
        self.seen = Visit(named=named, mqtt5=connection.is_v5)

    def note(self, **what: object) -> None:
        self.seen = dataclasses.replace(self.seen, **what)  # type: ignore[arg-type] # names and types are those of Visit

    async def look_around(self) -> None:
        """What we must be allowed to, then what we must not, then how quick it is."""
        answers, josev, why = await self._publish(self._connection, self._responses, _harmless())
        self.note(own=Rights(answers=answers), josev=josev, why=why)
        asks, daemon, _ = await self._publish(self._connection, self._requests, _harmless())
        self.note(own=Rights(answers=answers, asks=asks), daemon=daemon)
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
            self.note(own=Rights(answers=answers, asks=await self._brought(self._connection, probe)))
        else:
            await self._brought(self._connection, b"")
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

    async def _brought(self, connection: MqttConnection, probe: bytes) -> bool:
        """Whether the broker brings a message; what lies on the topics is noted by the way."""
        try:
            async with asyncio.timeout(_ECHO):
                while True:
                    message = await connection.receive()
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
        # The least of each: a machine that is busy adds to some rounds, Nagle's algorithm to all.
        self.note(single=min(singles[_SLOW_START:]), pair=min(pairs[_SLOW_START:]))

    async def rights_of(self, stranger: MqttConnection) -> Rights:
        """What somebody else may do, with our help to be listened to."""
        listens: bool | None = None
        try:
            await stranger.subscribe(self._responses)
            probe = _harmless()
            taken, _, _ = await self._publish(self._connection, self._responses, probe)
            listens = await self._brought(stranger, probe) if taken else None
        except ConnectionLost:
            raise
        except BrokerError:
            listens = False
        answers, _, _ = await self._publish(stranger, self._responses, _harmless())
        probe = _harmless()
        asks, _, _ = await self._publish(stranger, self._requests, probe)
        if asks and self.seen.subscribed:
            asks = await self._brought(self._connection, probe)
        if answers and not stranger.is_v5:
            return Rights(asks=asks, answers=None, listens=listens)
        return Rights(asks=asks, answers=answers, listens=listens)


def judge_refused(broker: Broker, error: StationKeyError, *, speaks_tls: bool) -> Finding:
    """Why there is no connection."""
    name = "broker.login"
    if speaks_tls:
        return failure(name, f"{broker} speaks TLS, and the URL says mqtt://", f"mqtts://{broker.host}:{broker.port}")
    hints = {
        "broker_refuses": "are user name and password those that the broker knows? Its log says more; an access control "
        "list by client id must let in stationkey-doctor-*, too",
        "broker_unreachable": "is it an MQTT broker, and does its log say anything?",
    }
    return failure(name, error.message, error.hint or hints.get(error.reason, "see the broker's log"))


def judge_visit(seen: Visit, *, reach: str | None, daemon_running: bool) -> Iterator[Finding]:
    """All that was seen.

    Args:
        seen: see `Visit`.
        reach: who else reaches the broker, in words; None where only programs of this machine do.
        daemon_running: whether the daemon runs.
    """
    if seen.refused is not None:
        if seen.anonymous is not None:
            yield judge_anonymous(seen, reach)
        raise CannotLookError("the broker does not let us in")
    who = "with our identity" if seen.named else "without a name"
    yield ok("broker.login", f"the broker lets us in, {who}")
    yield judge_version(seen)
    if seen.own.answers is None and seen.cut:
        raise CannotLookError(f"the broker stopped answering ({seen.cut})")
    yield judge_publish(seen)
    yield judge_subscribe(seen)
    yield judge_own_rights(seen, reach)
    yield judge_anonymous(seen, reach)
    yield judge_josev(seen)
    yield judge_daemon(seen, daemon_running=daemon_running)
    yield judge_retained(seen)
    yield judge_delay(seen)


def judge_version(seen: Visit) -> Finding:
    """Which MQTT is spoken."""
    name = "broker.version"
    if seen.mqtt5:
        return ok(name, "MQTT 5 is spoken")
    return warning(
        name,
        "the broker speaks MQTT 3.1.1 only: it cannot say that it refuses a message, and an answer may be lost unseen",
        "take a broker that speaks MQTT 5, such as Mosquitto 2",
    )


def judge_publish(seen: Visit) -> Finding:
    """Whether we may answer."""
    name = "broker.publish"
    if not seen.own.answers:
        return failure(
            name,
            f"answers do not get through: {seen.why or 'the broker refuses them'}",
            "let stationkey's identity write to cs/josev (packaging/mosquitto)",
        )
    if not seen.mqtt5:
        return not_checked(name, "with MQTT 3.1.1 the broker acknowledges what it refuses, too")
    return ok(name, "the broker takes messages of ours on cs/josev")


def judge_subscribe(seen: Visit) -> Finding:
    """Whether we may read requests."""
    name = "broker.subscribe"
    if seen.subscribed is None:
        return not_checked(name, seen.cut or "the broker did not answer")
    if not seen.subscribed:
        return failure(
            name,
            f"requests do not get through: {seen.why}",
            "let stationkey's identity read josev/cs (packaging/mosquitto)",
        )
    return ok(name, "a subscription to josev/cs is granted")


def judge_own_rights(seen: Visit, reach: str | None) -> Finding:
    """That our own identity cannot ask: who gets hold of it should not have keys made."""
    name = "broker.own_rights"
    if not seen.named:
        return not_checked(name, "we have no name at the broker that rights could be given to")
    if seen.own.asks is None:
        return not_checked(name, seen.cut or "the broker did not answer")
    if not seen.own.asks:
        return ok(name, "our own identity may not publish on josev/cs")
    advice = "have an access control list by which only Josev may write to josev/cs (packaging/mosquitto)"
    return failure(
        name,
        "our own identity may publish on josev/cs, as if it were Josev"
        + (f"; so may, perhaps, {reach}" if reach else ""),
        advice,
    )


def judge_anonymous(seen: Visit, reach: str | None) -> Finding:
    """What somebody without a name may do. `reach`: who else reaches the broker, or None."""
    name = "broker.anonymous"
    if not seen.named:
        advice = "give Josev and stationkey a user name or a certificate each, and an access control list (packaging/mosquitto)"
        if reach is not None:
            return failure(
                name, f"the broker takes anybody, and {reach} can have keys made, and answer in our place", advice
            )
        return warning(
            name,
            "the broker takes anybody: every program of this machine can have keys made, and answer in our place",
            advice,
        )
    if seen.anonymous is None:
        if seen.anonymous_why:
            return not_checked(name, f"nobody could be tried: {seen.anonymous_why}")
        return ok(name, "nobody is let in without a name")
    rights = seen.anonymous
    can = [
        words
        for words, may in (
            ("ask for keys (josev/cs)", rights.asks),
            ("answer in our place (cs/josev)", rights.answers),
            ("read the answers (cs/josev)", rights.listens),
        )
        if may
    ]
    advice = "allow_anonymous false, or an access control list that gives nobody any of it (packaging/mosquitto)"
    if can:
        whom = reach or "every program of this machine"
        return failure(name, f"the broker lets in anybody, and {whom} can {' and '.join(can)}", advice)
    if reach is not None:
        return warning(name, f"the broker lets in anybody, though not to our topics: {reach} can", advice)
    return ok(name, "the broker lets in anybody, though not to our topics")


def judge_josev(seen: Visit) -> Finding:
    """Whether anybody waits for answers."""
    name = "broker.josev"
    if seen.josev is None:
        return not_checked(name, "the broker does not say who is subscribed to cs/josev")
    if not seen.josev:
        return warning(
            name,
            "nobody is subscribed to cs/josev: answers are not heard",
            "is Josev running, at this broker and with this topic prefix?",
        )
    return ok(name, "somebody is subscribed to cs/josev")


def judge_daemon(seen: Visit, *, daemon_running: bool) -> Finding:
    """Whether anybody waits for requests, where we could find that out."""
    name = "broker.daemon"
    if seen.daemon is None:
        return not_checked(
            name, "only who may write to josev/cs is told who is subscribed to it, and we may not, which is right"
        )
    if seen.daemon:
        return ok(
            name, "somebody is subscribed to josev/cs" + ("" if daemon_running else ", or the broker keeps its session")
        )
    told = "nobody is subscribed to josev/cs" + (", though the daemon runs" if daemon_running else "")
    advice = (
        "see the daemon's log: is it at this broker, and with this topic prefix?"
        if daemon_running
        else "start the daemon"
    )
    return warning(name, told, advice)


def judge_retained(seen: Visit) -> Finding:
    """Whether an old message lies on a topic, which every new subscriber gets."""
    name = "broker.retained"
    if not seen.subscribed:
        return not_checked(name, "there is no subscription")
    if seen.retained:
        return warning(
            name,
            f"a retained message lies on {listed(seen.retained)}: the broker sends it at every subscription, as if it were new",
            f"take it away: mosquitto_pub -t {seen.retained[0]} -r -n; and find out who sets retain",
        )
    return ok(name, "no retained message lies on josev/cs")


def judge_delay(seen: Visit) -> Finding:
    """Whether the broker holds small packets back."""
    name = "broker.delay"
    if seen.single is None or seen.pair is None:
        return not_checked(name, seen.cut or "there is no subscription to measure it by")
    took = f"one exchange takes {seen.single * 1000:.1f} ms at the least, two at once {seen.pair * 1000:.1f} ms"
    if seen.pair - seen.single > _NAGLE:
        return warning(
            name,
            f"the broker holds small packets back (Nagle's algorithm): {took}",
            "set_tcp_nodelay true in the configuration of Mosquitto (packaging/mosquitto/stationkey.conf), then restart it",
        )
    return ok(name, took)
