"""The certificates and the key that the connection to the broker uses, and those of the active keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from stationkey.doctor.host.context import Subject, path_of
from stationkey.doctor.host.files import READ, Facts, User, closed_on_the_way, look_at, octal, permits
from stationkey.doctor.report import Finding, failure, not_checked, ok, warning

IDS: Final = ("config.tls",)
MONTH: Final = timedelta(days=30)
"""Renew one month before expiry [A03.FR.02]."""
_MAX_FILE: Final = 1024 * 1024
_TPM_KEY: Final = b"-----BEGIN TSS2 PRIVATE KEY-----"


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What matters of a certificate here.

    Attributes:
        public: subjectPublicKeyInfo in DER.
    """

    subject: str
    begins: datetime
    ends: datetime
    is_ca: bool
    public: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A PEM file.

    Attributes:
        complaint: why nothing can be made of it; empty where something can.
        public: of the private key in it, subjectPublicKeyInfo in DER; empty where there is none, or the TPM has it.
        in_tpm: whether it has a key whose private part only the TPM can use.
    """

    facts: Facts
    closed: Path | None = None
    complaint: str = ""
    certificates: tuple[Certificate, ...] = ()
    public: bytes = b""
    in_tpm: bool = False


def check_tls_files(subject: Subject) -> Iterator[Finding]:
    """CA file, client certificate and its key, as far as the settings name them."""
    mqtt, user = subject.settings.mqtt, subject.daemon.user
    now = datetime.now(UTC)
    found: list[Finding] = []
    if mqtt.ca_file is not None:
        found += judge_ca(open_pem(mqtt.ca_file, user), user, now)
    if mqtt.certificate_file is not None:
        path = path_of(mqtt.certificate_file)
        key_path = path if mqtt.key_file is None else path_of(mqtt.key_file)
        if path is None or key_path is None:
            found.append(not_checked(IDS[0], "the client's certificate or key comes from systemd, and is not at hand"))
        else:
            certificate = open_pem(path, user)
            key = certificate if key_path == path else open_pem(key_path, user)
            found += judge_client(certificate, user, now)
            found += judge_key(key, certificate, user)
    yield from found or [ok(IDS[0], "no certificate is named for the connection to the broker")]


def open_pem(path: Path, user: User) -> Opened:
    """Read a PEM file as far as this user may. Never raises, and keeps no private key."""
    facts, closed = look_at(path, follow=True), closed_on_the_way(path, user)
    if facts.kind != "file" or not os.access(path, os.R_OK):
        return Opened(facts=facts, closed=closed)
    if facts.size > _MAX_FILE:
        return Opened(facts=facts, closed=closed, complaint="it is larger than 1 MiB")
    try:
        content = path.read_bytes()
    except OSError as error:
        return Opened(facts=facts, closed=closed, complaint=f"it cannot be read: {error.strerror}")
    certificates: tuple[Certificate, ...] = ()
    complaint = "" if b"-----BEGIN " in content else _other_form(path, content)
    if b"-----BEGIN CERTIFICATE-----" in content:
        try:
            certificates = tuple(map(_certificate, x509.load_pem_x509_certificates(content)))
        except (ValueError, UnsupportedAlgorithm):
            complaint = "there is a certificate in it that cannot be read"
    public, in_tpm = b"", _TPM_KEY in content
    if b"PRIVATE KEY-----" in content and not in_tpm:
        try:
            public = _spki(serialization.load_pem_private_key(content, password=None).public_key())
        except TypeError:
            complaint = "its private key is encrypted with a passphrase, which nobody is there to type"
        except (ValueError, UnsupportedAlgorithm):
            complaint = "its private key cannot be read"
    return Opened(
        facts=facts, closed=closed, complaint=complaint, certificates=certificates, public=public, in_tpm=in_tpm
    )


def _other_form(path: Path, content: bytes) -> str:
    """What a file without PEM in it is, where that can be told: the same things come in other forms, too."""
    if not content.startswith(b"\x30"):  # a SEQUENCE of ASN.1
        return ""
    try:
        x509.load_der_x509_certificate(content)
    except (ValueError, UnsupportedAlgorithm):
        return "it is DER or PKCS #12, and PEM is needed (openssl pkcs12, or openssl pkey -inform DER, makes it)"
    return f"it is DER, and PEM is needed: openssl x509 -inform DER -in {path} -out {path.with_suffix('.pem')}"


def _spki(public_key: object) -> bytes:
    encoded: bytes = public_key.public_bytes(  # type: ignore[attr-defined] # every public key of cryptography has it
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded


def _certificate(read: x509.Certificate) -> Certificate:
    try:
        is_ca = read.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        is_ca = False
    return Certificate(
        subject=read.subject.rfc4514_string(),
        begins=read.not_valid_before_utc,
        ends=read.not_valid_after_utc,
        is_ca=is_ca,
        public=_spki(read.public_key()),
    )


def _unusable(opened: Opened, what: str, user: User) -> Finding | None:
    """What keeps the daemon from reading a file at all."""
    name, facts = IDS[0], opened.facts
    path = facts.path
    if facts.kind == "missing":
        return failure(name, f"{what}: {path} is not there", "put it there, or correct the name under [mqtt]")
    if facts.kind == "unseen":
        return not_checked(name, f"{what} {path} is not to be seen from here", "run it as root")
    if facts.kind != "file":
        return failure(name, f"{what}: {path} is no file", "name a PEM file under [mqtt]")
    if opened.closed is not None or not permits(facts, user, READ):
        return failure(
            name,
            f"{what}: the daemon's user {user.name} may not read {opened.closed or path}",
            f"chgrp {user.gid} {path} && chmod g+r {path}, and see that it may enter the directories on the way",
        )
    if facts.mode & 0o002 or facts.exposed:
        return failure(
            name,
            f"{what}: every user of this machine may exchange {path}",
            f"chmod o-w {facts.exposed or path}, and put the right file there again",
        )
    if opened.complaint:
        return failure(name, f"{what} {path}: {opened.complaint}", "put a right PEM file there")
    return None


def judge_ca(opened: Opened, user: User, now: datetime) -> Iterator[Finding]:
    """The certificates that the broker's must lead to."""
    name, path = IDS[0], opened.facts.path
    if (bad := _unusable(opened, "[mqtt] ca_file", user)) is not None:
        yield bad
        return
    if not opened.certificates and os.access(path, os.R_OK):
        yield failure(
            name, f"[mqtt] ca_file: {path} has no certificate in it", "put the CA's certificate there, in PEM"
        )
    good = [one for one in opened.certificates if one.begins <= now < one.ends]
    for one in opened.certificates:
        yield from judge_dates(name, f"the CA {one.subject}", one, now)
    if good and not any(one.is_ca for one in good):
        yield warning(
            name,
            f"[mqtt] ca_file: no certificate in {path} is a CA's",
            "name the CA's certificate, not the broker's: that one ends soon, and nobody looks at it until then",
        )


def judge_client(opened: Opened, user: User, now: datetime) -> Iterator[Finding]:
    """This client's certificate and its chain."""
    name, path = IDS[0], opened.facts.path
    if (bad := _unusable(opened, "[mqtt] certificate_file", user)) is not None:
        yield bad
        return
    if not opened.certificates and os.access(path, os.R_OK):
        yield failure(name, f"[mqtt] certificate_file: {path} has no certificate in it", "put it there, in PEM")
    for one in opened.certificates:
        yield from judge_dates(name, f"the client's certificate {one.subject}", one, now)
    if opened.certificates and opened.certificates[0].is_ca:
        yield warning(
            name,
            f"the first certificate in {path} is a CA's",
            "the client's own comes first, then those that it leads to",
        )


def judge_key(opened: Opened, certificate: Opened, user: User) -> Iterator[Finding]:
    """The client's private key, and whether the certificate is for it."""
    name, facts = IDS[0], opened.facts
    if (bad := _unusable(opened, "[mqtt] key_file", user)) is not None:
        if opened is not certificate:
            yield bad
        return
    if facts.mode & 0o007:
        yield failure(
            name,
            f"every user of this machine may read the client's private key {facts.path} (mode {octal(facts.mode)})",
            f"chmod o= {facts.path}, and have a new certificate made for a new key: others may have read this one",
        )
    if opened.in_tpm:
        yield ok(name, f"the client's key in {facts.path} is used in the TPM")
    elif not os.access(facts.path, os.R_OK):
        yield not_checked(name, f"{facts.path} may not be read by this user", "run it as root")
    elif not opened.public:
        yield failure(name, f"there is no private key in {facts.path}", "name it as [mqtt] key_file")
    elif certificate.certificates and certificate.certificates[0].public != opened.public:
        yield failure(
            name,
            f"the certificate in {certificate.facts.path} is for another key than the one in {facts.path}",
            "put the two that belong together there",
        )
    elif certificate.certificates:
        yield ok(
            name,
            f"the client's certificate and its key belong together (until {certificate.certificates[0].ends:%Y-%m-%d})",
        )


def judge_dates(name: str, what: str, certificate: Certificate, now: datetime) -> Iterator[Finding]:
    """Whether a certificate holds now, and for how long; nothing where all is well."""
    if now < certificate.begins:
        yield failure(
            name,
            f"{what} holds only from {certificate.begins:%Y-%m-%d %H:%M}, and it is {now:%Y-%m-%d %H:%M}",
            "is the clock right? Else have a new one made",
        )
    elif now >= certificate.ends:
        yield failure(
            name, f"{what} ended on {certificate.ends:%Y-%m-%d %H:%M}", "have a new one made; is the clock right?"
        )
    elif certificate.ends - now < MONTH:
        yield warning(
            name,
            f"{what} ends in {(certificate.ends - now).days} days, on {certificate.ends:%Y-%m-%d}",
            "have a new one made in time",
        )
