"""The broker: whether it can be reached, and whether it lets through what it should, and nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import MqttTerms
from stationkey.doctor.broker.probe import LARGE, Visit, visit
from stationkey.doctor.config.certificates import MONTH
from stationkey.doctor.config.consistency import is_loopback
from stationkey.doctor.host.context import Subject, path_of, unless_guessed
from stationkey.doctor.host.files import look_at
from stationkey.doctor.report import CannotLookError, Finding, Level, failure, listed, not_checked, ok, warning
from stationkey.doctor.runner import within
from stationkey.doctor.tpm.device import listeners_on
from stationkey.errors import ConfigurationError, StationKeyError
from stationkey.mqtt.connection import ProtocolRefused
from stationkey.mqtt.tls import introduction, no_handshake
from stationkey.mqtt.topics import MAX_PREFIX, topics
from stationkey.mqtt.url import Broker

IDS: Final = (
    *("broker.url", "broker.name", "broker.port", "broker.tls", "broker.login", "broker.version"),
    *("broker.publish", "broker.subscribe", "broker.own_rights", "broker.anonymous", "broker.josev"),
    *("broker.retained", "broker.delay"),
)
DEADLINE: Final = 9.0
Addresses = list[tuple[int, tuple[object, ...]]]
"""Family and address of each, as `socket` has them."""
_NAME: Final = 2.0
_PORT: Final = 2.0
_NAGLE: Final = 0.020
"""Seconds that nothing but a delayed acknowledgement adds; it is 40 ms on Linux."""


def check_broker(subject: Subject) -> Iterator[Finding]:
    """From its URL to its rights, as far as it goes."""
    hang_on = {"broker": IDS, "topic_prefix": IDS[5:], "mqtt": IDS[3:]}
    return unless_guessed(
        _check(subject), {name: ids for name, ids in hang_on.items() if name in subject.configured.lost}
    )


def _check(subject: Subject) -> Iterator[Finding]:
    settings = subject.settings
    try:
        broker = Broker.parse(settings.broker)
        topics(settings.topic_prefix)
    except ConfigurationError as error:
        hint = error.hint or "correct it in the configuration"
        if error.reason == "topic_prefix_invalid":
            hint = f"correct topic_prefix: no + and #, no $ at its beginning, {MAX_PREFIX} bytes at the most"
        yield failure("broker.url", error.message, hint)
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
    terms, out_of_reach = _at_hand(settings.mqtt, subject)
    if out_of_reach:
        raise CannotLookError(f"{out_of_reach}, and without it the broker cannot be visited as the daemon does")
    secured = list(_check_tls(broker, terms, local=local))
    yield from secured
    if any(finding.level is Level.FAILURE for finding in secured):
        raise CannotLookError("there is no TLS with the broker")
    seen = asyncio.run(visit(broker, terms, settings.topic_prefix, daemon_running=subject.daemon.running))
    if seen.refused is not None:
        yield judge_refused(broker, seen.refused, speaks_tls=not broker.tls and _speaks_tls(broker))
    reach = None if local and not _listens_beyond(broker.port) else _beyond(broker, local=local)
    yield from judge_visit(seen, reach=reach)


def _at_hand(terms: MqttTerms, subject: Subject) -> tuple[MqttTerms, str]:
    """The terms with systemd's credentials where they lie; and what of it is not for this user, or an empty text.

    What is missing or wrong for the daemon, too, is for others to say; this is about whoever runs the doctor.
    """
    found: dict[str, SecretReference] = {}
    for name in ("certificate_file", "key_file", "username", "password"):
        reference = getattr(terms, name)
        if not isinstance(reference, SecretReference):
            continue
        path = path_of(reference)
        if path is None:
            return terms, f"{reference.source} comes from systemd, which has it for root, and while the unit runs,"
        found[name] = SecretReference(str(path))
    paths = [Path(one.source) for one in found.values()] + ([terms.ca_file] if terms.ca_file is not None else [])
    if subject.me.uid not in {0, subject.daemon.user.uid}:
        for path in paths:
            if look_at(path, follow=True).kind in {"file", "unseen"} and not os.access(path, os.R_OK):
                return terms, f"user {subject.me.name} may not read {path} (run it as root, or as the daemon's user)"
    return dataclasses.replace(terms, **found), ""  # type: ignore[arg-type] # each is a field that had a reference before


def judge_url(broker: Broker, *, local: bool, port_in_use_for_tls: int) -> Finding:
    """The address, as it stands."""
    name = "broker.url"
    if not broker.tls and broker.port == port_in_use_for_tls:
        return warning(name, f"{broker} has the port that is for TLS, and no TLS", f"mqtts://{broker.host}")
    return ok(name, f"the broker is {broker}" + (", on this machine" if local else ""))


def _resolve(broker: Broker) -> Addresses | str:
    """The addresses that a name stands for, or what is wrong with it."""

    def resolve() -> Addresses | str:
        try:
            found = socket.getaddrinfo(broker.host, broker.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            return getattr(error, "strerror", None) or str(error)
        return [(int(family), address) for family, _, _, _, address in found]

    otherwise: Addresses | str = f"no answer within {_NAME:g} s"
    return within(_NAME, resolve, otherwise)


def judge_name(broker: Broker, addresses: Addresses | str) -> Finding:
    """What the name stands for."""
    name = "broker.name"
    if isinstance(addresses, str):
        return failure(
            name,
            f"the name {broker.host} leads nowhere: {addresses}",
            "is it written right, and does the name server answer (resolvectl query, /etc/resolv.conf)? An address "
            "works without one",
        )
    return ok(name, f"{broker.host} is {listed(dict.fromkeys(str(address[0]) for _, address in addresses))}")


def _dial(addresses: Addresses) -> str:
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


def judge_refused(broker: Broker, error: StationKeyError, *, speaks_tls: bool) -> Finding:
    """Why there is no connection."""
    name = "broker.login"
    if speaks_tls:
        return failure(name, f"{broker} speaks TLS, and the URL says mqtt://", f"mqtts://{broker.host}:{broker.port}")
    if isinstance(error, ProtocolRefused):
        return failure(name, error.message, error.hint or "is it an MQTT broker? If it is, its log says why")
    hints = {
        "broker_refuses": "are user name and password those that the broker knows? Its log says more; an access "
        "control list by client id must let in stationkey-doctor-*, too",
        "broker_unreachable": "is it an MQTT broker, and does its log say anything?",
    }
    ours = "correct it under [mqtt]" if isinstance(error, ConfigurationError) else "see the broker's log"
    return failure(name, error.message, error.hint or hints.get(error.reason, ours))


def judge_visit(seen: Visit, *, reach: str | None) -> Iterator[Finding]:
    """All that was seen.

    Args:
        seen: see `Visit`.
        reach: who else reaches the broker, in words; None where only programs of this machine do.
    """
    if seen.refused is not None:
        if seen.anonymous is not None:
            yield judge_anonymous(seen, reach)
        raise CannotLookError("the broker does not let us in")
    if seen.in_its_place:
        yield warning(
            "broker.login",
            "the broker lets us in, and has one session for each user: the doctor was taken for the running daemon, "
            "and went at once. The daemon connects anew, and nothing is lost",
            "to have its rights looked at, stop the daemon for that while",
        )
        yield judge_version(seen)
        if seen.anonymous is not None:
            yield judge_anonymous(seen, reach)
        raise CannotLookError("the broker has one session for each user, and the daemon has it")
    who = "with our identity" if seen.named else "without a name"
    yield ok("broker.login", f"the broker lets us in, {who}")
    yield judge_version(seen)
    if seen.own.answers is None and seen.cut:
        yield failure(
            "broker.publish",
            f"the broker let us in, and then did not acknowledge a message: {seen.cut}",
            "see the broker's log: does it limit messages (Mosquitto: max_qos, message_size_limit)? Is something "
            "between it and us, and is it overloaded?",
        )
        raise CannotLookError("the broker stopped answering")
    yield judge_publish(seen)
    yield judge_subscribe(seen)
    yield judge_own_rights(seen, reach)
    yield judge_anonymous(seen, reach)
    yield judge_josev(seen)
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
            f"let stationkey's identity write to {seen.responses} (packaging/mosquitto)",
        )
    if seen.too_large:
        return failure(
            name,
            f"the broker takes a short message, and none of {LARGE} octets; an answer may have half of that: "
            f"{seen.too_large}",
            "take the limit away, or raise it (Mosquitto: message_size_limit and max_packet_size)",
        )
    if not seen.mqtt5:
        return not_checked(name, "with MQTT 3.1.1 the broker acknowledges what it refuses, too")
    return ok(name, f"the broker takes messages of ours on {seen.responses}")


def judge_subscribe(seen: Visit) -> Finding:
    """Whether we may read requests."""
    name = "broker.subscribe"
    if seen.subscribed is None:
        return failure(name, f"no answer to a subscription: {seen.cut}", "see the broker's log")
    if not seen.subscribed:
        return failure(
            name,
            f"requests do not get through: {seen.why}",
            f"let stationkey's identity read {seen.requests} (packaging/mosquitto)",
        )
    return ok(name, f"a subscription to {seen.requests} is granted")


def judge_own_rights(seen: Visit, reach: str | None) -> Finding:
    """That our own identity cannot ask: who gets hold of it should not have keys made."""
    name = "broker.own_rights"
    if not seen.named:
        return not_checked(name, "we have no name at the broker that rights could be given to")
    if seen.own.asks is None:
        return not_checked(name, seen.cut or "the broker did not answer")
    if not seen.own.asks:
        return ok(name, f"our own identity may not publish on {seen.requests}")
    advice = f"have an access control list by which only Josev may write to {seen.requests} (packaging/mosquitto)"
    return failure(
        name,
        f"our own identity may publish on {seen.requests}, as if it were Josev"
        + (f"; so may, perhaps, {reach}" if reach else ""),
        advice,
    )


def judge_anonymous(seen: Visit, reach: str | None) -> Finding:
    """What somebody without a name may do. `reach`: who else reaches the broker, or None."""
    name = "broker.anonymous"
    if not seen.named:
        advice = (
            "give Josev and stationkey a name or a certificate each, and an access control list (packaging/mosquitto)"
        )
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
            (f"ask for keys ({seen.requests})", rights.asks),
            (f"answer in our place ({seen.responses})", rights.answers),
            (f"read the answers ({seen.responses})", rights.listens),
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
        return not_checked(name, f"the broker does not say who is subscribed to {seen.responses}")
    if not seen.josev:
        return warning(
            name,
            f"nobody is subscribed to {seen.responses}: answers are not heard",
            "is Josev running, at this broker and with this topic prefix?",
        )
    return ok(name, f"somebody is subscribed to {seen.responses}")


def judge_retained(seen: Visit) -> Finding:
    """Whether an old message lies on a topic, which every new subscriber gets."""
    name = "broker.retained"
    if not seen.subscribed:
        return not_checked(name, "there is no subscription")
    if seen.retained:
        return warning(
            name,
            f"a retained message lies on {listed(seen.retained)}: the broker sends it at every subscription, as if it "
            "were new",
            f"take it away, as who may write there: mosquitto_pub {seen.at} -t {seen.retained[0]} -r -n; and find out "
            "who sets retain",
        )
    return ok(name, f"no retained message lies on {seen.requests}")


def judge_delay(seen: Visit) -> Finding:
    """Whether the broker holds small packets back."""
    name = "broker.delay"
    if seen.single is None or seen.pair is None:
        return not_checked(name, seen.cut or "there is no subscription to measure it by")
    took = f"one exchange takes {seen.single * 1000:.1f} ms, two at once {seen.pair * 1000:.1f} ms"
    if seen.pair - seen.single > _NAGLE:
        return warning(
            name,
            f"the broker holds small packets back (Nagle's algorithm): {took}",
            "set_tcp_nodelay true in the configuration of Mosquitto (packaging/mosquitto/stationkey.conf), then "
            "restart it",
        )
    return ok(name, took)
