"""The broker: the way to it, and what it lets through."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import MqttTerms
from stationkey.doctor.broker.probe import LARGE, Visit, visit
from stationkey.doctor.config.certificates import MONTH
from stationkey.doctor.config.checks import named_secrets
from stationkey.doctor.host.context import Context, path_of
from stationkey.doctor.host.files import look_at
from stationkey.doctor.host.sockets import listeners_on
from stationkey.doctor.report import Finding, failure, hidden, listed, ok, refusal, unknown, warning
from stationkey.doctor.runner import Check, within
from stationkey.errors import ConfigurationError, StationKeyError
from stationkey.mqtt.connection import ProtocolRefused
from stationkey.mqtt.introduction import introduction
from stationkey.mqtt.tls import no_handshake
from stationkey.mqtt.topics import MAX_PREFIX, Stations, topics
from stationkey.mqtt.url import DEFAULT_TLS_PORT, Broker
from stationkey.system.addresses import is_loopback

_Addresses = list[tuple[int, tuple[object, ...]]]
"""Family and address of each, as `socket` has them."""
_PATIENCE: Final = 2.0
"""Seconds for a name, and for a connection."""
_PLAIN_PORT: Final = "is it a port without TLS (1883)?"
_NAGLE: Final = 0.020
"""Seconds that nothing but a delayed acknowledgement adds; it is 40 ms on Linux."""
_SHIPPED: Final = "(/usr/share/doc/stationkey/examples/mosquitto)"
_HINTS: Final = {
    "broker_refuses": "does the broker know user name and password? Its log says more; an access control list by "
    "client id must let in stationkey-doctor-*, too",
    "broker_unreachable": "is it an MQTT broker, and does its log say anything?",
}


def _judge_url(url: str, prefix: str) -> Finding:
    try:
        broker = Broker.parse(url)
        topics(prefix)
    except ConfigurationError as error:
        if error.reason == "topic_prefix_invalid":
            hint = f"correct topic_prefix: no + and #, no $ at its beginning, {MAX_PREFIX} bytes at most"
            return failure(error.reason, error.message, hint)
        return refusal(error, "correct it in the configuration")
    if not broker.tls and broker.port == DEFAULT_TLS_PORT:
        return warning("tls_port", f"{broker} has the port that is for TLS, and no TLS", f"mqtts://{broker.host}")
    return ok(f"the broker is {broker}" + (", on this machine" if is_loopback(broker.host) else ""))


def _broker_of(context: Context) -> Broker:
    """Return the broker that is configured; `_judge_url` says whether there is one."""
    return Broker.parse(context.settings.broker)


def resolve(context: Context) -> _Addresses | str:
    """Return the addresses of the broker, or why there are none."""
    broker = _broker_of(context)

    def ask() -> _Addresses | str:
        try:
            found = socket.getaddrinfo(broker.host, broker.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            return getattr(error, "strerror", None) or str(error)
        return [(int(family), address) for family, _, _, _, address in found]

    otherwise: _Addresses | str = f"no answer within {_PATIENCE:g} s"
    return within(_PATIENCE, ask, otherwise)


def _judge_name(broker: Broker, addresses: _Addresses | str) -> Finding:
    if isinstance(addresses, str):
        advice = "correct the name, or name an address; does the name server answer (resolvectl query)?"
        return failure("unresolved", f"{broker.host} does not resolve: {addresses}", advice)
    return ok(f"{broker.host} is {listed(dict.fromkeys(str(address[0]) for _, address in addresses))}")


def _look_at_port(context: Context) -> tuple[Broker, str]:
    broker = _broker_of(context)
    try:
        with socket.create_connection((broker.host, broker.port), _PATIENCE):
            return broker, ""
    except OSError as error:
        return broker, error.strerror or str(error)


def _judge_port(broker: Broker, why: str) -> Finding:
    if why:
        advice = "does the broker run (systemctl status mosquitto), at this address and port, with no firewall between?"
        return failure("closed", f"nothing accepts a connection at {broker}: {why}", advice)
    return ok(f"something listens at {broker}")


def _look_at_tls(context: Context) -> tuple[Broker, str, str, Exception | None, datetime] | Finding:
    """Shake hands with the broker, without the client's own certificate: its key may be in the TPM."""
    broker, mqtt, now = _broker_of(context), context.settings.mqtt, datetime.now(UTC)
    if not broker.tls:
        return broker, "", "", None, now
    if mqtt.ca_file is not None and mqtt.ca_file.exists() and not os.access(mqtt.ca_file, os.R_OK):
        return hidden(mqtt.ca_file)
    bare = replace(mqtt, certificate_file=None, key_file=None, username=None, password=None)
    try:
        tls = introduction(bare, tls=True).tls
        assert tls is not None
        with (
            socket.create_connection((broker.host, broker.port), _PATIENCE) as connection,
            tls.wrap_socket(connection, server_hostname=broker.host) as session,
        ):
            certificate = session.getpeercert() or {}
            return broker, session.version() or "", str(certificate.get("notAfter", "")), None, now
    except (OSError, StationKeyError) as error:
        return broker, "", "", error, now


def _judge_tls(broker: Broker, version: str, ends: str, error: Exception | None, now: datetime) -> Finding:
    """Judge the broker's certificate, which `ends` when `ssl` says; or the `error` that there was instead of TLS."""
    if error is not None:
        return _judge_handshake(broker, error)
    if not broker.tls and is_loopback(broker.host):
        return ok("no TLS, which does not matter on this machine itself")
    if not broker.tls:
        told = f"no TLS: what goes to and from {broker.host} can be read and changed on the way"
        return warning("no_tls", told, 'broker = "mqtts://HOST[:8883]" and [mqtt] ca_file, and a TLS listener there')
    try:
        end = datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)
    except ValueError:
        return ok(f"{version}, and the broker's certificate is verified")
    if end - now < MONTH:
        told = f"the broker's certificate expires in {(end - now).days} days, on {end:%Y-%m-%d}"
        return warning("expires", told, "have a new one made for the broker in time")
    return ok(f"{version}, and the broker's certificate is verified (until {end:%Y-%m-%d})")


def _judge_handshake(broker: Broker, error: Exception) -> Finding:
    match error:
        case ssl.SSLError() if "_ALERT_" in (error.reason or ""):  # the login tells whether it takes ours
            return ok("TLS is spoken, and a certificate of the client is wanted")
        case ssl.SSLError():
            hint = "TLS 1.2 is the least that is accepted; see the broker's log"
            if error.reason == "WRONG_VERSION_NUMBER":
                hint = "that port has no TLS: name the port that has, or begin the URL with mqtt://"
            return refusal(no_handshake(str(broker), error), hint)
        case StationKeyError():
            return refusal(error, "correct it under [mqtt]")
    why = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or error
    return failure("tls_failed", f"no TLS with {broker}: {why}", _PLAIN_PORT)


def _speaks_tls(broker: Broker) -> bool:
    """Whether a port that refuses plain MQTT has TLS."""
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


def _look_at_visit(context: Context) -> tuple[Visit] | Finding:
    seen = context.once(_visit)
    return seen if isinstance(seen, Finding) else (seen,)


def _visit(context: Context) -> Visit | Finding:
    terms = _at_hand(context)
    if isinstance(terms, Finding):
        return terms
    settings, running = context.settings, context.daemon.running
    stations = Stations(settings.topic_prefix, settings.site.stations)
    return asyncio.run(visit(_broker_of(context), terms, stations, daemon_running=running))


def _at_hand(context: Context) -> MqttTerms | Finding:
    """Return the terms, with systemd's credentials where they are; or what of them this user may not read.

    What is missing or wrong for the daemon too, other checks say.
    """
    terms, found = context.settings.mqtt, dict[str, SecretReference]()
    for option, reference in named_secrets(context.settings).items():
        if option.table == "mqtt":
            if (path := path_of(reference)) is None:
                return unknown(f"{reference.source} is there for root alone, and while the unit runs", "", "credential")
            found[option.path[-1]] = SecretReference(str(path))
    paths = [Path(one.source) for one in found.values()] + ([terms.ca_file] if terms.ca_file is not None else [])
    for path in () if context.sees_all else paths:
        if look_at(path, follow=True).kind in {"file", "unseen"} and not os.access(path, os.R_OK):
            return hidden(path)
    return replace(terms, **found)


def _look_at_login(context: Context) -> tuple[Broker, Visit, bool] | Finding:
    seen, broker = context.once(_visit), _broker_of(context)
    if isinstance(seen, Finding):
        return seen
    return broker, seen, seen.refused is not None and not broker.tls and _speaks_tls(broker)


def _judge_login(broker: Broker, seen: Visit, tls: bool) -> Finding:
    """Judge whether the broker lets us in. `tls`: whether its port has TLS, and the URL has not."""
    error = seen.refused
    if error is not None and tls:
        told = f"{broker} has TLS, and the URL says mqtt://"
        return failure("tls_needed", told, f"mqtts://{broker.host}:{broker.port}")
    if isinstance(error, ProtocolRefused):
        return failure("no_mqtt", error.message, error.hint or "is it an MQTT broker? If it is, its log says why")
    if error is not None:
        ours = "correct it under [mqtt]" if isinstance(error, ConfigurationError) else "see the broker's log"
        return refusal(error, _HINTS.get(error.reason, ours))
    if seen.in_its_place:
        told = "one session for each user: the broker took the doctor for the running daemon, and it left at once"
        return warning("shared_session", told, "stop the daemon to check its rights", stops=True)
    return ok(f"the broker lets us in, {'with our identity' if seen.named else 'without a name'}")


def _judge_version(seen: Visit) -> Finding:
    if seen.mqtt5:
        return ok("MQTT 5 is spoken")
    told = "MQTT 3.1.1 only: the broker cannot say that it refuses a message, and an answer may be lost unseen"
    return warning("mqtt_3", told, "use a broker with MQTT 5, such as Mosquitto 2")


def _judge_publish(seen: Visit) -> Finding:
    if seen.own.answers is None and seen.cut:
        advice = "see the broker's log: does it limit messages (Mosquitto: max_qos, message_size_limit)?"
        return failure("no_acknowledgement", f"the broker did not acknowledge a message: {seen.cut}", advice)
    if seen.too_large:
        at_all = bool(seen.own.answers)
        told = f"a short message, but not one of {LARGE} bytes" if at_all else "not even a short message"
        advice = "remove the limit, or raise it (Mosquitto: message_size_limit and max_packet_size)"
        return failure("too_large", f"the broker accepts {told}: {seen.too_large}", advice, stops=not at_all)
    if not seen.own.answers:
        told = f"answers do not get through: {seen.why or 'the broker refuses them'}"
        advice = f"let stationkey's identity write to {seen.responses} {_SHIPPED}"
        return failure("refused", told, advice, stops=False)
    if seen.maximum_qos < 1:
        told = "the broker takes QoS 0 only: an answer that is lost on the way is not sent again"
        return warning("qos_0", told, "allow QoS 1 (Mosquitto: max_qos)")
    if not seen.mqtt5:
        return unknown("with MQTT 3.1.1 the broker also acknowledges refused messages", stops=False)
    return ok(f"the broker takes our messages on {seen.responses}")


def _judge_subscribe(seen: Visit) -> Finding:
    if seen.subscribed is None:
        advice = "see the broker's log"
        return failure("no_acknowledgement", f"no answer to a subscription: {seen.cut}", advice, stops=False)
    if not seen.subscribed:
        advice = f"let stationkey's identity read {seen.requests} {_SHIPPED}"
        return failure("refused", f"requests do not get through: {seen.why}", advice)
    return ok(f"a subscription to {seen.requests} is granted")


def _look_at_reach(context: Context) -> tuple[Visit, str | None] | Finding:
    """Visit the broker, and find out who else reaches it: in words, or None for programs of this machine only."""
    seen, broker = context.once(_visit), _broker_of(context)
    if isinstance(seen, Finding):
        return seen
    if not is_loopback(broker.host):
        return seen, f"every machine that reaches {broker.host}"
    beyond = not all(map(is_loopback, listeners_on(broker.port)))
    return seen, f"every machine that reaches port {broker.port} of this one" if beyond else None


def _judge_own_rights(seen: Visit, reach: str | None) -> Finding:
    if not seen.named:
        return unknown("we have no name at the broker that rights could be given to")
    if seen.own.asks is None:
        return unknown(seen.cut or "the broker did not answer")
    if not seen.own.asks:
        return ok(f"our own identity may not publish on {seen.requests}")
    others = f"; so may {reach}" if reach else ""
    told = f"our own identity may publish on {seen.requests}, as if it were Josev{others}"
    return failure("may_ask", told, f"let only Josev write to {seen.requests}, by an access control list {_SHIPPED}")


def _judge_anonymous(seen: Visit, reach: str | None) -> Finding:
    """Judge what somebody without a name may do. `reach`: who else reaches the broker, or None."""
    whom, rights = reach or "every program of this machine", seen.anonymous
    if rights is None and (seen.refused is not None or seen.in_its_place):
        return unknown("it depends on broker.login", "", "depends")
    if not seen.named:
        told = f"anonymous access: {whom} can have keys created, and answer in stationkey's place"
        advice = f"give Josev and stationkey a name or a certificate each, and an access control list {_SHIPPED}"
        return failure("no_names", told, advice) if reach is not None else warning("no_names", told, advice)
    if rights is None:
        return unknown(seen.anonymous_why) if seen.anonymous_why else ok("anonymous clients are refused")
    may = {
        f"ask for keys ({seen.requests})": rights.asks,
        f"answer in our place ({seen.responses})": rights.answers,
        f"read the answers ({seen.responses})": rights.listens,
    }
    can = [words for words, granted in may.items() if granted]
    advice = f"allow_anonymous false, or an access control list that denies it {_SHIPPED}"
    if can:
        return failure("anonymous_rights", f"anonymous access: {whom} can {' and '.join(can)}", advice)
    told = "anonymous clients can connect, but not use stationkey's topics"
    return ok(told) if reach is None else warning("anonymous", f"{told}: {reach} can", advice)


def _judge_josev(seen: Visit) -> Finding:
    if seen.site:
        return unknown("in a site, each station has a Josev of its own")
    if seen.josev is None:
        return unknown(f"the broker does not say who is subscribed to {seen.responses}")
    if seen.josev:
        return ok(f"a client is subscribed to {seen.responses}")
    told = f"no client is subscribed to {seen.responses}: answers are lost"
    return warning("nobody_listens", told, "is Josev running, at this broker and with this topic prefix?")


def _judge_retained(seen: Visit) -> Finding:
    if not seen.retained:
        return ok(f"no message is retained on {listed(seen.filters)}")
    told = f"a message is retained on {listed(seen.retained)}: the broker sends it at every subscription, as if new"
    clear = f"mosquitto_pub {seen.at} -t {seen.retained[0]} -r -n"
    return warning(
        "retained", told, f"remove it, with a login that may write there: {clear}; and find the client that sets retain"
    )


def _judge_delay(seen: Visit) -> Finding:
    if seen.single is None or seen.pair is None:
        return unknown(seen.cut or "there is no subscription to measure it by")
    took = f"one exchange takes {seen.single * 1000:.1f} ms, two at once {seen.pair * 1000:.1f} ms"
    if seen.pair - seen.single > _NAGLE:
        told = f"the broker holds small packets back (Nagle's algorithm): {took}"
        return warning("nagle", told, f"set_tcp_nodelay true in Mosquitto's configuration {_SHIPPED}, and restart it")
    return ok(took)


_TLS: Final = ("broker.tls",)
_LOGIN: Final = ("broker.login",)
_TALKS: Final = ("broker.publish",)
_TOPICS: Final = ("topic_prefix",)
CHECKS: Final = (
    Check("broker.url", lambda at: (at.settings.broker, at.settings.topic_prefix), _judge_url, reads=("broker",)),
    Check("broker.name", lambda at: (_broker_of(at), at.once(resolve)), _judge_name, ("broker.url",)),
    Check("broker.port", _look_at_port, _judge_port, ("broker.name",)),
    Check("broker.tls", _look_at_tls, _judge_tls, ("broker.port",), ("mqtt",)),
    Check("broker.login", _look_at_login, _judge_login, _TLS, _TOPICS),
    Check("broker.version", _look_at_visit, _judge_version, _LOGIN),
    Check("broker.publish", _look_at_visit, _judge_publish, _LOGIN),
    Check("broker.subscribe", _look_at_visit, _judge_subscribe, _TALKS),
    Check("broker.own_rights", _look_at_reach, _judge_own_rights, _TALKS),
    Check("broker.anonymous", _look_at_reach, _judge_anonymous, _TLS, _TOPICS),
    Check("broker.josev", _look_at_visit, _judge_josev, _TALKS),
    Check("broker.retained", _look_at_visit, _judge_retained, ("broker.subscribe",)),
    Check("broker.delay", _look_at_visit, _judge_delay, _TALKS),
)
