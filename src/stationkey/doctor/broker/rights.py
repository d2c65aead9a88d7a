"""What the broker lets through: what it should, and nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import Final

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import MqttTerms
from stationkey.doctor.broker.probe import LARGE, Visit, visit
from stationkey.doctor.broker.reachability import broker_of, speaks_tls
from stationkey.doctor.host.context import Context, path_of
from stationkey.doctor.host.files import look_at
from stationkey.doctor.host.sockets import listeners_on
from stationkey.doctor.report import Verdict, failure, listed, not_checked, ok, warning
from stationkey.errors import ConfigurationError
from stationkey.mqtt.connection import ProtocolRefused
from stationkey.mqtt.url import Broker
from stationkey.system.addresses import is_loopback

_NAGLE: Final = 0.020
"""Seconds that nothing but a delayed acknowledgement adds; it is 40 ms on Linux."""
_SHIPPED: Final = "(packaging/mosquitto)"
_HINTS: Final = {
    "broker_refuses": "does the broker know user name and password? Its log says more; an access control list by "
    "client id must let in stationkey-doctor-*, too",
    "broker_unreachable": "is it an MQTT broker, and does its log say anything?",
}


def look_at_visit(context: Context) -> tuple[Visit] | Verdict:
    """Visit the broker, once for all checks."""
    seen = context.once(_visit)
    return not_checked(f"{seen}, and without it the broker cannot be visited") if isinstance(seen, str) else (seen,)


def _visit(context: Context) -> Visit | str:
    terms = _at_hand(context)
    if isinstance(terms, str):
        return terms
    prefix, running = context.settings.topic_prefix, context.daemon.running
    return asyncio.run(visit(broker_of(context), terms, prefix, daemon_running=running))


def _at_hand(context: Context) -> MqttTerms | str:
    """Return the terms, with systemd's credentials where they are; or what of them this user may not read.

    What is missing or wrong for the daemon too, other checks say.
    """
    terms, found = context.settings.mqtt, dict[str, SecretReference]()
    for name in ("certificate_file", "key_file", "username", "password"):
        reference = getattr(terms, name)
        if not isinstance(reference, SecretReference):
            continue
        path = path_of(reference)
        if path is None:
            return f"{reference.source} comes from systemd, which has it for root, and while the unit runs"
        found[name] = SecretReference(str(path))
    paths = [Path(one.source) for one in found.values()] + ([terms.ca_file] if terms.ca_file is not None else [])
    if context.me.uid not in {0, context.daemon.user.uid}:
        for path in paths:
            if look_at(path, follow=True).kind in {"file", "unseen"} and not os.access(path, os.R_OK):
                return f"user {context.me.name} may not read {path} (run it as root, or as the daemon's user)"
    return dataclasses.replace(terms, **found)  # type: ignore[arg-type] # each is a field that had a reference before


def look_at_login(context: Context) -> tuple[Broker, Visit, bool] | Verdict:
    """Visit the broker, and see whether a port that does not let us in has TLS."""
    seen, broker = look_at_visit(context), broker_of(context)
    if isinstance(seen, Verdict):
        return seen
    return broker, seen[0], seen[0].refused is not None and not broker.tls and speaks_tls(broker)


def judge_login(broker: Broker, seen: Visit, tls: bool) -> Verdict:
    """Judge whether the broker lets us in. `tls`: whether its port has TLS, and the URL has not."""
    error = seen.refused
    if error is not None and tls:
        return failure(f"{broker} has TLS, and the URL says mqtt://", f"mqtts://{broker.host}:{broker.port}")
    if isinstance(error, ProtocolRefused):
        return failure(error.message, error.hint or "is it an MQTT broker? If it is, its log says why")
    if error is not None:
        ours = "correct it under [mqtt]" if isinstance(error, ConfigurationError) else "see the broker's log"
        return failure(error.message, error.hint or _HINTS.get(error.reason, ours))
    if seen.in_its_place:
        return warning(
            "the broker has one session for each user: the doctor was taken for the running daemon, and left at once. "
            "The daemon reconnects, and nothing is lost",
            "stop the daemon to have its rights examined",
            stops=True,
        )
    return ok(f"the broker lets us in, {'with our identity' if seen.named else 'without a name'}")


def judge_version(seen: Visit) -> Verdict:
    """Judge which MQTT is spoken."""
    if seen.refused is not None:
        return not_checked("of broker.login")
    if seen.mqtt5:
        return ok("MQTT 5 is spoken")
    return warning(
        "the broker has MQTT 3.1.1 only: it cannot say that it refuses a message, and an answer may be lost unseen",
        "use a broker with MQTT 5, such as Mosquitto 2",
    )


def judge_publish(seen: Visit) -> Verdict:
    """Judge whether we may answer."""
    if seen.own.answers is None and seen.cut:
        return failure(
            f"the broker let us in, and then did not acknowledge a message: {seen.cut}",
            "see the broker's log: does it limit messages (Mosquitto: max_qos, message_size_limit)? Is it overloaded?",
        )
    if not seen.own.answers:
        return failure(
            f"answers do not get through: {seen.why or 'the broker refuses them'}",
            f"let stationkey's identity write to {seen.responses} {_SHIPPED}",
            stops=False,
        )
    if seen.too_large:
        return failure(
            f"the broker takes a short message, and none of {LARGE} bytes: {seen.too_large}",
            "remove the limit, or raise it (Mosquitto: message_size_limit and max_packet_size)",
            stops=False,
        )
    if seen.maximum_qos < 1:
        return warning(
            "the broker takes QoS 0 only: an answer that is lost on the way is not sent again",
            "allow QoS 1 (Mosquitto: max_qos)",
        )
    if not seen.mqtt5:
        return not_checked("with MQTT 3.1.1 the broker acknowledges what it refuses, too", stops=False)
    return ok(f"the broker takes our messages on {seen.responses}")


def judge_subscribe(seen: Visit) -> Verdict:
    """Judge whether we may read requests."""
    if seen.subscribed is None:
        return failure(f"no answer to a subscription: {seen.cut}", "see the broker's log", stops=False)
    if not seen.subscribed:
        return failure(
            f"requests do not get through: {seen.why}", f"let stationkey's identity read {seen.requests} {_SHIPPED}"
        )
    return ok(f"a subscription to {seen.requests} is granted")


def look_at_reach(context: Context) -> tuple[Visit, str | None] | Verdict:
    """Visit the broker, and find out who else reaches it: in words, or None for programs of this machine only."""
    seen, broker = look_at_visit(context), broker_of(context)
    if isinstance(seen, Verdict):
        return seen
    if not is_loopback(broker.host):
        return seen[0], f"every machine that reaches {broker.host}"
    beyond = not all(map(is_loopback, listeners_on(broker.port)))
    return seen[0], f"every machine that reaches port {broker.port} of this one" if beyond else None


def judge_own_rights(seen: Visit, reach: str | None) -> Verdict:
    """Judge whether our own identity may ask: who steals it should not have keys made."""
    if not seen.named:
        return not_checked("we have no name at the broker that rights could be given to")
    if seen.own.asks is None:
        return not_checked(seen.cut or "the broker did not answer")
    if not seen.own.asks:
        return ok(f"our own identity may not publish on {seen.requests}")
    others = f"; so may, perhaps, {reach}" if reach else ""
    return failure(
        f"our own identity may publish on {seen.requests}, as if it were Josev{others}",
        f"have an access control list by which only Josev may write to {seen.requests} {_SHIPPED}",
    )


def judge_anonymous(seen: Visit, reach: str | None) -> Verdict:
    """Judge what somebody without a name may do. `reach`: who else reaches the broker, or None."""
    whom, rights = reach or "every program of this machine", seen.anonymous
    if rights is None and (seen.refused is not None or seen.in_its_place):
        return not_checked("of broker.login")
    if not seen.named:
        told = f"the broker takes anybody: {whom} can have keys made, and answer in our place"
        advice = f"give Josev and stationkey a name or a certificate each, and an access control list {_SHIPPED}"
        return failure(told, advice) if reach is not None else warning(told, advice)
    if rights is None and seen.anonymous_why:
        return not_checked(f"nobody could be tried: {seen.anonymous_why}")
    if rights is None:
        return ok("nobody is let in without a name")
    can = [
        words
        for words, may in (
            (f"ask for keys ({seen.requests})", rights.asks),
            (f"answer in our place ({seen.responses})", rights.answers),
            (f"read the answers ({seen.responses})", rights.listens),
        )
        if may
    ]
    advice = f"allow_anonymous false, or an access control list that gives nobody any of it {_SHIPPED}"
    if can:
        return failure(f"the broker lets in anybody, and {whom} can {' and '.join(can)}", advice)
    if reach is not None:
        return warning(f"the broker lets in anybody, though not to our topics: {reach} can", advice)
    return ok("the broker lets in anybody, though not to our topics")


def judge_josev(seen: Visit) -> Verdict:
    """Judge whether anybody waits for answers."""
    if seen.josev is None:
        return not_checked(f"the broker does not say who is subscribed to {seen.responses}")
    if not seen.josev:
        return warning(
            f"nobody is subscribed to {seen.responses}: answers are not heard",
            "is Josev running, at this broker and with this topic prefix?",
        )
    return ok(f"somebody is subscribed to {seen.responses}")


def judge_retained(seen: Visit) -> Verdict:
    """Judge whether an old message is retained on a topic, which every new subscriber gets."""
    if seen.retained:
        return warning(
            f"a message is retained on {listed(seen.retained)}: the broker sends it at every subscription, as if new",
            f"remove it, as who may write there: mosquitto_pub {seen.at} -t {seen.retained[0]} -r -n; and find out who "
            "sets retain",
        )
    return ok(f"no message is retained on {seen.requests}")


def judge_delay(seen: Visit) -> Verdict:
    """Judge whether the broker holds small packets back."""
    if seen.single is None or seen.pair is None:
        return not_checked(seen.cut or "there is no subscription to measure it by")
    took = f"one exchange takes {seen.single * 1000:.1f} ms, two at once {seen.pair * 1000:.1f} ms"
    if seen.pair - seen.single > _NAGLE:
        return warning(
            f"the broker holds small packets back (Nagle's algorithm): {took}",
            "set_tcp_nodelay true in Mosquitto's configuration (packaging/mosquitto/stationkey.conf), then restart it",
        )
    return ok(took)
