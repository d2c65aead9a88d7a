"""Settings that are each valid, and together are not what anybody wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import Settings
from stationkey.contract.profiles import ALGORITHMS, PROFILES, RsaModulus
from stationkey.doctor.host.context import Context
from stationkey.doctor.host.files import look_at
from stationkey.doctor.host.sockets import listeners_on
from stationkey.doctor.report import Verdict, failure, listed, ok, warning
from stationkey.errors import ConfigurationError
from stationkey.mqtt.tls import introduction
from stationkey.mqtt.topics import availability, renewal
from stationkey.system.addresses import is_loopback
from stationkey.system.listener import Address

_SHORT: Final = 5.0
"""Seconds. A busy TPM takes that long now and then."""

_TPM_SECRETS: Final = ("owner_auth", "srk_auth", "endorsement_auth", "key_auth")


def look_at_settings(context: Context) -> tuple[Settings, Path | None, int | None]:
    """Look at the settings; and at what keeps the daemon from listening: a missing directory, or a port in use."""
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


def judge_settings(settings: Settings, missing: Path | None = None, taken: int | None = None) -> list[Verdict]:
    """Judge settings that contradict each other, or this machine."""
    found = [*_broker(settings), *_tpm(settings), *_policy(settings), *_paths(settings)]
    if settings.deadlines.ec < _SHORT or settings.deadlines.rsa < _SHORT:
        found.append(
            warning(
                f"[deadlines] ec = {settings.deadlines.ec:g} and rsa = {settings.deadlines.rsa:g}: a busy hardware TPM "
                "takes some seconds, and a request that takes longer is rejected",
                "use the defaults, 30 and 60",
            )
        )
    try:
        Address.parse(settings.metrics or "127.0.0.1:1")
    except ConfigurationError as error:
        found.append(failure(error.message, error.hint))
    if missing is not None:
        found.append(
            failure(
                f"[metrics] listen: there is no directory {missing}, and the daemon does not start without",
                "RuntimeDirectory= in the unit makes one below /run; or name another path",
            )
        )
    if taken is not None:
        found.append(
            failure(
                f"[metrics] listen: another program listens on port {taken}, and the daemon would not start",
                f"which one is it (ss -ltnp sport = :{taken})? Name another port",
            )
        )
    return found or [ok("no contradictions")]


def _broker(settings: Settings) -> Iterator[Verdict]:
    mqtt = settings.mqtt
    try:
        parts = urlsplit(settings.broker)
        plain, host = parts.scheme == "mqtt", parts.hostname or ""
    except ValueError:
        return  # broker.url says it
    if plain:
        try:
            introduction(dataclasses.replace(mqtt, username=None, password=None), tls=False)
        except ConfigurationError as error:
            yield failure(error.message, error.hint)
    if plain and mqtt.password is not None and not is_loopback(host):
        yield failure(
            "the password crosses the network in the clear: the broker's URL begins with mqtt://",
            'broker = "mqtts://HOST[:8883]", or a broker on 127.0.0.1',
        )
    if mqtt.username is not None and mqtt.password is None and mqtt.certificate_file is None:
        yield warning("[mqtt] has a user name and neither password nor certificate", "set password_file")
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
                yield failure(
                    f"{option}: {error.message}",
                    "name a topic of its own, without + and #: not josev/cs, and not cs/josev",
                )


def _tpm(settings: Settings) -> Iterator[Verdict]:
    tpm = settings.tpm
    if settings.keystore == "software:" and (tpm.key_auth or tpm.pcrs or tpm.session != "none"):
        yield warning("[tpm] protects nothing: the key store is software:", "name a TPM as keystore")
    if tpm.key_auth is not None and tpm.session == "none":
        yield warning(
            "[tpm] key_auth is set and session is none: whoever listens on the bus to the TPM reads the value",
            'session = "encrypted", if the TPM is a discrete chip',
        )
    if tpm.pcrs and tpm.pcr_bank == "sha1":
        yield warning('[tpm] pcr_bank = "sha1": SHA-1 is broken', 'pcr_bank = "sha256"')
    if settings.allow_software_keys and settings.keystore != "software:":
        yield warning(
            "software keys are allowed, and not used",
            "remove allow_software_keys: a typo in keystore would then leave the keys unprotected",
        )


def _policy(settings: Settings) -> Iterator[Verdict]:
    policy = settings.policy
    for certificate_type in policy.certificate_types:
        required = PROFILES[certificate_type].required_algorithm
        if required is not None and required not in policy.algorithms:
            yield failure(
                f"[policy] serves {certificate_type} without {required}, the only algorithm that it may have",
                f"add {required} to algorithms, or remove {certificate_type} from certificate_types",
            )
    if not policy.certificate_types or not policy.algorithms:
        yield failure("[policy] lets no request through: a list is empty", "name what is to be served")
    rsa = any(isinstance(ALGORITHMS[algorithm].key_types[0], RsaModulus) for algorithm in policy.algorithms)
    if settings.pool.rsa and not rsa:
        yield warning(
            f"[pool] makes {settings.pool.rsa} RSA key(s) ahead, and [policy] algorithms has no RSA", "[pool] rsa = 0"
        )


def _paths(settings: Settings) -> Iterator[Verdict]:
    """Find relative paths: they lead elsewhere for a service than for the shell that they were tried in."""
    mqtt = settings.mqtt
    sources = [reference.source for _, reference in named_secrets(settings)]
    sources += [file.source for file in (mqtt.certificate_file, mqtt.key_file) if file is not None]
    # Without a slash it may be the secret itself, set in the wrong place; config.secrets tells that.
    named = [source for source in sources if "/" in source and not source.startswith("credential:")]
    named += [str(path) for path in (settings.state_dir, settings.certificate_dir, mqtt.ca_file) if path is not None]
    if relative := [path for path in named if not path.startswith("/")]:
        yield warning(
            f"{listed(relative)} is relative: it is looked for in the directory that the daemon is started in. ~ is "
            "not expanded",
            "write the whole path",
        )


def named_secrets(settings: Settings) -> Iterator[tuple[str, SecretReference]]:
    """Return every secret that the settings name, and by which setting."""
    for where, value in (
        ("[mqtt] username_file", settings.mqtt.username),
        ("[mqtt] password_file", settings.mqtt.password),
        *((f"[tpm] {name}", getattr(settings.tpm, name)) for name in _TPM_SECRETS),
    ):
        if isinstance(value, SecretReference):
            yield where, value
