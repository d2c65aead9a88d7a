"""Check a CSR as a strict CSMS does before it signs, and compare it with its profile."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm as CryptographyUnsupported
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from stationkey.contract.profiles import (
    ALGORITHMS,
    COUNTRY_NAME_PATTERN,
    NAME_MAX_LENGTH,
    PROFILES,
    CertificateType,
    is_secc_id,
)
from stationkey.errors import Fault, StationKeyError
from stationkey.system.pem import blocks
from stationkey.system.pem import from_pem as pem_to_der
from stationkey.x509.certificate import usage_differences
from stationkey.x509.csr import key_type

_LEAST_RSA: Final = 2048
_LEAST_CURVE: Final = 224
_LEAST_HASH: Final = 224
"""Bits; 112 bit of security each [A00.FR.501-503; NIST SP 800-57 part 1, table 2 and 3]."""
_LABELS: Final = ("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST")
_ECDSA_OIDS: Final = bytes.fromhex("2a8648ce3d04")
"""ecdsa-with-SHA1, -SHA256, ... begin so: 1.2.840.10045.4."""
_EC_PUBLIC_KEY: Final = bytes.fromhex("2a8648ce3d0201")
"""id-ecPublicKey, 1.2.840.10045.2.1 [RFC 5480 2.1.1]."""
_SEQUENCE: Final = 0x30
_NAMES: Final = (
    ("C", "csr_country_name", NameOID.COUNTRY_NAME),
    ("O", "csr_organization_name", NameOID.ORGANIZATION_NAME),
    ("CN", "csr_common_name", NameOID.COMMON_NAME),
)
_COUNTRY_NAME: Final = re.compile(COUNTRY_NAME_PATTERN)


class CsrRefused(StationKeyError):
    """A strict CSMS does not sign this CSR; the message says why."""

    fault = Fault.REQUEST


def check_csr(pem: str, *, certificate_type: CertificateType, organization: str) -> x509.CertificateSigningRequest:
    """Read a CSR, and refuse one that must not be signed.

    Raises:
        CsrRefused: the first fault of `faults`.
    """
    csr = read_csr(pem)
    for fault in faults(csr, certificate_type=certificate_type, organization=organization):
        raise fault
    return csr


def read_csr(pem: str) -> x509.CertificateSigningRequest:
    """Read a CSR whose parts can all be read.

    Version 0 [RFC 2986 4.1]; no parameters with ECDSA [RFC 5758 3.2]; a curve by its name [RFC 5480 2.1.1].

    Raises:
        CsrRefused: it is invalid.
    """
    try:
        der = from_pem(pem)
        if _ecdsa_with_parameters(der):  # before the parser: not every version of it lets such a CSR through
            words = "the ECDSA AlgorithmIdentifier of the signature has parameters [RFC 5758 3.2]"
            raise refused("csr_signature_parameters", words)
        if _explicit_curve(der):  # the parser knows the curves by their numbers, and gives them their names
            raise refused(
                "csr_key_parameters", "the key's curve is given by its parameters, not by name [RFC 5480 2.1.1]"
            )
        csr = x509.load_der_x509_csr(der)
        _ = csr.public_key(), csr.subject, csr.extensions  # which are parsed only now
    except x509.InvalidVersion:
        raise refused("csr_version", "the CSR's version is not 0 [RFC 2986 4.1]") from None
    except x509.UnsupportedGeneralNameType:
        words = "it has a name of an unsupported type (x400Address, ediPartyName)"
        raise refused("csr_unreadable", words) from None
    except (ValueError, TypeError, IndexError, CryptographyUnsupported, x509.DuplicateExtension):
        raise refused("csr_unreadable", "not a PKCS#10 request in PEM, or unreadable") from None
    return csr


def faults(
    csr: x509.CertificateSigningRequest, *, certificate_type: CertificateType, organization: str | None
) -> Iterator[CsrRefused]:
    """Iterate over the reasons not to sign a CSR.

    Proof of possession; key strength [A00.FR.501-503]; O [A00.FR.509, A02.FR.13], C, CN [A00.FR.511], DC by the
    profile; and no CA rights.

    Args:
        csr: of `read_csr`.
        certificate_type: its certificate type.
        organization: the required O; None for any.
    """
    yield from _strength_faults(csr)
    if not csr.is_signature_valid:
        yield refused("csr_signature", "the CSR's signature does not verify: possession of the key is not proven")
    yield from _subject_faults(csr.subject, certificate_type, organization)
    for extension in csr.extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints) and value.ca:
            yield refused("csr_wants_ca", "the CSR requests CA:TRUE")
        if isinstance(value, x509.KeyUsage) and (value.key_cert_sign or value.crl_sign):
            yield refused("csr_wants_ca", "the CSR requests keyCertSign or cRLSign")


def profile_differences(csr: x509.CertificateSigningRequest, certificate_type: CertificateType) -> list[str]:
    """Return the differences from the profile that no CSMS refuses, as text.

    The algorithm, the SECC ID in CN, keyUsage and extendedKeyUsage.
    """
    profile = PROFILES[certificate_type]
    found = []
    wanted = profile.required_algorithm or profile.preferred_algorithm
    if wanted is not None:
        is_one = csr.signature_algorithm_oid.dotted_string == ALGORITHMS[wanted].signature_oid
        if not is_one or key_type(csr.public_key()) not in ALGORITHMS[wanted].key_types:
            found.append(f"algorithm: the profile has {wanted}, with a key of {ALGORITHMS[wanted].key_types[0]}")
    names = [str(name.value) for name in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if profile.secc_id and not any(map(is_secc_id, names)):
        found.append("CN: not a SECC ID [ISO 15118-2 Annex H]")
    return found + usage_differences(csr, profile)


def refused(reason: str, words: str) -> CsrRefused:
    """Return the refusal with this stable reason and these words."""
    return CsrRefused(words, reason=reason)


def _strength_faults(csr: x509.CertificateSigningRequest) -> Iterator[CsrRefused]:
    match public_key := csr.public_key():
        case rsa.RSAPublicKey():
            if public_key.key_size < _LEAST_RSA:
                yield refused("csr_key_weak", f"RSA-{public_key.key_size} is weaker than RSA-2048 [A00.FR.503]")
        case ec.EllipticCurvePublicKey():
            if public_key.curve.key_size < _LEAST_CURVE:
                name = public_key.curve.name
                yield refused("csr_key_weak", f"{name} has less than {_LEAST_CURVE} bits [A00.FR.502]")
        case _:
            kind = type(public_key).__name__
            yield refused("csr_key_kind", f"a key of kind {kind} is neither elliptic curve nor RSA")
    try:
        hash_algorithm = csr.signature_hash_algorithm
    except CryptographyUnsupported:
        hash_algorithm = None
    if hash_algorithm is None or hash_algorithm.digest_size * 8 < _LEAST_HASH:
        name = "an unknown hash" if hash_algorithm is None else hash_algorithm.name
        yield refused("csr_hash_weak", f"the CSR is signed with {name} [A00.FR.501]")


def from_pem(pem: str) -> bytes:
    """Return the DER of a CSR in PEM; raise ValueError if it has none."""
    found = [block for label in _LABELS for block in blocks(pem.encode(), label)]
    if not found:
        raise ValueError("no BEGIN CERTIFICATE REQUEST [RFC 7468 7]")
    return pem_to_der(found[0])


def _ecdsa_with_parameters(der: bytes) -> bool:
    """Whether a CSR's signatureAlgorithm is an ECDSA one and has anything after its OID.

    SEQUENCE { CertificationRequestInfo, SEQUENCE { OBJECT IDENTIFIER, parameters OPTIONAL }, signature }.
    """
    request, _ = _content(der, 0)
    _, information_end = _content(der, request)
    identifier, identifier_end = _content(der, information_end)
    oid, oid_end = _content(der, identifier)
    return der[oid:oid_end].startswith(_ECDSA_OIDS) and oid_end != identifier_end


def _explicit_curve(der: bytes) -> bool:
    """Whether a CSR's public key has a SEQUENCE for its curve [SEC 1 C.2, ECParameters], and not a name.

    CertificationRequestInfo is SEQUENCE { version, subject, SEQUENCE { SEQUENCE { OID, parameters }, key }, ... }.
    """
    request, _ = _content(der, 0)
    element, _ = _content(der, request)
    for _skipped in ("version", "subject"):
        _, element = _content(der, element)
    key, _ = _content(der, element)
    identifier, identifier_end = _content(der, key)
    oid, oid_end = _content(der, identifier)
    return der[oid:oid_end] == _EC_PUBLIC_KEY and oid_end < identifier_end and der[oid_end] == _SEQUENCE


def _content(der: bytes, element: int) -> tuple[int, int]:
    """Where the content of the element that begins at `element` begins and ends [X.690 8.1.3]."""
    begin, length = element + 2, der[element + 1]
    if length & 0x80:
        begin += length & 0x7F
        length = int.from_bytes(der[element + 2 : begin])
    return begin, begin + length


def _subject_faults(
    subject: x509.Name, certificate_type: CertificateType, organization: str | None
) -> Iterator[CsrRefused]:
    profile = PROFILES[certificate_type]
    for label, reason, oid in _NAMES:
        values = [str(attribute.value) for attribute in subject.get_attributes_for_oid(oid)]
        if len(values) != 1:
            yield refused(reason, f"the subject has {len(values)} {label}; exactly one is required")
            continue
        [value] = values
        match label:
            case "C" if _COUNTRY_NAME.fullmatch(value) is None:
                yield refused(reason, f"C is {value!r}, which is not two letters [ISO 3166-1]")
            case "O" if organization not in {None, value}:
                words = f"O is {value!r}, and this CSMS's OrganizationName is {organization!r} [A00.FR.509, A02.FR.13]"
                yield refused(reason, words)
            case "CN" if not 1 <= len(value) <= NAME_MAX_LENGTH:
                words = f"CN has {len(value)} characters; 1 to {NAME_MAX_LENGTH} are allowed [RFC 5280]"
                yield refused(reason, words)
            case "CN" if not profile.secc_id and _is_address(value):
                words = f"CN is {value!r}; it is the serial number, not a URL or IP address [A00.FR.511]"
                yield refused(reason, words)
    wanted = profile.domain_component
    domains = [str(attribute.value) for attribute in subject.get_attributes_for_oid(NameOID.DOMAIN_COMPONENT)]
    if domains != ([] if wanted is None else [wanted]):
        has = ", ".join(domains) or "none"
        words = f"DC is {has}; the profile of {certificate_type} has {wanted or 'none'} [V2G2-875, V2G2-925]"
        yield refused("csr_domain_component", words)


def _is_address(name: str) -> bool:
    if "://" in name:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
