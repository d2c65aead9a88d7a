"""Compare an installed certificate with its key and profile. Pure: bytes and values in.

Differences are reported to the operator; only a certificate for another key prevents the activation [A02.FR.06: the
installer verifies the chain].
"""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.exceptions import UnsupportedAlgorithm as CryptographyUnsupported
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError
from msgspec import Struct
from msgspec.structs import replace

from stationkey.contract.profiles import CertificateProfile
from stationkey.errors import KeyStoreError, StationKeyError
from stationkey.system.pem import blocks, from_pem, to_pem
from stationkey.x509.csr import HASHES, PURPOSES, USAGE_FIELDS, PrivateKey, key_type, usages_for
from stationkey.x509.lenient import MALFORMED, Certificate, Link, link, name_text, read_certificate

MAX_CHAIN: Final = 10
"""Longest chain whose order is checked. A chain of ISO 15118 has at most four certificates, and a signature may have an
exponent of thousands of bits, while requests wait."""

UNREADABLE: Final = (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
"""The exceptions of cryptography for invalid extensions, which it parses on access."""


class Chain(Struct, frozen=True, eq=False):
    """A leaf certificate and the other certificates of its file, in their order.

    Attributes:
        certificates: leaf first, as in OCPP's ``certificateChain``.
        position: index of the leaf, for a file in another order.
        path: the file, if it is known; two chains do not differ by it.
    """

    certificates: tuple[Certificate, ...]
    position: int = 0
    path: str = ""

    def __eq__(self, other: object) -> bool:
        """Compare all but the file."""
        return isinstance(other, Chain) and (self.certificates, self.position) == (other.certificates, other.position)

    def __hash__(self) -> int:
        """As `__eq__`."""
        return hash((self.certificates, self.position))

    @property
    def own(self) -> Certificate:
        """The station's own certificate, as in the file."""
        return self.certificates[self.position]

    @property
    def leaf(self) -> x509.Certificate:
        """The station's own certificate, as far as it can be read (`Certificate.loaded`)."""
        assert self.own.loaded is not None
        return self.own.loaded

    @property
    def public(self) -> bytes:
        """SubjectPublicKeyInfo of the leaf, in DER."""
        return self.own.public

    def seen_from_each(self) -> list[Chain]:
        """The same certificates, with each of them in turn as the leaf: a file may have it in the wrong place.

        A certificate with an unreadable key or validity is not a leaf of ours, and only follows another.
        """
        return [
            replace(self, position=position)
            for position, certificate in enumerate(self.certificates)
            if _unreadable(certificate) is None
        ]

    @property
    def not_after(self) -> int:
        """When the leaf expires, Unix time in seconds."""
        return int(self.leaf.not_valid_after_utc.timestamp())

    @property
    def not_before(self) -> int:
        """Start of the leaf's validity, Unix time in seconds."""
        return int(self.leaf.not_valid_before_utc.timestamp())

    def pem(self) -> str:
        """Return all certificates in PEM [RFC 7468], the leaf first, as programs that load a key expect."""
        others = (certificate for number, certificate in enumerate(self.certificates) if number != self.position)
        return b"".join(to_pem("CERTIFICATE", certificate.der) for certificate in (self.own, *others)).decode("ascii")


def read_chain(content: bytes) -> Chain | None:
    """Return the certificates in a file, PEM or DER; None if there is none, or the first is unreadable."""
    chain, _ = read_certificates(content)
    return chain if chain is not None and _unreadable(chain.own) is None else None


class Unparsed(Struct, frozen=True):
    """Something in a file that may be a certificate and could not be parsed.

    Attributes:
        cause: why, as a fragment.
        der: its decoded bytes; None if it was not decoded, and so may be any certificate.
    """

    cause: str
    der: bytes | None = None

    def may_hold(self, public: bytes) -> bool:
        """Whether it may be a certificate for the key with this subjectPublicKeyInfo.

        A certificate has the key's x-coordinate or modulus in it, however the rest of the key is encoded.
        """
        return self.der is None or _number_of(public) in self.der


def read_certificates(content: bytes) -> tuple[Chain | None, list[Unparsed]]:
    """Read the certificates of a file, PEM or DER.

    Returns:
        The certificates, or None; and each part that may be a certificate but could not be parsed.
    """
    if not content.strip():
        return None, [Unparsed("empty")]
    if content[:1] == b"0" and (content[1:2] >= b"\x80" or len(content) == 1):
        return _read_der(content)
    certificates, unparsed = [], []
    for number, block in enumerate(_BLOCK.finditer(content), 1):
        label, body = block.groups()
        if label not in _CERTIFICATE:
            if not _NO_CERTIFICATE.fullmatch(label):
                unparsed.append(Unparsed(f"PEM block {number} of unknown kind"))
            continue
        der = _decoded(body)
        try:
            certificates.append(read_certificate(der or b""))
        except ValueError:
            unparsed.append(Unparsed(f"PEM block {number} is an invalid certificate", der))
    rest = _BLOCK.sub(b"", content)
    last_line = rest.rstrip().rpartition(b"\n")[2]
    if b"-----" in rest or (last_line and b"-----BEGIN ".startswith(last_line)):
        unparsed.append(Unparsed("a PEM block is incomplete"))
    elif b"\0" in rest or _BARE_BASE64.search(rest):
        unparsed.append(Unparsed("neither PEM nor DER"))
    unparsed += filter(None, map(_unreadable, certificates))
    return Chain(tuple(certificates)) if certificates else None, unparsed


_BLOCK: Final = re.compile(rb"-----BEGIN ([^\r\n-]+)-----((?:[^-]|-(?!----))*)-----END \1-----")
_CERTIFICATE: Final = (b"CERTIFICATE", b"X509 CERTIFICATE")
_NO_CERTIFICATE: Final = re.compile(rb"(.* )?(KEY|PARAMETERS|CRL|CERTIFICATE REQUEST)")
_BARE_BASE64: Final = re.compile(rb"MI[A-Za-z0-9+/]{40}")
"""Beginning of a certificate in Base64 without PEM lines."""


def _read_der(content: bytes) -> tuple[Chain | None, list[Unparsed]]:
    try:
        certificate = read_certificate(content)
        return Chain((certificate,)), list(filter(None, [_unreadable(certificate)]))
    except ValueError:
        pass
    header = 2 + (content[1] & 0x7F) if len(content) > 1 else len(content)
    if int.from_bytes(content[2:header]) != len(content) - header:
        return None, [Unparsed("incomplete DER, or more than DER")]
    first = content[header : header + 3]
    if first in {b"\x02\x01\x00", b"\x02\x01\x01"}:  # version of a private key [RFC 5208, RFC 5915, RFC 8017 A.1.2]
        return None, []
    if not first.startswith(b"0"):  # PKCS #7, PKCS #12: may have certificates in it that are encoded otherwise
        return None, [Unparsed("DER of unknown kind")]
    for load in (x509.load_der_x509_crl, x509.load_der_x509_csr, serialization.load_der_public_key):
        with suppress(*MALFORMED):
            load(content)
            return None, []
    return None, [Unparsed("an invalid certificate", content)]


def _decoded(body: bytes) -> bytes | None:
    try:
        return base64.b64decode(b"".join(body.split()), validate=True)
    except ValueError:
        return None


def _unreadable(certificate: Certificate) -> Unparsed | None:
    """Return why a certificate cannot be the leaf of a key of ours, or None.

    A key of an unknown type is not ours. A damaged one may be any.
    """
    try:
        _ = certificate.public
    except CryptographyUnsupported:
        return Unparsed("a key of unknown kind", certificate.der)
    except MALFORMED:
        return Unparsed("an unreadable key")
    try:
        assert certificate.loaded is not None
        _ = certificate.loaded.not_valid_before_utc, certificate.loaded.not_valid_after_utc
    except (AssertionError, *MALFORMED):
        return Unparsed("an invalid certificate", certificate.der)
    return None


def _number_of(public: bytes) -> bytes:
    key = serialization.load_der_public_key(public)
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key.public_numbers().x.to_bytes((key.key_size + 7) // 8)
    assert isinstance(key, rsa.RSAPublicKey)
    return key.public_numbers().n.to_bytes((key.key_size + 7) // 8)


class Expected(Struct, frozen=True, kw_only=True):
    """The request, to compare the certificate with."""

    profile: CertificateProfile
    common_name: str
    organization_name: str
    country_name: str
    public: bytes


def differences(chain: Chain, expected: Expected, *, now: float) -> list[str]:
    """Return the differences between certificate and request, as text; empty if there are none.

    Args:
        chain: leaf first.
        expected: the request and its profile.
        now: Unix time in seconds, by a clock that may be wrong: validity is reported, and never decides.
    """
    leaf = chain.leaf
    found = []
    if chain.public != expected.public:
        found.append("key: the certificate is for another key")
    names: tuple[tuple[str, x509.ObjectIdentifier, str | None], ...] = (
        ("C", NameOID.COUNTRY_NAME, expected.country_name),
        ("O", NameOID.ORGANIZATION_NAME, expected.organization_name),
        ("CN", NameOID.COMMON_NAME, expected.common_name),
        ("DC", NameOID.DOMAIN_COMPONENT, expected.profile.domain_component),
    )
    if "subject" in chain.own.odd:
        found.append("subject: it cannot be read")
        names = ()
    for label, oid, wanted in names:
        has = [str(attribute.value) for attribute in leaf.subject.get_attributes_for_oid(oid)]
        if has != ([] if wanted is None else [wanted]):
            found.append(f"{label}: the certificate has {', '.join(has) or 'none'}, {wanted or 'none'} was asked for")
    found += usage_differences(leaf, expected.profile)
    found += _validity_differences(leaf, now)
    found += _order_differences(chain)
    return found


def usage_differences(
    leaf: x509.Certificate | x509.CertificateSigningRequest, profile: CertificateProfile
) -> list[str]:
    """Return what keyUsage, extendedKeyUsage and basicConstraints lack of a profile, as text."""
    found = []
    try:
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
        asked = usages_for(profile, leaf.public_key())
        missing = [bit for bit in asked if bit in USAGE_FIELDS and not getattr(usage, USAGE_FIELDS[bit])]
        if missing:
            found.append(f"usage: keyUsage lacks {', '.join(missing)}")
    except x509.ExtensionNotFound:
        found.append("usage: no keyUsage")
    except UNREADABLE:
        return ["usage: the extensions cannot be read"]
    try:
        if leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            found.append("usage: CA:true")
    except x509.ExtensionNotFound:
        pass  # a leaf without basicConstraints is not a CA [RFC 5280 4.2.1.9]
    return found + _purpose_differences(leaf, profile)


def _purpose_differences(
    leaf: x509.Certificate | x509.CertificateSigningRequest, profile: CertificateProfile
) -> list[str]:
    try:
        purposes = list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return ["usage: no extendedKeyUsage"] if profile.extended_key_usage else []
    if ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in purposes:
        return []
    missing = [purpose for purpose in profile.extended_key_usage if PURPOSES[purpose] not in purposes]
    return [f"usage: extendedKeyUsage lacks {', '.join(missing)}"] if missing else []


def _validity_differences(leaf: x509.Certificate, now: float) -> list[str]:
    moment = datetime.fromtimestamp(now, UTC)
    if moment < leaf.not_valid_before_utc:
        return [f"validity: begins at {leaf.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}, which is still to come"]
    if moment > leaf.not_valid_after_utc:
        return [f"validity: ended at {leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"]
    return []


def _order_differences(chain: Chain) -> list[str]:
    if chain.position != 0:
        return ["chain order: the station's certificate should be first, and each followed by the one that issued it"]
    if len(chain.certificates) > MAX_CHAIN:
        return [f"chain order: of {len(chain.certificates)} certificates, more than {MAX_CHAIN}, it is not looked at"]
    causes = {
        Link.NAME: "the issuer of certificate {0} is {2}, and certificate {1} is {3}",
        Link.SIGNATURE: "the signature of certificate {0} does not verify with the key of certificate {1}",
        Link.UNPROVED: "the signature of certificate {0} is of a kind that cannot be verified here",
    }
    pairs = enumerate(pairwise(chain.certificates), 1)
    return [
        "chain order: " + causes[found].format(number, number + 1, name_text(subject.issuer), name_text(issuer.subject))
        for number, (subject, issuer) in pairs
        if (found := link(subject, issuer)) is not Link.PROVED
    ][:1]


def oddities(chain: Chain) -> list[str]:
    """Return the harmless violations of standards in a chain, as text."""
    return [
        f"encoding: certificate {number} has an invalid {' and '.join(certificate.odd) or 'part'}"
        for number, certificate in enumerate(chain.certificates[:MAX_CHAIN], 1)
        if certificate.odd or certificate.loaded is None
    ]


def untrusted(chain: Chain, anchors: bytes) -> str:
    """Why a chain does not lead to one of the roots in `anchors` (PEM) [RFC 5280 6.1]; empty where it does.

    Names and purposes are the profile's to check (`differences`): a SECC's certificate names no host.
    """
    if any(each.odd or each.loaded is None for each in chain.certificates):
        return _untrusted_by_links(chain, [read_certificate(from_pem(each)) for each in blocks(anchors, "CERTIFICATE")])
    ca = ExtensionPolicy.permit_all().require_present(x509.BasicConstraints, Criticality.AGNOSTIC, _is_ca)
    verifier = (
        PolicyBuilder()
        .store(Store(x509.load_pem_x509_certificates(anchors)))
        .extension_policies(ca_policy=ca, ee_policy=ExtensionPolicy.permit_all())
        .build_client_verifier()
    )
    others = [certificate.loaded for certificate in chain.certificates[1:] if certificate.loaded is not None]
    try:
        verifier.verify(chain.leaf, others)
    except (VerificationError, ValueError):
        moment = datetime.now(UTC)
        for number, certificate in enumerate((chain.leaf, *others), 1):
            if not certificate.not_valid_before_utc <= moment <= certificate.not_valid_after_utc:
                return f"certificate {number} is expired, or not valid yet"
        return "no path of CA certificates leads from it to one of them"
    return ""


def _untrusted_by_links(chain: Chain, anchors: list[Certificate]) -> str:
    """Do the same for a chain with names that cryptography's verifier cannot read; without name constraints."""
    path = chain.certificates
    if order := _order_differences(chain):
        return order[0]
    if not any(path[-1].der == anchor.der or link(path[-1], anchor) is Link.PROVED for anchor in anchors):
        return "no path of CA certificates leads from it to one of them"
    return next(filter(None, (_unfit(number, certificate) for number, certificate in enumerate(path, 1))), "")


def _unfit(number: int, certificate: Certificate) -> str:
    """Return why a certificate is unfit for its place in a chain, counted from the leaf; empty if it is fit."""
    loaded = certificate.loaded
    if loaded is None or not loaded.not_valid_before_utc <= datetime.now(UTC) <= loaded.not_valid_after_utc:
        return f"certificate {number} is expired, or not valid yet"
    constraints = certificate.extension(x509.BasicConstraints)
    below = number - 2  # CAs between it and the leaf
    if below >= 0 and (
        constraints is None
        or not constraints.ca
        or (constraints.path_length is not None and constraints.path_length < below)
    ):
        return f"certificate {number} is not that of a CA, or not for so long a chain"
    try:
        critical = {extension.oid for extension in loaded.extensions if extension.critical}
    except UNREADABLE:
        return f"the extensions of certificate {number} cannot be read"
    return f"certificate {number} has an unknown critical extension" if critical - _JUDGED else ""


_JUDGED: Final = frozenset({ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE, ExtensionOID.EXTENDED_KEY_USAGE})


def _is_ca(_policy: object, _certificate: object, constraints: x509.BasicConstraints | None) -> None:
    if constraints is None or not constraints.ca:
        raise ValueError("a certificate in the chain is not a CA certificate")


def prove(private_key: PrivateKey, public_key: object, challenge: bytes) -> None:
    """Sign `challenge` with the private key, and verify the signature with the public one.

    Args:
        private_key: in the TPM.
        public_key: of the certificate, or of the key itself without a certificate.
        challenge: a fresh value.

    Raises:
        KeyStoreError: they do not belong together, or the key does not sign.
        StationKeyError: the public key is neither elliptic curve nor RSA.
    """
    sha256 = HASHES["sha256"]
    try:
        if isinstance(private_key, ec.EllipticCurvePrivateKey) and isinstance(public_key, ec.EllipticCurvePublicKey):
            public_key.verify(private_key.sign(challenge, ec.ECDSA(sha256)), challenge, ec.ECDSA(sha256))
            return
        if isinstance(private_key, rsa.RSAPrivateKey) and isinstance(public_key, rsa.RSAPublicKey):
            signature = private_key.sign(challenge, padding.PKCS1v15(), sha256)
            public_key.verify(signature, challenge, padding.PKCS1v15(), sha256)
            return
    except InvalidSignature:
        pass
    try:
        kind = str(key_type(public_key))
    except StationKeyError:
        kind = "of another kind"
    raise KeyStoreError(
        f"the private key and the certificate's key ({kind}) do not belong together",
        reason="certificate_of_another_key",
    )
