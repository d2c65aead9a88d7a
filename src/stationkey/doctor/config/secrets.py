"""What the settings name by its path: secrets, and the directory that certificates are installed to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import Settings
from stationkey.doctor.host.context import UNIT, Subject, Unit, path_of
from stationkey.doctor.host.files import ENTER, READ, WRITE, Facts, User, closed_on_the_way, look_at, octal, permits
from stationkey.doctor.report import Finding, failure, not_checked, ok, warning
from stationkey.errors import ConfigurationError

SECRET_IDS: Final = ("config.secrets",)
JOSEV_IDS: Final = ("config.certificate_dir",)
_MAX_LISTED: Final = 1024
"""Files in a certificate directory, beyond which the daemon does not look."""


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
            f"chown {user.account} {path} && chmod 0400 {path}, and see that it may enter the directories on the way",
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
            f"give it the right, for example: setfacl -m u:{user.account}:rx {closed or path}",
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
            f"every user may put certificates into {path} (mode {octal(facts.mode)}); each is still held against its "
            "key",
            f"chmod o-w {path}",
        )
    return ok(name, f"{path} can be read")
