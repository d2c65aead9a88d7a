"""The way to the broker: its address, its port, and TLS."""

from __future__ import annotations

import dataclasses
import os
import socket
import ssl
import time
from datetime import UTC, datetime
from typing import Final

from stationkey.doctor.config.certificates import MONTH
from stationkey.doctor.host.context import Context
from stationkey.doctor.report import RUN_AS, Verdict, failure, listed, not_checked, ok, warning
from stationkey.doctor.runner import within
from stationkey.errors import ConfigurationError, StationKeyError
from stationkey.mqtt.tls import introduction, no_handshake
from stationkey.mqtt.topics import MAX_PREFIX, topics
from stationkey.mqtt.url import DEFAULT_TLS_PORT, Broker
from stationkey.system.addresses import is_loopback

Addresses = list[tuple[int, tuple[object, ...]]]
"""Family and address of each, as `socket` has them."""
_NAME: Final = 2.0
_PORT: Final = 2.0
_PLAIN_PORT: Final = "is it a port without TLS (1883)?"


def look_at_url(context: Context) -> tuple[str, str]:
    """Look at the URL and the topic prefix."""
    return context.settings.broker, context.settings.topic_prefix


def judge_url(url: str, prefix: str) -> Verdict:
    """Judge the URL and the topic prefix, by the daemon's own rules."""
    try:
        broker = Broker.parse(url)
        topics(prefix)
    except ConfigurationError as error:
        hint = error.hint or "correct it in the configuration"
        if error.reason == "topic_prefix_invalid":
            hint = f"correct topic_prefix: no + and #, no $ at its beginning, {MAX_PREFIX} bytes at the most"
        return failure(error.message, hint)
    if not broker.tls and broker.port == DEFAULT_TLS_PORT:
        return warning(f"{broker} has the port that is for TLS, and no TLS", f"mqtts://{broker.host}")
    return ok(f"the broker is {broker}" + (", on this machine" if is_loopback(broker.host) else ""))


def broker_of(context: Context) -> Broker:
    """Return the broker that is configured; `judge_url` says whether there is one."""
    return Broker.parse(context.settings.broker)


def look_at_name(context: Context) -> tuple[Broker, Addresses | str]:
    """Resolve the name."""
    return broker_of(context), context.once(_resolve)


def _resolve(context: Context) -> Addresses | str:
    broker = broker_of(context)

    def resolve() -> Addresses | str:
        try:
            found = socket.getaddrinfo(broker.host, broker.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            return getattr(error, "strerror", None) or str(error)
        return [(int(family), address) for family, _, _, _, address in found]

    otherwise: Addresses | str = f"no answer within {_NAME:g} s"
    return within(_NAME, resolve, otherwise)


def judge_name(broker: Broker, addresses: Addresses | str) -> Verdict:
    """Judge what the name resolves to. `addresses`: or why there are none."""
    if isinstance(addresses, str):
        return failure(
            f"{broker.host} does not resolve: {addresses}",
            "is it spelled right, and does the name server answer (resolvectl query, /etc/resolv.conf)? Or name an "
            "address",
        )
    return ok(f"{broker.host} is {listed(dict.fromkeys(str(address[0]) for _, address in addresses))}")


def look_at_port(context: Context) -> tuple[Broker, str]:
    """Connect to each address until one accepts; the text says why none does."""
    addresses = context.once(_resolve)
    why, end = "it has no address", time.monotonic() + _PORT
    for family, address in addresses if isinstance(addresses, list) else ():
        left = end - time.monotonic()
        if left <= 0:
            break
        try:
            with socket.socket(family, socket.SOCK_STREAM) as connection:
                connection.settimeout(left)
                connection.connect(address)
                return broker_of(context), ""
        except TimeoutError:
            why = f"no answer within {_PORT:g} s"
        except OSError as error:
            why = error.strerror or str(error)
    return broker_of(context), why


def judge_port(broker: Broker, why: str) -> Verdict:
    """Judge whether anything listens. `why`: it does not, or an empty text."""
    if why:
        return failure(
            f"nothing accepts a connection at {broker}: {why}",
            "is the broker running (systemctl status mosquitto), on this port and address, and no firewall in between?",
        )
    return ok(f"something listens at {broker}")


def look_at_tls(context: Context) -> tuple[Broker, str, str, Exception | None, datetime] | Verdict:
    """Shake hands with the broker, without the client's own certificate: its key may be in the TPM."""
    broker, mqtt, now = broker_of(context), context.settings.mqtt, datetime.now(UTC)
    if not broker.tls:
        return broker, "", "", None, now
    if mqtt.ca_file is not None and mqtt.ca_file.exists() and not os.access(mqtt.ca_file, os.R_OK):
        return not_checked(f"user {context.me.name} may not read {mqtt.ca_file}", RUN_AS)
    bare = dataclasses.replace(mqtt, certificate_file=None, key_file=None, username=None, password=None)
    try:
        tls = introduction(bare, tls=True).tls
        assert tls is not None
        with (
            socket.create_connection((broker.host, broker.port), _PORT) as connection,
            tls.wrap_socket(connection, server_hostname=broker.host) as session,
        ):
            certificate = session.getpeercert() or {}
            return broker, session.version() or "", str(certificate.get("notAfter", "")), None, now
    except (OSError, StationKeyError) as error:
        return broker, "", "", error, now


def judge_tls(broker: Broker, version: str, ends: str, error: Exception | None, now: datetime) -> Verdict:
    """Judge the broker's certificate.

    Args:
        broker: where it is.
        version: of TLS that was agreed on.
        ends: when the broker's certificate expires, as `ssl` gives it.
        error: why there is no TLS, or None.
        now: the time.
    """
    if error is not None:
        return _judge_handshake(broker, error)
    if not broker.tls and is_loopback(broker.host):
        return ok("no TLS, which does not matter on this machine itself")
    if not broker.tls:
        return warning(
            f"what goes to and from {broker.host} can be read and changed on the way: there is no TLS",
            'broker = "mqtts://HOST[:8883]" and [mqtt] ca_file, and a listener with TLS at the broker',
        )
    try:
        end = datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)
    except ValueError:
        return ok(f"{version}, and the broker's certificate is verified")
    if end - now < MONTH:
        return warning(
            f"the broker's certificate expires in {(end - now).days} days, on {end:%Y-%m-%d}",
            "have a new one made for the broker in time: afterwards no connection is made",
        )
    return ok(f"{version}, and the broker's certificate is verified (until {end:%Y-%m-%d})")


def _judge_handshake(broker: Broker, error: Exception) -> Verdict:
    match error:
        case ssl.SSLError() if "_ALERT_" in (error.reason or ""):  # the login tells whether it takes ours
            return ok("TLS is spoken, and a certificate of the client is wanted")
        case ssl.SSLError():
            hint = "TLS 1.2 is the least that is accepted; see the broker's log"
            if error.reason == "WRONG_VERSION_NUMBER":
                hint = "that port has no TLS: name the port that has, or begin the URL with mqtt://"
            said = no_handshake(str(broker), error)
            return failure(said.message, said.hint or hint)
        case TimeoutError():
            return failure(f"{broker} accepts the connection and does not answer to TLS", _PLAIN_PORT)
        case StationKeyError():
            return failure(error.message, error.hint or "correct it under [mqtt]")
    return failure(f"no TLS with {broker}: {getattr(error, 'strerror', None) or error}", _PLAIN_PORT)


def speaks_tls(broker: Broker) -> bool:
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
