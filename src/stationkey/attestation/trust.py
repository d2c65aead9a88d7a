"""The verifier's trust: in an attestation key that was recorded or certified, or in a challenge that was answered.

Certificates are verified with their issuers' certificates, which the operator gave and trusts. `check_issued` lists the
checks; they are fewer than those of a TLS client (docs/attestation.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtensionOID

from stationkey.attestation.documents import EndorsementKey, Secret, read_attestation_key
from stationkey.attestation.structures import PublicKey, read_public, spki_of
from stationkey.errors import ConfigurationError, NotVerified

T = TypeVar("T", bound=x509.ExtensionType)

AK_CERTIFICATE: Final = x509.ObjectIdentifier("2.23.133.8.3")
"""tcg-kp-AIKCertificate: the extended key usage of an attestation key's certificate [TCG OID Registry]."""
EK_CERTIFICATE: Final = x509.ObjectIdentifier("2.23.133.8.1")
"""tcg-kp-EKCertificate [TCG EK Credential Profile 2.5, 3.5.16]."""

UNREADABLE: Final = (
    *(ValueError, TypeError, UnsupportedAlgorithm),
    *(x509.DuplicateExtension, x509.UnsupportedGeneralNameType, x509.InvalidVersion),
)
"""The exceptions of cryptography for an invalid or unreadable certificate or key."""

_KNOWN_EXTENSIONS: Final = {
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.KEY_USAGE,
    ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME,  # critical in EK certificates: model and maker of the TPM
    ExtensionOID.CERTIFICATE_POLICIES,
}


@dataclass(frozen=True, slots=True)
class RecordedKey:
    """An attestation key that is trusted by its public key.

    Attributes:
        spki: subjectPublicKeyInfo in DER.
        why: in words, for the verdict.
    """

    spki: bytes
    why: str


@dataclass(frozen=True, slots=True)
class RecordedName:
    """An attestation key that is trusted by its name, which covers its attributes.

    Attributes:
        name: the hash's identifier and the hash.
        why: in words, for the verdict.
    """

    name: bytes
    why: str


Anchor = RecordedKey | RecordedName | Secret
"""Why an attestation key is trusted."""


def read_ak(data: bytes, *, authorities: Sequence[x509.Certificate] = (), now: datetime) -> RecordedKey | RecordedName:
    """Read an attestation key that was recorded: PEM (public key or certificate), or the station's JSON document.

    Args:
        data: content of the file.
        authorities: issuers, one of which must have signed the certificate; empty if the file itself is trusted.
        now: time at which the certificate must be valid, if authorities are given.

    Raises:
        ConfigurationError: it is not one of these.
        NotVerified: no issuer has signed the certificate for an attestation key.
    """
    if data.lstrip()[:1] == b"{":
        if authorities:
            raise _unreadable("an attestation key's JSON document has no certificate that a CA could have signed")
        public = read_public(read_attestation_key(data).public, "the recorded attestation key")
        return RecordedName(public.name, "recorded before, by its name")
    key, certificate = read_key(data)
    if not authorities:
        return RecordedKey(spki_of(key), "recorded before, by its public key")
    if certificate is None:
        raise _unreadable("the attestation key was given without a certificate, which a CA could have signed")
    issuer = check_issued(certificate, authorities, AK_CERTIFICATE, now)
    return RecordedKey(spki_of(key), f"certified by {issuer} as an attestation key")


def read_key(data: bytes) -> tuple[PublicKey, x509.Certificate | None]:
    """Read a PEM public key, or a PEM certificate with the key in it.

    Raises:
        ConfigurationError: it is neither, or of an unsupported type.
    """
    certificate = None
    try:
        if b"-----BEGIN CERTIFICATE-----" in data:
            certificate = x509.load_pem_x509_certificate(data)
            key: object = certificate.public_key()
        else:
            key = serialization.load_pem_public_key(data)
    except UNREADABLE:
        raise _unreadable("no public key or certificate (PEM) in it") from None
    if not isinstance(key, PublicKey):
        raise _unreadable("a file has a key that is neither ECC nor RSA")
    return key, certificate


def read_authorities(data: bytes) -> list[x509.Certificate]:
    """Read the certificates of issuers in PEM.

    Raises:
        ConfigurationError: the file has none.
    """
    try:
        return x509.load_pem_x509_certificates(data)
    except UNREADABLE:
        raise _unreadable("no certificate (PEM) in it") from None


def choose_ek(
    told: Iterable[EndorsementKey], authorities: Sequence[x509.Certificate], now: datetime
) -> tuple[PublicKey, str]:
    """Return the station's first endorsement key whose certificate is from one of the issuers, and that issuer.

    Raises:
        NotVerified: there is none; the message is that of the last key.
    """
    failure = NotVerified(
        "the evidence has no endorsement key with a certificate",
        reason="certificate_untrusted",
        hint="its TPM may have none; then give the key itself: --ek FILE",
    )
    for ek in told:
        if ek.certificate is None:
            continue
        try:
            certificate = x509.load_der_x509_certificate(ek.certificate)
            key = certificate.public_key()
            issuer = check_issued(certificate, authorities, EK_CERTIFICATE, now)
        except UNREADABLE:
            failure = _untrusted("the certificate of an endorsement key cannot be read")
            continue
        except NotVerified as error:
            failure = error
            continue
        if isinstance(key, PublicKey):
            return key, f"certified by {issuer} as an endorsement key"
    raise failure


def certified_key(certificate: bytes) -> PublicKey | None:
    """Return the key of a DER certificate; None if it is invalid, or the key of an unknown type."""
    try:
        key: object = x509.load_der_x509_certificate(certificate).public_key()
    except UNREADABLE:
        return None
    return key if isinstance(key, PublicKey) else None


def check_issued(
    certificate: x509.Certificate,
    authorities: Iterable[x509.Certificate],
    usage: x509.ObjectIdentifier,
    now: datetime,
) -> str:
    """Check that an issuer has signed a certificate for this use, and return the issuer's name.

    The certificate must be valid now, not a CA, have the extended key usage, and no unknown critical extension. The
    issuer must be named in it, verify its signature, be valid now, and be a CA with keyCertSign. Revocation is not
    checked.

    Raises:
        NotVerified: no issuer has signed it, or it is for another use.
    """
    try:
        _check_leaf(certificate, usage, now)
        for authority in authorities:
            if authority.subject == certificate.issuer and _has_signed(authority, certificate):
                _check_authority(authority, now)
                return shown(authority.subject.rfc4514_string())
        issuer = shown(certificate.issuer.rfc4514_string())
    except UNREADABLE:
        raise _untrusted("a certificate cannot be read") from None
    raise _untrusted(
        f"the certificate was signed by {issuer}, which is not one of the given CAs",
        hint="the file of CAs must contain the one that signed it, usually an intermediate",
    )


def _check_leaf(certificate: x509.Certificate, usage: x509.ObjectIdentifier, now: datetime) -> None:
    _check_valid(certificate, now)
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise _untrusted("the certificate is that of a CA")
    usages = _extension(certificate, x509.ExtendedKeyUsage)
    if usages is None or usage not in usages:
        raise _untrusted(
            f"the certificate is not for this use: extendedKeyUsage has no {usage.dotted_string}",
            hint="have the CA issue it with that extended key usage",
        )


def _check_authority(authority: x509.Certificate, now: datetime) -> None:
    _check_valid(authority, now)
    constraints = _extension(authority, x509.BasicConstraints)
    usage = _extension(authority, x509.KeyUsage)
    if constraints is None or not constraints.ca or (usage is not None and not usage.key_cert_sign):
        raise _untrusted("the issuer's certificate is not that of a CA")


def _check_valid(certificate: x509.Certificate, now: datetime) -> None:
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise _untrusted(
            f"the certificate of {shown(certificate.subject.rfc4514_string())} is not valid at {now:%Y-%m-%d}"
        )
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in _KNOWN_EXTENSIONS:
            raise _untrusted(f"the certificate has the unknown critical extension {extension.oid.dotted_string}")


def _has_signed(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except InvalidSignature:
        return False
    return True


def _extension(certificate: x509.Certificate, kind: type[T]) -> T | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def shown(text: str) -> str:
    """Return untrusted text in one line, safe for a terminal."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text[:200])


def _untrusted(message: str, *, hint: str = "") -> NotVerified:
    return NotVerified(message, reason="certificate_untrusted", hint=hint)


def _unreadable(message: str) -> ConfigurationError:
    return ConfigurationError(message, reason="anchor_unreadable")
