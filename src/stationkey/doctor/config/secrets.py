"""What the settings name by its path: secrets, and the directory that certificates are installed to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from stationkey.config.secrets import SecretReference
from stationkey.doctor.config.consistency import named_secrets
from stationkey.doctor.host.context import UNIT, Context, Unit, path_of
from stationkey.doctor.host.files import ENTER, READ, WRITE, Facts, User, look_at, octal
from stationkey.doctor.report import RUN_AS, Verdict, failure, not_checked, ok, warning
from stationkey.errors import ConfigurationError

_MAX_LISTED: Final = 1024
"""Files in a certificate directory, beyond which the daemon does not look."""
_LOADING: Final = ("LoadCredential", "LoadCredentialEncrypted", "SetCredential", "SetCredentialEncrypted")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretSeen:
    """A secret that the settings name, and what was seen of it.

    Attributes:
        where: the setting, ``[mqtt] password_file`` for example.
        source: as it stands there.
        facts: of the file; None if it is a credential that is not at hand.
        refused: why the daemon would not take it; None if it would, or if this user cannot read it.
        padded: whether it begins or ends with white space.
    """

    where: str
    source: str
    facts: Facts | None
    refused: ConfigurationError | None = None
    padded: bool = False


def look_at_secrets(context: Context) -> tuple[list[SecretSeen], User, Unit | None] | Verdict:
    """Look at every secret that is named."""
    user = context.daemon.user
    seen = [_look_at(where, reference, user) for where, reference in named_secrets(context.settings)]
    return (seen, user, context.unit) if seen else ok("no secret is named")


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


def judge_secrets(secrets: list[SecretSeen], user: User, unit: Unit | None) -> Iterator[Verdict]:
    """Judge each secret: there, accepted by the daemon, and closed to others. Never show what is in it."""
    for secret in secrets:
        yield _judge_credential(secret, unit) if secret.facts is None else _judge_secret(secret, secret.facts, user)


def _judge_secret(secret: SecretSeen, facts: Facts, user: User) -> Verdict:
    where, path = secret.where, facts.path
    if facts.kind == "missing":
        # What stands there may be the secret itself, set in the wrong place: so it is shown only where it is a path.
        shown = secret.source if "/" in secret.source else "(not shown: it may be the secret itself)"
        return failure(f"{where}: there is no file {shown}", "name the path of a file with it")
    if facts.kind == "unseen":
        return not_checked(f"what {where} names is not visible from here", RUN_AS)
    if secret.refused is not None:
        exposed = ", and replace the secret: others may have read it" if facts.mode & 0o007 else ""
        advice = secret.refused.hint or "write the secret into a file, and nothing else"
        return failure(f"{where}: {secret.refused.message}", advice + exposed)
    if facts.barred(user, READ) is not None:
        return failure(
            f"{where}: the daemon's user {user.name} may not read {path}",
            f"chown {user.account} {path} && chmod 0400 {path}, and see that it may enter the directories on the way",
        )
    if facts.exposed is not None:
        return failure(f"{where}: every user may replace {path}: {facts.exposed} is open", f"chmod o-w {facts.exposed}")
    if secret.padded:
        return warning(
            f"{where}: what is in {path} begins or ends with white space, which belongs to the secret",
            "an editor, or echo? One line feed at the end is removed; nothing else is",
        )
    return ok(f"{where}: {path} is closed to others (mode {octal(facts.mode)})")


def _judge_credential(secret: SecretSeen, unit: Unit | None) -> Verdict:
    credential = secret.source.partition(":")[2]
    if unit is None or not unit.installed:
        return not_checked(f"{secret.where} comes from systemd, and {UNIT} is not visible here")
    loaded = " ".join(unit[field] for field in _LOADING)
    if credential in loaded.replace(":", " ").split() or unit["ImportCredential"]:
        return ok(f"{secret.where}: {UNIT} loads the credential {credential}")
    return failure(
        f"{secret.where} needs the credential {credential}, and {UNIT} does not load it",
        f"LoadCredential={credential}:PATH in the unit, then systemctl daemon-reload",
    )


def look_at_certificate_dir(context: Context) -> tuple[Facts, User, int] | Verdict:
    """Look at the directory that Josev installs certificates to, and count what is in it."""
    path, user, number = context.settings.certificate_dir, context.daemon.user, 0
    if path is None:
        return warning(
            "[josev] certificate_dir is not set: a status is matched to a key by the order of messages alone",
            "set it to the directory that Josev installs certificates to, if it is on this machine",
        )
    facts = look_at(path, follow=True, user=user)
    if facts.kind == "directory" and os.access(path, os.R_OK | os.X_OK):
        for number, _ in enumerate(path.rglob("*")):
            if number > _MAX_LISTED:
                break
    return facts, user, number


def judge_certificate_dir(facts: Facts, user: User, number: int) -> Verdict:
    """Judge whether the daemon can read it, and how many files there are."""
    path = facts.path
    if facts.kind == "unseen":
        return not_checked(f"{path} is not visible from here", RUN_AS)
    if facts.kind != "directory":
        return failure(f"[josev] certificate_dir: {path} is not a directory", "name the one that Josev installs to")
    if (barred := facts.barred(user, READ | ENTER)) is not None:
        return failure(
            f"[josev] certificate_dir: the daemon's user {user.name} may not read {barred}",
            f"give it the right, for example: setfacl -m u:{user.account}:rx {barred}",
        )
    if number > _MAX_LISTED:
        return failure(
            f"{path} has more than {_MAX_LISTED} files, and the daemon does not look through so many",
            "name the directory of the certificates alone",
        )
    if facts.mode & WRITE:
        return warning(f"every user may put certificates into {path} (mode {octal(facts.mode)})", f"chmod o-w {path}")
    return ok(f"{path} can be read")
