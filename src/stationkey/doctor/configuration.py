"""The configuration file, what it names, and what in it contradicts itself."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from stationkey.config import Settings
from stationkey.credential import SecretReference
from stationkey.doctor.files import ENTER, READ, WRITE, Facts, User, closed_on_the_way, look_at, octal, permits
from stationkey.doctor.findings import Finding, failure, listed, not_checked, ok, warning
from stationkey.doctor.subject import UNIT, Configured, Options, Subject, Unit, path_of
from stationkey.errors import ConfigurationError
from stationkey.profiles import ALGORITHMS, PROFILES, RsaModulus

FILE_IDS: Final = ("config.file", "config.rights", "config.environment", "config.sense")
SECRET_IDS: Final = ("config.secrets",)
JOSEV_IDS: Final = ("config.certificate_dir",)

_USUAL: Final = Path("/etc/stationkey/stationkey.toml")
_PREFIX: Final = "STATIONKEY_"
_VARIABLES: Final = frozenset(
    f"{_PREFIX}{name}"
    for name in (
        *("BROKER", "KEYSTORE", "ALLOW_SOFTWARE_KEYS", "STATE_DIR", "TOPIC_PREFIX", "LOG_FORMAT", "CONFIG"),
        "COMPLETE",
    )
)
_LOG_FORMATS: Final = ("text", "json")
_SHORT: Final = 5.0
"""Seconds. A busy TPM takes that long now and then."""
_MAX_LISTED: Final = 1024
"""Files in a certificate directory, beyond which the daemon does not look."""


def check_file(subject: Subject) -> Iterator[Finding]:
    """The file itself, who may do what with it, the environment, and whether it makes sense."""
    configured, user = subject.configured, subject.daemon.user
    usual = subject.options.config_file is None and look_at(_USUAL).kind == "file"
    closed = None if configured.file is None else closed_on_the_way(configured.file.path, user)
    yield judge_file(configured, usual=usual)
    yield from judge_rights(configured.file, user, closed)
    yield from judge_environment(os.environ, subject.options)
    found = list(judge_sense(subject.settings))
    yield from found or [ok("config.sense", "nothing in it contradicts itself")]


def judge_file(configured: Configured, *, usual: bool) -> Finding:
    """Whether the file can be read and is right. `usual`: none is named, and there is one where the package puts it."""
    facts, name = configured.file, "config.file"
    if configured.complaints:
        said = "; ".join(configured.complaints[:4])
        rest = "" if len(configured.complaints) <= 4 else f"; and {len(configured.complaints) - 4} more"  # noqa: PLR2004 - as above
        return failure(
            name,
            f"{said}{rest}",
            "the daemon does not start with it. Put it right by packaging/stationkey.toml, which says what each name "
            "may be. Where it is wrong, the defaults are examined below",
        )
    if usual:
        return warning(
            name,
            f"no configuration file is named, so the defaults are examined; but there is {_USUAL}",
            f"if the daemon uses it, say so here too: stationkey doctor --config {_USUAL}",
        )
    if facts is None:
        return ok(name, "no configuration file is named: the defaults hold, and what options and environment say")
    return ok(name, f"{facts.path} is valid")


def judge_rights(facts: Facts | None, user: User, closed: Path | None) -> Iterator[Finding]:
    """Who may read and who may write the file. `closed`: a directory on the way that the daemon's user may not enter."""
    name = "config.rights"
    if facts is None:
        yield not_checked(name, "no file is named")
        return
    path, before = facts.path, 0
    if facts.kind != "file":
        yield not_checked(name, f"{path} is {'not there' if facts.kind == 'missing' else 'not to be seen from here'}")
        return
    for bad, finding in (
        (
            facts.mode & 0o002 != 0,
            failure(
                name,
                f"every user of this machine may write {path} (mode {octal(facts.mode)}), and so choose the TPM, the "
                "broker and the policy",
                f"chmod o-w {path}",
            ),
        ),
        (
            facts.exposed is not None,
            failure(name, f"every user may exchange {path}: {facts.exposed} is open", f"chmod o-w {facts.exposed}"),
        ),
        (
            facts.mode & 0o020 != 0 and facts.gid != 0,
            warning(
                name,
                f"group {facts.gid} may write {path} (mode {octal(facts.mode)})",
                f"chmod g-w {path}, unless all of that group may change how the station's keys are kept",
            ),
        ),
        (
            facts.uid not in {0, user.uid},
            warning(
                name,
                f"{path} belongs to user number {facts.uid}, who is neither root nor the daemon's user ({user.name})",
                f"chown root {path}",
            ),
        ),
        (
            closed is not None or not permits(facts, user, READ),
            failure(
                name,
                f"the daemon's user {user.name} may not read {path}"
                + (f": {closed} is closed to it" if closed else f" (mode {octal(facts.mode)})"),
                f"chmod o+x {closed}" if closed else f"chgrp {user.gid} {path} && chmod g+r {path}",
            ),
        ),
    ):
        if bad:
            before += 1
            yield finding
    if not before:
        yield ok(name, f"{path} can be changed by its owner alone (mode {octal(facts.mode)})")


def judge_environment(environment: Mapping[str, str], options: Options) -> Iterator[Finding]:
    """The variables of this shell. A service has its own."""
    name = "config.environment"
    ours = sorted(variable for variable in environment if variable.startswith(_PREFIX))
    strange = [variable for variable in ours if variable not in _VARIABLES]
    if options.log_format is not None and options.log_format not in _LOG_FORMATS:
        yield failure(
            name,
            f"the log format {options.log_format!r} is none: stationkey serve would not start",
            "STATIONKEY_LOG_FORMAT (or --log-format) is text or json",
        )
    elif strange:
        yield warning(
            name,
            f"nothing reads {listed(strange)}",
            f"is it a slip of the pen? What is read: {listed(sorted(_VARIABLES - {f'{_PREFIX}COMPLETE'}), most=9)}",
        )
    elif ours:
        yield ok(name, f"{listed(ours)} of this shell win over the file")
    else:
        yield ok(name, "no variable of this shell changes the settings")


def judge_sense(settings: Settings) -> Iterator[Finding]:
    """Settings that are each right, and together are not what anybody wants."""
    yield from _about_the_broker(settings)
    yield from _about_the_tpm(settings)
    yield from _about_the_policy(settings)
    if settings.deadlines.ec < _SHORT or settings.deadlines.rsa < _SHORT:
        yield warning(
            "config.sense",
            f"[deadlines] ec = {settings.deadlines.ec:g} and rsa = {settings.deadlines.rsa:g}: a hardware TPM that is "
            "busy takes some seconds, and a request that takes longer is rejected",
            "take the defaults, 30 and 60",
        )
    if settings.metrics and not _is_local(settings.metrics):
        yield failure(
            "config.sense",
            f"[metrics] listen = {settings.metrics!r} can be asked from outside this machine",
            'figures are for this machine alone: listen = "127.0.0.1:PORT", or a unix: socket',
        )


def _is_local(listen: str) -> bool:
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    return is_loopback(host) or host == "localhost"


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
    topic = mqtt.availability_topic
    if topic is not None and any(character in topic for character in "+#\0"):
        yield failure(name, f"[mqtt] availability_topic {topic!r} has a wildcard", "name one topic, without + and #")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretSeen:
    """A secret that the settings name, and what was seen of it.

    Attributes:
        where: the setting, ``[mqtt] password_file`` for example.
        source: as it stands there.
        facts: of the file; None where it is a credential that is not at hand.
        closed: a directory on the way that the daemon's user may not enter, or None.
        complaint: why it could not be read; empty where it could, or where that was not tried.
        padded: whether there is white space at one of its ends.
    """

    where: str
    source: str
    facts: Facts | None
    closed: Path | None = None
    complaint: str = ""
    padded: bool = False


def secrets_of(settings: Settings) -> Iterator[tuple[str, SecretReference]]:
    """Every secret that the settings name, and by which setting."""
    for where, value in (
        ("[mqtt] username_file", settings.mqtt.username),
        ("[mqtt] password_file", settings.mqtt.password),
        ("[tpm] owner_auth", settings.tpm.owner_auth),
        ("[tpm] srk_auth", settings.tpm.srk_auth),
        ("[tpm] endorsement_auth", settings.tpm.endorsement_auth),
        ("[tpm] key_auth", settings.tpm.key_auth),
    ):
        if isinstance(value, SecretReference):
            yield where, value


def check_secrets(subject: Subject) -> Iterator[Finding]:
    """Every secret that is named: there, readable for the daemon, and closed to everybody else."""
    user = subject.daemon.user
    seen = [_look_at_secret(where, reference, user) for where, reference in secrets_of(subject.settings)]
    if not seen:
        yield ok("config.secrets", "no secret is named")
    for secret in seen:
        yield judge_secret(secret, user, subject.unit, me=subject.me)


def _look_at_secret(where: str, reference: SecretReference, user: User) -> SecretSeen:
    source, path = reference.source, path_of(reference)
    if path is None:
        return SecretSeen(where=where, source=source, facts=None)
    facts, complaint, padded = look_at(path, follow=True), "", False
    if facts.kind == "file" and os.access(path, os.R_OK):
        try:
            content = SecretReference(str(path)).read()
            padded = content != content.strip()
        except ConfigurationError as error:
            complaint = error.message
    return SecretSeen(
        where=where,
        source=source,
        facts=facts,
        closed=closed_on_the_way(path, user),
        complaint=complaint,
        padded=padded,
    )


def judge_secret(secret: SecretSeen, user: User, unit: Unit | None, *, me: User) -> Finding:
    """What is to be said of one secret; never anything that is in it."""
    name, where, facts = "config.secrets", secret.where, secret.facts
    if facts is None:
        return _judge_credential(secret, unit)
    if facts.kind == "missing":
        # What stands there may be the secret itself, set in the wrong place: so it is shown only where it is a path.
        shown = secret.source if "/" in secret.source else "(not shown: it may be the secret itself)"
        return failure(name, f"{where} names no file that is there: {shown}", "name the path of a file with it")
    path = facts.path
    if facts.kind == "unseen":
        return not_checked(name, f"user {me.name} may not see what {where} names", "run it as root")
    if facts.kind != "file":
        return failure(name, f"{where}: {path} is no file", "name a file with the secret in it")
    if facts.mode & 0o007:
        return failure(
            name,
            f"{where}: {path} is open to every user of this machine (mode {octal(facts.mode)}), and is refused",
            f"chmod o= {path}, and exchange the secret: others may have read it",
        )
    if secret.closed is not None or not permits(facts, user, READ):
        return failure(
            name,
            f"{where}: the daemon's user {user.name} may not read {path}",
            f"chown {user.name} {path} && chmod 0400 {path}, and see that it may enter the directories on the way",
        )
    if secret.complaint:
        return failure(name, f"{where}: {secret.complaint}", "write the secret into it, and nothing else")
    if facts.exposed is not None:
        return failure(
            name, f"{where}: every user may exchange {path}: {facts.exposed} is open", f"chmod o-w {facts.exposed}"
        )
    if secret.padded:
        return warning(
            name,
            f"{where}: what is in {path} begins or ends with white space, which then belongs to the secret",
            "was it an editor, or echo? One line feed at the end is left out; nothing else is",
        )
    return ok(name, f"{where}: {path} is closed to others (mode {octal(facts.mode)})")


def _judge_credential(secret: SecretSeen, unit: Unit | None) -> Finding:
    name, credential = "config.secrets", secret.source.partition(":")[2]
    if unit is None or not unit.installed:
        return not_checked(name, f"{secret.where} comes from systemd, and {UNIT} is not to be seen here")
    loaded = " ".join(
        unit[field]
        for field in (
            *("LoadCredential", "LoadCredentialEncrypted", "SetCredential", "SetCredentialEncrypted"),
            "ImportCredential",
        )
    )
    if credential in loaded.replace(":", " ").split() or unit["ImportCredential"]:
        return ok(name, f"{secret.where}: {UNIT} loads the credential {credential}")
    return failure(
        name,
        f"{secret.where} wants the credential {credential}, and {UNIT} loads none of that name",
        f"LoadCredential={credential}:PATH in the unit, then systemctl daemon-reload",
    )


def check_certificate_dir(subject: Subject) -> Iterator[Finding]:
    """The directory that Josev installs certificates to."""
    name, path = JOSEV_IDS[0], subject.settings.certificate_dir
    if path is None:
        yield warning(
            name,
            "[josev] certificate_dir is not set: a status is taken to a key by the order of messages alone",
            "set it to the directory that Josev installs certificates to, if it is on this machine",
        )
        return
    facts, user = look_at(path, follow=True), subject.daemon.user
    number = 0
    if facts.kind == "directory" and os.access(path, os.R_OK | os.X_OK):
        for number, _ in enumerate(path.rglob("*")):
            if number > _MAX_LISTED:
                break
    yield judge_certificate_dir(facts, user, closed_on_the_way(path, user), number)


def judge_certificate_dir(facts: Facts, user: User, closed: Path | None, number: int) -> Finding:
    """Whether the daemon can read it, and how many files there are."""
    name, path = JOSEV_IDS[0], facts.path
    if facts.kind == "unseen":
        return not_checked(name, f"{path} is not to be seen from here", "run it as root, or as the daemon's user")
    if facts.kind != "directory":
        what = "is not there" if facts.kind == "missing" else "is no directory"
        return failure(name, f"[josev] certificate_dir: {path} {what}", "name the directory that Josev installs to")
    if closed is not None or not permits(facts, user, READ | ENTER):
        return failure(
            name,
            f"[josev] certificate_dir: the daemon's user {user.name} may not read {closed or path}",
            f"give it the right, for example: setfacl -m u:{user.name}:rx {closed or path}",
        )
    if number > _MAX_LISTED:
        return failure(
            name,
            f"{path} has more than {_MAX_LISTED} files, and the daemon does not look through so many",
            "name the directory of the certificates alone",
        )
    if facts.mode & WRITE:
        return warning(
            name,
            f"every user may put certificates into {path} (mode {octal(facts.mode)}); each is still held against its key",
            f"chmod o-w {path}",
        )
    return ok(name, f"{path} can be read")
