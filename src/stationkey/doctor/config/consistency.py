"""Settings that are each valid, and together are not what anybody wants."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

from msgspec.structs import replace

from stationkey.config.options import Declared, options_of
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import Settings
from stationkey.contract.profiles import ALGORITHMS, PROFILES, RsaModulus
from stationkey.doctor.host.context import Context
from stationkey.doctor.host.files import look_at
from stationkey.doctor.host.sockets import listeners_on
from stationkey.doctor.report import Finding, failure, listed, ok, refusal, warning
from stationkey.doctor.runner import Check
from stationkey.errors import ConfigurationError
from stationkey.mqtt.tls import introduction
from stationkey.mqtt.topics import availability, renewal
from stationkey.system.addresses import is_loopback
from stationkey.system.listener import Address

_SHORT: Final = 5.0
"""Seconds. A busy TPM takes that long now and then."""


def _look_at_settings(context: Context) -> tuple[Settings, Path | None, int | None]:
    settings = context.settings
    try:
        address = Address.parse(settings.metrics) if settings.metrics else None
    except ConfigurationError:
        address = None
    if address is None or context.daemon.running:
        return settings, None, None
    if address.path is None:
        return settings, None, address.port if listeners_on(address.port) else None
    parent = address.path.parent
    return settings, parent if look_at(parent, follow=True).kind in {"missing", "file"} else None, None


def _judge_settings(settings: Settings, missing: Path | None = None, taken: int | None = None) -> list[Finding]:
    """Judge settings that contradict each other; `missing` directory and `taken` port are where it should listen."""
    found = [*_broker(settings), *_tpm(settings), *_policy(settings), *_paths(settings)]
    if min(settings.deadlines.ec, settings.deadlines.rsa) < _SHORT:
        told = f"[deadlines] below {_SHORT:g} s: a busy TPM takes longer, and the request is rejected"
        found.append(warning("deadline_short", told, "use the defaults, 30 and 60"))
    try:
        Address.parse(settings.metrics or "127.0.0.1:1")
    except ConfigurationError as error:
        found.append(refusal(error))
    if missing is not None:
        told = f"[metrics] listen: the directory {missing} is missing, and the daemon does not start"
        found.append(failure("listen_missing", told, "add RuntimeDirectory= to the unit, or name another path"))
    if taken is not None:
        told = f"[metrics] listen: another program listens on port {taken}, and the daemon does not start"
        found.append(failure("listen_taken", told, f"name another port; ss -ltnp sport = :{taken} shows who has it"))
    return found or [ok("no contradictions")]


def _broker(settings: Settings) -> Iterator[Finding]:
    mqtt = settings.mqtt
    try:
        parts = urlsplit(settings.broker)
        plain, host = parts.scheme == "mqtt", parts.hostname or ""
    except ValueError:
        return  # broker.url says it
    if plain:
        try:
            introduction(replace(mqtt, username=None, password=None), tls=False)
        except ConfigurationError as error:
            yield refusal(error)
    if plain and mqtt.password is not None and not is_loopback(host):
        told = "the password crosses the network in the clear: the broker's URL begins with mqtt://"
        yield failure("password_clear", told, 'broker = "mqtts://HOST[:8883]", or a broker on 127.0.0.1')
    if mqtt.username is not None and mqtt.password is None and mqtt.certificate_file is None:
        told = "[mqtt] has a user name, and neither password nor certificate"
        yield warning("password_missing", told, "set password_file")
    topics = {
        "[mqtt] availability_topic": (availability, mqtt.availability_topic),
        "[renewal] topic": (renewal, settings.renewal.topic),
    }
    for option, (whole, topic) in topics.items():
        if topic is None:
            continue
        try:
            whole(settings.topic_prefix, topic)
        except ConfigurationError as error:
            if error.reason != "topic_prefix_invalid":  # of that, broker.url says it
                advice = "name a topic of its own, without + and #: not josev/cs, and not cs/josev"
                yield failure(error.reason, f"{option}: {error.message}", advice)


def _tpm(settings: Settings) -> Iterator[Finding]:
    tpm = settings.tpm
    uris = {store.uri for store in settings.stores}
    if uris == {"software:"} and (tpm.key_auth or tpm.pcrs or tpm.session != "none"):
        told = "[tpm] protects nothing: the keys are in software"
        yield warning("tpm_unused", told, "name a TPM as keystore")
    if tpm.key_auth is not None and tpm.session == "none":
        told = "[tpm] key_auth without session: who listens on the bus to the TPM reads the value"
        yield warning("key_auth_clear", told, 'session = "encrypted", if the TPM is a discrete chip')
    if tpm.pcrs and tpm.pcr_bank == "sha1":
        yield warning("sha1", '[tpm] pcr_bank = "sha1": SHA-1 is broken', 'pcr_bank = "sha256"')
    if settings.allow_software_keys and "software:" not in uris:
        told = "software keys are allowed, and not used: a typo in keystore would leave the keys unprotected"
        yield warning("software_allowed", told, "remove allow_software_keys")


def _policy(settings: Settings) -> Iterator[Finding]:
    policy = settings.policy
    for certificate_type in policy.certificate_types:
        required = PROFILES[certificate_type].required_algorithm
        if required is not None and required not in policy.algorithms:
            told = f"[policy] serves {certificate_type} without {required}, its only algorithm"
            yield failure("algorithm_missing", told, f"add {required} to algorithms, or remove {certificate_type}")
    if not policy.certificate_types or not policy.algorithms:
        yield failure("policy_empty", "[policy] lets no request through: a list is empty", "name what is to be served")
    rsa = any(isinstance(ALGORITHMS[algorithm].key_types[0], RsaModulus) for algorithm in policy.algorithms)
    if settings.pool.rsa and not rsa:
        told = f"[pool] makes {settings.pool.rsa} RSA key(s) ahead, and [policy] algorithms has no RSA"
        yield warning("pool_unused", told, "[pool] rsa = 0")


def _paths(settings: Settings) -> Iterator[Finding]:
    """Find relative paths: they lead elsewhere for a service than for the shell that they were tried in."""
    sources = [reference.source for reference in named_secrets(settings).values()]
    # Without a slash it may be the secret itself, set in the wrong place; config.secrets tells that.
    named = [source for source in sources if "/" in source and not source.startswith("credential:")]
    named += [
        str(path) for path in (settings.state_dir, settings.certificate_dir, settings.mqtt.ca_file) if path is not None
    ]
    if relative := [path for path in named if not path.startswith("/")]:
        told = f"{listed(relative)} is relative to where the daemon is started; ~ is not expanded"
        yield warning("path_relative", told, "write the whole path")


def named_secrets(settings: Settings) -> dict[Declared, SecretReference]:
    """Return every file with a secret in it that the settings name."""
    by_field = {option.path: option for option in options_of(Settings)}  # the last one of a field is its file
    named = ((option, reduce(getattr, path, cast("Any", settings))) for path, option in by_field.items())
    return {option: value for option, value in named if isinstance(value, SecretReference)}


CHECK: Final = Check("config.sense", _look_at_settings, _judge_settings)
