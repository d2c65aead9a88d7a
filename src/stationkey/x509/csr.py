"""Build a PKCS#10 certificate signing request [RFC 2986] by its profile, and inspect one. Pure; knows no TPM.

The builder, the parser and the signature check are those of `cryptography`; nothing here writes DER.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm as CryptographyUnsupported
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Struct

from stationkey.contract.messages import GenerateCsrRequest
from stationkey.contract.profiles import (
    ALGORITHMS,
    PROFILES,
    CertificateProfile,
    EllipticCurve,
    EvseIdPlacement,
    ExtendedKeyUsage,
    KeyType,
    KeyUsage,
    RsaModulus,
)
from stationkey.errors import KeyStoreError, Scope, StationKeyError

K = TypeVar("K")
V = TypeVar("V")
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
"""Any private-key object of cryptography's interface; the key itself may be in a TPM."""
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
Csr = x509.CertificateSigningRequest

# RFC 5280 bounds CN and O in characters; cryptography counts their bytes in UTF-8, and warns even where validation is
# off. A name of 64 Greek letters is right by the standard and has 128 bytes.
warnings.filterwarnings("ignore", message=r"Attribute's length must be >= 1 and <= 64", category=UserWarning)

HASHES: Final[dict[str, hashes.SHA256 | hashes.SHA384 | hashes.SHA512]] = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}
"""cryptography's hash by hashlib's name."""

USAGE_FIELDS: Final = {
    KeyUsage.DIGITAL_SIGNATURE: "digital_signature",
    KeyUsage.CONTENT_COMMITMENT: "content_commitment",
    KeyUsage.KEY_ENCIPHERMENT: "key_encipherment",
    KeyUsage.DATA_ENCIPHERMENT: "data_encipherment",
    KeyUsage.KEY_AGREEMENT: "key_agreement",
}
"""Names that cryptography gives the bits of keyUsage."""
PURPOSES: Final = {
    ExtendedKeyUsage.SERVER_AUTH: ExtendedKeyUsageOID.SERVER_AUTH,
    ExtendedKeyUsage.CLIENT_AUTH: ExtendedKeyUsageOID.CLIENT_AUTH,
}
"""OIDs of the purposes of extendedKeyUsage."""


def build_csr(
    request: GenerateCsrRequest, private_key: PrivateKey, profile: CertificateProfile | None = None
) -> x509.CertificateSigningRequest:
    """Build and sign the CSR that answers `request`, and verify its signature: `sign_csr` and `check_signature`.

    Raises:
        StationKeyError: the key is of another kind than the algorithm asks for.
        KeyStoreError: the signature that the key made does not verify.
    """
    csr = sign_csr(request, private_key, profile)
    check_signature(csr)
    return csr


def sign_csr(
    request: GenerateCsrRequest, private_key: PrivateKey, profile: CertificateProfile | None = None
) -> x509.CertificateSigningRequest:
    """Build and sign the CSR that answers `request`. It must not be handed out before `check_signature`.

    Args:
        request: a decoded request; its names enter the subject byte for byte.
        private_key: signs the CSR. Its kind must be one that the request's algorithm allows.
        profile: the content of the CSR; by default the standards' profile of the request's certificate type.

    Returns:
        The CSR: version 0 [RFC 2986 4.1], ECDSA without parameters [RFC 5758 3.2].

    Raises:
        StationKeyError: the key is of another kind than the algorithm asks for, or the certificate type or algorithm
            is unknown, which `decode` does not let through.
    """
    profile = profile or _known(PROFILES, request.data.certificate_type, "certificate type")
    algorithm = _known(ALGORITHMS, request.algorithm, "algorithm")
    kind = key_type(private_key.public_key())
    if kind not in algorithm.key_types:
        raise StationKeyError(
            f"{algorithm.algorithm} needs a key of type {' or '.join(map(str, algorithm.key_types))}, not {kind}",
            reason="key_type_wrong",
            scope=Scope.KEY,
        )
    builder = _begun(profile, usages_for(profile, private_key.public_key())).subject_name(subject(request, profile))
    if request.evse_id is not None and profile.evse_id_placement is EvseIdPlacement.SAN_URI:
        uri = x509.UniformResourceIdentifier(f"urn:evse:{request.evse_id}")
        builder = builder.add_extension(x509.SubjectAlternativeName([uri]), critical=False)
    return builder.sign(private_key, HASHES[algorithm.hash_name])


def _known(table: Mapping[K, V], name: K, what: str) -> V:
    """Return the row of a name.

    Raises:
        StationKeyError: the table has no such row.
    """
    if name not in table:
        raise StationKeyError(
            f"unknown {what} {str(name)!r}; known are {', '.join(map(str, table))}",
            reason=f"{what.replace(' ', '_')}_invalid",
        )
    return table[name]


def check_signature(csr: x509.CertificateSigningRequest) -> None:
    """Verify that the CSR proves possession of its key [RFC 2986 4.2].

    Raises:
        KeyStoreError: it does not.
    """
    if not csr.is_signature_valid:
        raise KeyStoreError("the key made a signature that does not verify", reason="signature_invalid")


def check_recorded(pem: str) -> None:
    """Check the signature of a recorded CSR before it is sent again.

    Raises:
        KeyStoreError: the signature does not verify, or this is not a CSR: the record is damaged.
    """
    try:
        csr = x509.load_pem_x509_csr(pem.encode())
        valid = csr.is_signature_valid
    except _UNREADABLE:
        valid = False
    if not valid:
        raise KeyStoreError(
            "the CSR on record does not verify: the ledger is damaged, or the key made a wrong signature",
            reason="signature_invalid",
            hint="use a new id",
        )


def subject(request: GenerateCsrRequest, profile: CertificateProfile) -> x509.Name:
    """Return the subject: C, O, CN and, by the profile, serialNumber and DC, one RDN each, in this order.

    C and serialNumber are PrintableString, O and CN UTF8String, DC IA5String: the library's own choice by attribute.
    """
    data = request.data
    attributes = [
        (NameOID.COUNTRY_NAME, data.country_name),
        (NameOID.ORGANIZATION_NAME, data.organization_name),
        (NameOID.COMMON_NAME, data.common_name),
    ]
    if request.evse_id is not None and profile.evse_id_placement is EvseIdPlacement.SERIAL_NUMBER:
        # PrintableString has no asterisk, and X.520 makes serialNumber one: the EVSE ID goes in without separators,
        # which ISO 15118-2 Annex H makes optional.
        attributes.append((NameOID.SERIAL_NUMBER, request.evse_id.replace("*", "")))
    if profile.domain_component is not None:
        attributes.append((NameOID.DOMAIN_COMPONENT, profile.domain_component))
    return x509.Name([x509.NameAttribute(oid, value, _validate=False) for oid, value in attributes])


def usages_for(profile: CertificateProfile, public_key: object) -> tuple[KeyUsage, ...]:
    """Return the profile's keyUsage for a key: without keyAgreement for RSA [RFC 3279 2.3.1, RFC 4055 1.2]."""
    if isinstance(public_key, rsa.RSAPublicKey):
        return tuple(usage for usage in profile.key_usage if usage is not KeyUsage.KEY_AGREEMENT)
    return profile.key_usage


@cache
def _begun(profile: CertificateProfile, usages: tuple[KeyUsage, ...]) -> x509.CertificateSigningRequestBuilder:
    """Return the common part of the CSRs of a profile. Builders are immutable: each step returns another."""
    builder = x509.CertificateSigningRequestBuilder()
    for extension, critical in extensions_of(profile, usages):
        builder = builder.add_extension(extension, critical)
    return builder


def extensions_of(profile: CertificateProfile, usages: tuple[KeyUsage, ...]) -> list[tuple[x509.ExtensionType, bool]]:
    """The extensions of a profile with keyUsage by `usages_for`, each with its criticality: of CSR and certificate."""
    usage = key_usage(*(USAGE_FIELDS[bit] for bit in usages))
    extensions: list[tuple[x509.ExtensionType, bool]] = [(usage, True)]
    if profile.extended_key_usage:
        purposes = x509.ExtendedKeyUsage([PURPOSES[purpose] for purpose in profile.extended_key_usage])
        extensions.append((purposes, profile.extended_key_usage_critical))
    extensions.append((x509.BasicConstraints(ca=False, path_length=None), True))
    return extensions


def key_usage(*bits: str) -> x509.KeyUsage:
    """Return keyUsage with these bits, by the names that cryptography gives them."""
    others = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{bit: bit in bits for bit in (*USAGE_FIELDS.values(), *others)})


def to_pem(csr: x509.CertificateSigningRequest) -> str:
    """The CSR in PEM [RFC 7468 7], as ``data.csr`` carries it [A02.FR.03]."""
    return csr.public_bytes(serialization.Encoding.PEM).decode("ascii")


def key_type(public_key: object) -> KeyType:
    """Return the key type of a public key.

    Raises:
        StationKeyError: neither elliptic curve nor RSA.
    """
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        return EllipticCurve(public_key.curve.name)
    if isinstance(public_key, rsa.RSAPublicKey):
        return RsaModulus(public_key.key_size)
    raise StationKeyError(f"unsupported key type {type(public_key).__name__}", reason="key_type_wrong", scope=Scope.KEY)


class CsrSummary(Struct, frozen=True):
    """The content of a CSR, for people.

    Attributes:
        subject: RFC 4514, but in the order of the encoding.
        key: ``secp256r1``, ``RSA-3072``.
        signature: ``ecdsa-with-SHA256`` and so on.
        extensions: one line each, with ``critical`` if it is.
        signature_valid: whether the CSR proves possession of the key.
    """

    subject: str
    key: str
    signature: str
    extensions: tuple[str, ...]
    signature_valid: bool


_SIGNATURE_NAMES: Final = {
    "1.2.840.10045.4.3.2": "ecdsa-with-SHA256",
    "1.2.840.10045.4.3.3": "ecdsa-with-SHA384",
    "1.2.840.10045.4.3.4": "ecdsa-with-SHA512",
    "1.2.840.113549.1.1.11": "sha256WithRSAEncryption",
    "1.2.840.113549.1.1.12": "sha384WithRSAEncryption",
    "1.2.840.113549.1.1.13": "sha512WithRSAEncryption",
}
_UNREADABLE: Final = (
    ValueError,
    TypeError,  # a name whose attribute is a BIT STRING
    CryptographyUnsupported,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""The exceptions of cryptography for an invalid CSR; it parses most parts on access."""


def inspect_csr(pem: str | bytes) -> CsrSummary:
    """Read a CSR, ours or another's.

    Raises:
        StationKeyError: not a PKCS#10 request in PEM.
    """
    try:
        csr = x509.load_pem_x509_csr(pem.encode() if isinstance(pem, str) else pem)
        extensions = tuple(map(_extension_line, csr.extensions))
        kind = key_type(csr.public_key())
        valid = csr.is_signature_valid
        names = ", ".join(f"{attribute.rfc4514_attribute_name}={attribute.value!s}" for attribute in csr.subject)
    except _UNREADABLE:
        raise StationKeyError("not a PKCS#10 request in PEM, or unreadable", reason="csr_unreadable") from None
    oid = csr.signature_algorithm_oid.dotted_string
    return CsrSummary(names, str(kind), _SIGNATURE_NAMES.get(oid, oid), extensions, valid)


def _extension_line(extension: x509.Extension[x509.ExtensionType]) -> str:
    value = extension.value
    match value:
        case x509.KeyUsage():
            text = "keyUsage " + "+".join(bit for bit, field in USAGE_FIELDS.items() if getattr(value, field))
        case x509.ExtendedKeyUsage():
            names = {oid: purpose.value for purpose, oid in PURPOSES.items()}
            text = "extendedKeyUsage " + "+".join(names.get(oid, oid.dotted_string) for oid in value)
        case x509.BasicConstraints():
            text = f"basicConstraints CA:{str(value.ca).lower()}"
        case x509.SubjectAlternativeName():
            text = "subjectAltName " + "+".join(str(name.value) for name in value)
        case _:
            text = extension.oid.dotted_string
    return f"{text} (critical)" if extension.critical else text
