"""Files that the configuration names: who may use them, and those of the connection to the broker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from msgspec.structs import replace

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import MqttTerms
from stationkey.doctor.host.context import Context, path_of
from stationkey.doctor.host.files import READ, Facts, Kind, User, look_at, octal
from stationkey.doctor.report import Finding, failure, hidden, ok, refusal, unknown, warning
from stationkey.doctor.runner import Check
from stationkey.errors import ConfigurationError, StationKeyError
from stationkey.mqtt.introduction import introduction
from stationkey.system.files import read_regular

MONTH: Final = timedelta(days=30)
"""Renew one month before expiry [A03.FR.02]."""
FILES: Final = ("ca_file", "certificate_file", "key_file")
_MAX_FILE: Final = 1024 * 1024
_TPM_KEY: Final = b"-----BEGIN TSS2 PRIVATE KEY-----"
_DER: Final = b"\x30"
"""A SEQUENCE of ASN.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFile:
    """A file that [mqtt] names.

    Attributes:
        role: the option that names it.
        der: whether it is DER, and not PEM.
        in_tpm: whether it has a key that only the TPM can use.
    """

    role: str
    facts: Facts
    readable: bool = False
    der: bool = False
    in_tpm: bool = False
    certificates: tuple[x509.Certificate, ...] = ()


def _look_at_tls(context: Context) -> tuple[list[TlsFile], ConfigurationError | None, User, datetime] | Finding:
    """Look at each file, and ask the daemon's own rules whether they can be used together. The TPM is not asked."""
    mqtt, user = context.settings.mqtt, context.daemon.user
    certificate = None if mqtt.certificate_file is None else path_of(mqtt.certificate_file)
    key = certificate if mqtt.key_file is None else path_of(mqtt.key_file)
    if mqtt.certificate_file is not None and (certificate is None or key is None):
        return unknown("the client's certificate or key comes from systemd, and is not at hand")
    paths = (mqtt.ca_file, certificate, key)
    files = [_open(role, path, user) for role, path in zip(FILES, paths, strict=True) if path is not None]
    if not files:
        return ok("no certificate is named for the connection to the broker")
    if not all(file.readable for file in files):
        return files, None, user, datetime.now(UTC)
    terms = MqttTerms(ca_file=mqtt.ca_file, server_name=mqtt.server_name)
    if certificate is not None and not any(file.in_tpm for file in files):
        own = SecretReference(str(certificate)), SecretReference(str(key))
        terms = replace(terms, certificate_file=own[0], key_file=own[1])
    try:
        introduction(terms, tls=True)
    except ConfigurationError as error:
        return files, error, user, datetime.now(UTC)
    except StationKeyError:
        pass  # the TPM, which is not asked here
    return files, None, user, datetime.now(UTC)


def _open(role: str, path: Path, user: User) -> TlsFile:
    """Look at a file, and read it as far as this user may. Keep no private key."""
    facts = look_at(path, follow=True, user=user)
    if facts.kind != "file" or not os.access(path, os.R_OK):
        return TlsFile(role=role, facts=facts)
    content, certificates = b"", tuple[x509.Certificate, ...]()
    try:
        content = read_regular(path, limit=_MAX_FILE, follow=True)
        certificates = tuple(x509.load_pem_x509_certificates(content))
    except (OSError, ValueError, UnsupportedAlgorithm):
        pass  # the daemon's rules say why
    return TlsFile(
        role=role,
        facts=facts,
        readable=True,
        der=content.startswith(_DER),
        in_tpm=_TPM_KEY in content,
        certificates=certificates,
    )


def judge_access(where: str, facts: Facts, user: User, *, kind: Kind = "file", wanted: int = READ) -> Finding | None:
    """Return what keeps the daemon's `user` from what is `wanted` of the path that `where` names, or lets others in."""
    path = facts.path
    if facts.kind == "unseen":
        return hidden(path)
    if facts.kind != kind:
        what = "is missing" if facts.kind == "missing" else f"is not a {kind}"
        return failure("missing", f"{where}: {path} {what}", "put it there, or correct the path")
    if (barred := facts.barred(user, wanted)) is not None:
        advice = f"chgrp {user.gid} {path} && chmod g+r {path}"
        if barred != path or kind == "directory":
            advice = f"give it the right: setfacl -m u:{user.name}:rx {barred}; or move it, and correct the path"
        return failure("unreadable", f"{where}: the daemon's user {user.name} may not read {barred}", advice)
    if facts.replaceable is not None:
        told = f"{where}: every user may replace {path}"
        return failure("replaceable", told, f"chmod o-w {facts.replaceable}, and see that the right one is there")
    return None


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _judge_tls(
    files: list[TlsFile], refused: ConfigurationError | None, user: User, now: datetime
) -> Iterator[Finding]:
    """Judge the files, one by one and together. `refused`: why the daemon would not take them, or None."""
    found = [finding for file in files if (finding := _judge_file(file, user)) is not None]
    if refused is not None and not found:
        der = [file.facts.path for file in files if file.der]
        advice = "put valid PEM files there that belong together"
        if der:
            pem = der[0].with_suffix(".pem")
            advice = f"PEM is needed: openssl x509 -inform DER -in {der[0]} -out {pem}, or openssl pkcs12"
        found.append(refusal(refused, advice))
    yield from found or [ok("the files of the connection to the broker can be used together")]
    for file in files:
        yield from _judge_content(file, now)


def _judge_file(file: TlsFile, user: User) -> Finding | None:
    path, found = file.facts.path, judge_access(f"[mqtt] {file.role}", file.facts, user)
    if found is None and file.role == "key_file" and file.facts.mode & 0o007:
        told = f"every user may read the client's private key {path} (mode {octal(file.facts.mode)})"
        return failure("key_open", told, f"chmod o= {path}; then a new key and certificate: it may have been read")
    return found if found is not None or file.readable else hidden(path)


def _judge_content(file: TlsFile, now: datetime) -> Iterator[Finding]:
    if file.role == "key_file":
        return
    certificates, path = file.certificates, file.facts.path
    for one in certificates:
        what = f"[mqtt] {file.role}: {one.subject.rfc4514_string()}"
        yield from judge_dates(what, one.not_valid_before_utc, one.not_valid_after_utc, now)
    valid = [one for one in certificates if one.not_valid_before_utc <= now < one.not_valid_after_utc]
    if file.role == "ca_file" and valid and not any(map(_is_ca, valid)):
        told = f"[mqtt] ca_file: no certificate in {path} is a CA's"
        yield warning("no_ca", told, "name the CA's certificate, not the broker's")
    if file.role == "certificate_file" and certificates and _is_ca(certificates[0]):
        told = f"the first certificate in {path} is a CA's"
        yield warning("order", told, "put the client's own first, then those that it leads to")


def judge_dates(what: str, begins: datetime, ends: datetime, now: datetime) -> Iterator[Finding]:
    """Judge whether a certificate is valid now, and for how long; nothing if all is well."""
    renew = "have a new one made; is the clock right?"
    if now < begins:
        yield failure("not_yet_valid", f"{what} is valid only from {begins:%Y-%m-%d %H:%M}", renew)
    elif now >= ends:
        yield failure("expired", f"{what} expired on {ends:%Y-%m-%d %H:%M}", renew)
    elif ends - now < MONTH:
        told = f"{what} expires in {(ends - now).days} days, on {ends:%Y-%m-%d}"
        yield warning("expires", told, "have a new one made in time")


CHECK: Final = Check("config.tls", _look_at_tls, _judge_tls)
