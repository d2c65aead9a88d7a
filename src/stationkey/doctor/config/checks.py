"""The configuration: what the file says, who may read and write it, and the files that it names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Final, cast, get_args
from urllib.parse import urlsplit

from msgspec.structs import replace

from stationkey.config.file import SYSTEM_FILE
from stationkey.config.options import Declared, options_of
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import LogFormat, Settings
from stationkey.contract.profiles import ALGORITHMS, PROFILES, RsaModulus
from stationkey.doctor.config import certificates
from stationkey.doctor.config.certificates import judge_access
from stationkey.doctor.host.context import UNIT, Configured, Context, Unit, path_of
from stationkey.doctor.host.files import ENTER, READ, Facts, User, look_at, octal
from stationkey.doctor.host.sockets import listeners_on
from stationkey.doctor.report import Finding, Level, failure, hidden, listed, ok, refusal, unknown, warning
from stationkey.doctor.runner import Check
from stationkey.errors import ConfigurationError
from stationkey.keystore.pkcs11.uri import TokenUri
from stationkey.mqtt.introduction import introduction
from stationkey.mqtt.topics import availability, renewal
from stationkey.service.josev_files import MAX_CERTIFICATE_FILES, STATION
from stationkey.system.addresses import is_loopback
from stationkey.system.listener import Address

_SHOWN: Final = 4
"""Mistakes that are told one by one."""
_PREFIX: Final = "STATIONKEY_"
_VARIABLES: Final = frozenset(
    f"{_PREFIX}{name}"
    for name in ("BROKER", "KEYSTORE", "ALLOW_SOFTWARE_KEYS", "STATE_DIR", "TOPIC_PREFIX", "LOG_FORMAT", "CONFIG")
)
_OTHERS: Final = frozenset(
    f"{_PREFIX}MQTT_{option.name.upper()}" for option in options_of(Settings) if option.table == "mqtt"
)
"""Read by the commands that are clients of the broker."""
_LOADING: Final = ("LoadCredential", "LoadCredentialEncrypted", "SetCredential", "SetCredentialEncrypted")


def _look_at_file(context: Context) -> tuple[Configured] | Finding:
    facts = context.configured.file
    if facts is not None and facts.kind in {"file", "unseen"} and not os.access(facts.path, os.R_OK):
        return hidden(facts.path)
    if context.options.config_file is None and look_at(SYSTEM_FILE).kind == "file":
        return hidden(SYSTEM_FILE)  # or it would have been chosen
    return (context.configured,)


def _judge_file(configured: Configured) -> Finding:
    facts = configured.file
    if facts is not None and facts.kind == "missing":
        return failure("missing", f"{facts.path} is missing: the daemon does not start", "correct the path")
    if configured.complaints:
        more = len(configured.complaints) - _SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        advice = "correct it: the daemon does not start. What needs an invalid option is not checked"
        return failure("invalid", f"{'; '.join(configured.complaints[:_SHOWN])}{rest}", advice)
    return ok("there is no configuration file: the defaults apply" if facts is None else f"{facts.path} is valid")


def _look_at_rights(context: Context) -> tuple[Facts, User] | Finding:
    facts, user = context.configured.file, context.daemon.user
    if facts is None or facts.kind != "file":
        return unknown("no file is named") if facts is None else unknown(f"{facts.path} is not a file to look at")
    return look_at(facts.path, follow=True, user=user), user


def _judge_rights(facts: Facts, user: User) -> list[Finding]:
    path, mode = facts.path, octal(facts.mode)
    found = [one for one in (judge_access("the configuration file", facts, user),) if one is not None]
    if facts.mode & 0o020 and facts.gid != 0:
        told = f"group {facts.gid} may write {path} (mode {mode})"
        found.append(warning("group_writable", told, f"chmod g-w {path}"))
    if facts.uid not in {0, user.uid}:
        told = f"{path} belongs to uid {facts.uid}, not to root or {user.name}"
        found.append(warning("foreign", told, f"chown root {path}"))
    return found or [ok(f"{path} can be changed by its owner alone (mode {mode})")]


def _judge_environment(environment: Mapping[str, str], log_format: str | None) -> Finding:
    """Judge the variables of this shell. A service has its own."""
    ours = sorted(variable for variable in environment if variable.startswith(_PREFIX))
    strange = [variable for variable in ours if variable not in _VARIABLES | _OTHERS]
    if log_format is not None and log_format not in get_args(LogFormat):
        told = f"invalid log format {log_format!r}: the daemon does not start"
        return failure("log_format", told, "STATIONKEY_LOG_FORMAT, or --log-format, is text or json")
    if "OPENSSL_CONF" in environment:
        told = "OPENSSL_CONF is set: it is for services that use keys in the TPM, not for the daemon"
        return warning("openssl_conf", told, "set it for those services alone")
    if strange:
        known = listed(sorted(_VARIABLES), most=9)
        return warning("unknown_variable", f"unknown variable {listed(strange)}; typo?", f"known: {known}")
    return ok(f"{listed(ours)} of this shell override the file" if ours else "no variable changes the settings")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretSeen:
    """A secret that the settings name, and what was seen of it.

    Attributes:
        source: as it stands in the setting `where`.
        facts: of the file; None if it is a credential that is not at hand.
        refused: why the daemon would not take it; None if it would, or if this user cannot read it.
        padded: whether it begins or ends with white space.
    """

    where: str
    source: str
    facts: Facts | None
    refused: ConfigurationError | None = None
    padded: bool = False


def _look_at_secrets(context: Context) -> tuple[list[SecretSeen], User, Unit | None] | Finding:
    user = context.daemon.user
    named = named_secrets(context.settings)
    seen = [
        _look_at(f"[{option.table}] {option.name}", reference, user)
        for option, reference in named.items()
        if option.name not in certificates.FILES
    ]
    seen += [_look_at(f"the pin-source of {place}", pin, user) for place, pin in _pins(context.settings)]
    return (seen, user, context.unit) if seen else ok("no secret is named")


def _pins(settings: Settings) -> Iterator[tuple[str, SecretReference]]:
    """Yield the files with the PINs of tokens, by what names them."""
    for store in settings.stores:
        with suppress(ConfigurationError):  # tpm.keystore tells it
            token = TokenUri.parse(store.uri.removeprefix("pkcs11:")) if store.uri.startswith("pkcs11:") else None
            if token and token.pin and token.pin.file:
                yield store.place, token.pin.file


def _look_at(where: str, reference: SecretReference, user: User) -> SecretSeen:
    source, path = reference.source, path_of(reference)
    if path is None:
        return SecretSeen(where=where, source=source, facts=None)
    facts, refused, padded = look_at(path, follow=True, user=user), None, False
    if facts.there and os.access(path, os.R_OK):
        try:
            content = SecretReference(str(path)).read()
            padded = content != content.strip()
        except ConfigurationError as error:
            refused = error
    return SecretSeen(where=where, source=source, facts=facts, refused=refused, padded=padded)


def _judge_secrets(secrets: list[SecretSeen], user: User, unit: Unit | None) -> Iterator[Finding]:
    """Judge each secret: there, accepted by the daemon, and closed to others. Never show what is in it."""
    for secret in secrets:
        yield _judge_credential(secret, unit) if secret.facts is None else _judge_secret(secret, secret.facts, user)


def _judge_secret(secret: SecretSeen, facts: Facts, user: User) -> Finding:
    where, path = secret.where, facts.path
    if facts.kind == "missing" and "/" not in secret.source:
        advice = "give the path of a file. The value is not shown: it may be the secret itself"
        return failure("missing", f"{where} names a file that is missing", advice)
    if secret.refused is not None:
        exposed = ", and replace the secret: others may have read it" if facts.mode & 0o007 else ""
        advice = secret.refused.hint or "write the secret into a file, and nothing else"
        return failure(secret.refused.reason, f"{where}: {secret.refused.message}", advice + exposed)
    found = judge_access(where, facts, user)
    if found is not None:
        return found
    if secret.padded:
        advice = "remove it, if it is not meant: only one line feed at the end does not count"
        return warning("padded", f"{where}: {path} begins or ends with white space, which counts", advice)
    return ok(f"{where}: {path} is closed to others (mode {octal(facts.mode)})")


def _judge_credential(secret: SecretSeen, unit: Unit | None) -> Finding:
    credential = secret.source.partition(":")[2]
    if unit is None or not unit.installed:
        return unknown(f"{secret.where} comes from systemd, and {UNIT} is not visible")
    loaded = " ".join(unit[field] for field in _LOADING)
    if credential in loaded.replace(":", " ").split() or unit["ImportCredential"]:
        return ok(f"{secret.where}: {UNIT} loads the credential {credential}")
    told = f"{secret.where} needs the credential {credential}, and {UNIT} does not load it"
    return failure("credential", told, f"add LoadCredential={credential}:PATH to the unit; systemctl daemon-reload")


def _look_at_certificate_dir(context: Context) -> tuple[Facts, User, int] | Finding:
    path, user, number = context.settings.certificate_dir, context.daemon.user, 0
    if path is None:
        told = "[josev] certificate_dir is not set: a status is matched to a key by the order of messages alone"
        return warning("not_set", told, "set it to the directory that Josev installs to, if it is on this machine")
    if context.settings.site.stations:  # those of the stations are in it, or will be
        levels = [number for number, part in enumerate(path.parts) if STATION in part]
        path = Path(*path.parts[: levels[0]]) if levels else path
        return look_at(path, follow=True, user=user), user, 0
    facts = look_at(path, follow=True, user=user)
    if facts.kind == "directory" and os.access(path, os.R_OK | os.X_OK):
        for number, _ in enumerate(path.rglob("*")):
            if number > MAX_CERTIFICATE_FILES:
                break
    return facts, user, number


def _judge_certificate_dir(facts: Facts, user: User, number: int) -> Finding:
    path = facts.path
    found = judge_access("[josev] certificate_dir", facts, user, kind="directory", wanted=READ | ENTER)
    if found is not None:  # who puts a certificate there chooses between keys, and gets none
        return dataclasses.replace(found, level=Level.WARNING) if found.reason == "replaceable" else found
    if number > MAX_CERTIFICATE_FILES:
        told = f"{path} has more than {MAX_CERTIFICATE_FILES} files: the daemon does not look through so many"
        return failure("too_many", told, "name the directory of the certificates alone")
    return ok(f"{path} can be read")


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
        found.append(
            failure("listen_taken", told, f"name another port; ss -ltnp sport = :{taken} shows which program uses it")
        )
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
            whole(settings.topic_prefix, topic, site=bool(settings.site.stations))
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
        yield failure("policy_empty", "[policy] allows no request: a list is empty", "list the values to serve")
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


CHECKS: Final = (
    Check("config.file", _look_at_file, _judge_file),
    Check("config.rights", _look_at_rights, _judge_rights),
    Check("config.environment", lambda context: (os.environ, context.options.log_format), _judge_environment),
    Check("config.sense", _look_at_settings, _judge_settings),
    Check("config.secrets", _look_at_secrets, _judge_secrets),
    certificates.CHECK,
    Check("config.certificate_dir", _look_at_certificate_dir, _judge_certificate_dir, reads=("josev",)),
)
