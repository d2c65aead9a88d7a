"""Settings that are each right, and together are not what anybody wants."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import Settings
from stationkey.contract.profiles import ALGORITHMS, PROFILES, RsaModulus
from stationkey.doctor.report import Finding, failure, listed, warning
from stationkey.errors import ConfigurationError
from stationkey.mqtt.topics import availability
from stationkey.system.listener import Address

_SHORT: Final = 5.0
"""Seconds. A busy TPM takes that long now and then."""


def judge_sense(settings: Settings) -> Iterator[Finding]:
    """Settings that are each right, and together are not what anybody wants."""
    yield from _about_the_broker(settings)
    yield from _about_the_tpm(settings)
    yield from _about_the_policy(settings)
    yield from _about_paths(settings)
    if settings.deadlines.ec < _SHORT or settings.deadlines.rsa < _SHORT:
        yield warning(
            "config.sense",
            f"[deadlines] ec = {settings.deadlines.ec:g} and rsa = {settings.deadlines.rsa:g}: a hardware TPM that is "
            "busy takes some seconds, and a request that takes longer is rejected",
            "take the defaults, 30 and 60",
        )
    if settings.metrics:
        try:
            Address.parse(settings.metrics)
        except ConfigurationError as error:
            yield failure("config.sense", error.message, error.hint)


def is_loopback(host: str) -> bool:
    """Whether an address, or the name of this machine itself, leads nowhere else."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _about_the_broker(settings: Settings) -> Iterator[Finding]:
    name, mqtt = "config.sense", settings.mqtt
    try:
        parts = urlsplit(settings.broker)
        scheme, host = parts.scheme, parts.hostname or ""
    except ValueError:
        return  # the check of the broker says it
    named = [
        field
        for field, value in (
            ("ca_file", mqtt.ca_file),
            ("certificate_file", mqtt.certificate_file),
            ("key_file", mqtt.key_file),
            ("server_name", mqtt.server_name),
        )
        if value is not None
    ]
    if scheme == "mqtt" and named:
        yield failure(
            name,
            f"[mqtt] has {listed(named)}, but the broker's URL begins with mqtt://: there is no TLS",
            'broker = "mqtts://HOST[:8883]"',
        )
    if scheme == "mqtt" and mqtt.password is not None and not is_loopback(host):
        yield failure(
            name,
            "the password goes over the network in the clear: the broker's URL begins with mqtt://",
            'broker = "mqtts://HOST[:8883]", or a broker on 127.0.0.1',
        )
    if mqtt.username is not None and mqtt.password is None and mqtt.certificate_file is None:
        yield warning(name, "[mqtt] has a user name and neither password nor certificate", "set password_file")
    if mqtt.availability_topic is not None:
        try:
            availability(settings.topic_prefix, mqtt.availability_topic)
        except ConfigurationError as error:
            if (
                error.reason == "availability_topic_invalid"
            ):  # else it is the prefix, and the check of the broker says it
                yield failure(
                    name,
                    f"[mqtt] availability_topic: {error.message}",
                    "name a topic of its own, without + and #: not josev/cs, and not cs/josev",
                )


def _about_the_tpm(settings: Settings) -> Iterator[Finding]:
    name, tpm = "config.sense", settings.tpm
    if settings.keystore == "software:" and (tpm.key_auth or tpm.pcrs or tpm.session != "none"):
        yield warning(name, "[tpm] protects nothing: the key store is software:", "name a TPM as keystore")
    if tpm.key_auth is not None and tpm.session == "none":
        yield warning(
            name,
            "[tpm] key_auth is set and session is none: whoever listens on the bus to the TPM reads the value",
            'session = "encrypted", if the TPM is a chip of its own',
        )
    if tpm.pcrs and tpm.pcr_bank == "sha1":
        yield warning(name, '[tpm] pcr_bank = "sha1": SHA-1 is broken', 'pcr_bank = "sha256"')
    if settings.allow_software_keys and settings.keystore != "software:":
        yield warning(
            name,
            "software keys are allowed, and not used",
            "take allow_software_keys out: one slip in keystore would then leave the keys unprotected",
        )


def _about_the_policy(settings: Settings) -> Iterator[Finding]:
    name, policy = "config.sense", settings.policy
    served = set(policy.algorithms)
    for certificate_type in policy.certificate_types:
        required = PROFILES[certificate_type].required_algorithm
        if required is not None and required not in served:
            yield failure(
                name,
                f"[policy] serves {certificate_type}, and not {required}, which is the only algorithm that it may have",
                f"add {required} to algorithms, or take {certificate_type} out of certificate_types",
            )
    if not policy.certificate_types or not policy.algorithms:
        yield failure(name, "[policy] lets no request through: a list is empty", "name what is to be served")
    rsa = any(isinstance(ALGORITHMS[algorithm].key_types[0], RsaModulus) for algorithm in served)
    if settings.pool.rsa and not rsa:
        yield warning(
            name,
            f"[pool] makes {settings.pool.rsa} RSA key(s) ahead, and [policy] algorithms has no RSA",
            "[pool] rsa = 0",
        )


def _about_paths(settings: Settings) -> Iterator[Finding]:
    """A path leads elsewhere for a service than for the shell that it was tried in, unless it begins at the root."""
    mqtt, tpm = settings.mqtt, settings.tpm
    secrets = (
        *(mqtt.certificate_file, mqtt.key_file, mqtt.username, mqtt.password),
        *(tpm.owner_auth, tpm.srk_auth, tpm.endorsement_auth, tpm.key_auth),
    )
    sources = [secret.source for secret in secrets if isinstance(secret, SecretReference)]
    # Without a slash it may be the secret itself, set in the wrong place; that is told where secrets are judged.
    named = [source for source in sources if "/" in source and not source.startswith("credential:")]
    named += [str(path) for path in (settings.state_dir, settings.certificate_dir, mqtt.ca_file) if path is not None]
    relative = [path for path in named if not path.startswith("/")]
    if relative:
        yield warning(
            "config.sense",
            f"{listed(relative)} does not begin with a slash: it is looked for in the directory that the daemon is "
            "started in, and here in another one, perhaps. Nothing puts a home in the place of ~",
            "write the whole path",
        )
