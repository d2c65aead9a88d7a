"""A small public-key infrastructure for trials and tests: V2G root, CPO Sub-CAs, and the CSMS's own authority.

The private keys of these authorities are in software, and in files if `Hierarchy.save` is called: do not trust their
certificates outside a trial. The leaves follow `stationkey.contract.profiles`, and so ISO 15118-2 Annex F and ISO
15118-20 Annex B by their public descriptions.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import cycle
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import ocsp
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

from stationkey.contract.profiles import (
    PROFILES,
    SECP256R1,
    SECP521R1,
    CertificateProfile,
    CertificateType,
    EllipticCurve,
)
from stationkey.errors import ConfigurationError
from stationkey.simulators.ocpp import CHAIN_LIMIT
from stationkey.x509.csr import HASHES, PublicKey, extensions_of, key_usage, usages_for

LEAF_DAYS: Final = 60
"""Validity of a leaf: public sources about ISO 15118-2 Annex F give two to three months."""


class Misbehaviour(StrEnum):
    """Misbehaviour of a CSMS or its CA."""

    ANSWER_FIRST_OF_THREE = "answer_first_of_three"
    """Answer nothing until the third SignCertificate, and then the first [OCTT TC_A_23]."""
    WRONG_KEY = "wrong_key"
    """The certificate is for another key than the CSR's."""
    EXPIRED = "expired"
    """The certificate ended a day ago."""
    WRONG_DC = "wrong_dc"
    """The certificate has another DC than the profile, or one if the profile has none."""
    ROOT_IN_CHAIN = "root_in_chain"
    """The root is the last certificate of the chain."""
    CHAIN_TOO_LONG = "chain_too_long"
    """The chain has more than 10000 characters."""
    NEVER = "never"
    """SignCertificate is accepted; CertificateSigned never comes."""
    REJECT = "reject"
    """SignCertificate is always rejected."""
    UNKNOWN_REQUEST_ID = "unknown_request_id"
    """CertificateSigned has a requestId that was never used (2.1; other versions have none)."""
    REFUSE_RENEWED = "refuse_renewed"
    """A client certificate that it signed in this run is refused (security profile 3)."""
    ACCEPT_RENEWED_LATE = "accept_renewed_late"
    """The same, for the first two connections with that certificate."""


_CURVES: Final = {SECP256R1: ec.SECP256R1(), SECP521R1: ec.SECP521R1()}
_HASHES: Final = {SECP256R1.name: HASHES["sha256"], SECP521R1.name: HASHES["sha512"]}
_AUTHORITY_LIFETIME: Final = timedelta(days=3650)
_COUNTRY: Final = "DE"
_STATUS_URL: Final = "http://pki.invalid"
"""Address of OCSP responder and CRLs in the certificates. No service runs there."""
_WRONG_DC: Final = "MO"
"""DC of a contract's authority; no station's certificate has it."""
_README: Final = """\
The authorities of `stationkey csms`: for trials and tests only.
Their private keys are in these files, in the clear. Do not trust their certificates outside a trial.
"""


@dataclass(frozen=True, slots=True)
class Authority:
    """A certification authority.

    Attributes:
        certificate: of the authority itself.
        private_key: in software.
    """

    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey

    def issue(
        self,
        subject: x509.Name,
        public_key: PublicKey,
        extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
        *,
        not_before: datetime,
    ) -> x509.Certificate:
        """Sign a certificate for `LEAF_DAYS` with these extensions, each with its criticality.

        Subject and authority key identifier are added [RFC 5280 4.2.1.1, 4.2.1.2]. The hash of the signature goes with
        the authority's curve: SHA-256 with P-256, SHA-512 with P-521.
        """
        issuer, lifetime = self.certificate.subject, timedelta(days=LEAF_DAYS)
        return _sign(self.private_key, issuer, subject, public_key, extensions, not_before, lifetime)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """The authorities of one curve: V2G root, CPO Sub-CA 1, CPO Sub-CA 2; and CSMS root and CSMS Sub-CA.

    Attributes:
        v2g_root: trust anchor of the EV.
        cpo_sub_ca_1: signed by the root.
        cpo_sub_ca_2: signed by Sub-CA 1; issues the SECC leaves.
        csms_root: trust anchor of the CSMS for its stations, and of the stations for their CSMS.
        csms_sub_ca: signed by it; issues charging station certificates and the CSMS's own TLS server certificate.
    """

    v2g_root: Authority
    cpo_sub_ca_1: Authority
    cpo_sub_ca_2: Authority
    csms_root: Authority
    csms_sub_ca: Authority

    @classmethod
    def make(cls, curve: EllipticCurve, *, organization: str, now: datetime) -> Self:
        """Make all authorities, with new keys.

        Args:
            curve: secp256r1 for ISO 15118-2, secp521r1 for -20.
            organization: O of every authority.
            now: the authorities are valid from a day before.
        """

        def authority(name: str, domain: str | None, issuer: Authority | None, path_length: int | None) -> Authority:
            private_key = ec.generate_private_key(_CURVES[curve])
            subject = _name(organization, name, domain)
            extensions: list[tuple[x509.ExtensionType, bool]] = [
                (x509.BasicConstraints(ca=True, path_length=path_length), True),
                (key_usage("key_cert_sign", "crl_sign"), True),
            ]
            signer, above = private_key, subject
            if issuer is not None:
                extensions += _status(issuer)
                signer, above = issuer.private_key, issuer.certificate.subject
            own = private_key.public_key()
            return Authority(_sign(signer, above, subject, own, extensions, begin, _AUTHORITY_LIFETIME), private_key)

        begin = now - timedelta(days=1)
        v2g_root = authority("V2G Root CA", "V2G", None, None)
        sub_ca_1 = authority("CPO Sub-CA 1", "V2G", v2g_root, 1)
        csms_root = authority("CSMS Root CA", None, None, None)
        return cls(
            v2g_root=v2g_root,
            cpo_sub_ca_1=sub_ca_1,
            cpo_sub_ca_2=authority("CPO Sub-CA 2", "V2G", sub_ca_1, 0),
            csms_root=csms_root,
            csms_sub_ca=authority("CSMS Sub-CA", None, csms_root, 0),
        )

    def issuers(self, certificate_type: CertificateType) -> tuple[Authority, ...]:
        """From the issuer of such a leaf up to the root, the root included."""
        if PROFILES[certificate_type].secc_id:
            return self.cpo_sub_ca_2, self.cpo_sub_ca_1, self.v2g_root
        return self.csms_sub_ca, self.csms_root

    def issue(
        self,
        csr: x509.CertificateSigningRequest,
        profile: CertificateProfile,
        *,
        now: datetime,
        misbehaviour: Misbehaviour | None = None,
    ) -> list[x509.Certificate]:
        """The certificate for a CSR and its chain, leaf first, without the root.

        The subject is the CSR's, byte for byte; the extensions are the profile's, whatever the CSR asks for. Whether
        the CSR is fit to be signed is for others to judge (`stationkey.x509.csr_check.check_csr`).

        Args:
            csr: its public key is certified.
            profile: says which authority signs, and the extensions.
            now: the leaf is valid from an hour before, for 60 days.
            misbehaviour: what to do wrong; those that are no fault of a certificate change nothing here.
        """
        issuer, *above = self.issuers(profile.certificate_type)
        public_key, subject = csr.public_key(), csr.subject
        not_before = now - timedelta(hours=1)
        match misbehaviour:
            case Misbehaviour.WRONG_KEY:
                public_key = ec.generate_private_key(issuer.private_key.curve).public_key()
            case Misbehaviour.EXPIRED:
                not_before = now - timedelta(days=LEAF_DAYS + 1)
            case Misbehaviour.WRONG_DC:
                names = [name for name in subject if name.oid != NameOID.DOMAIN_COMPONENT]
                subject = x509.Name([*names, x509.NameAttribute(NameOID.DOMAIN_COMPONENT, _WRONG_DC)])
        extensions = [*extensions_of(profile, usages_for(profile, public_key)), *_status(issuer)]
        assert isinstance(public_key, PublicKey)
        leaf = issuer.issue(subject, public_key, extensions, not_before=not_before)
        root = above.pop()
        chain = [leaf, issuer.certificate, *(authority.certificate for authority in above)]
        if misbehaviour is Misbehaviour.ROOT_IN_CHAIN:
            chain.append(root.certificate)
        if misbehaviour is Misbehaviour.CHAIN_TOO_LONG:
            again = cycle(chain[1:])
            while len(to_pem(chain)) <= CHAIN_LIMIT:
                chain.append(next(again))
        return chain

    def issue_server(
        self, names: Sequence[str], *, now: datetime
    ) -> tuple[list[x509.Certificate], ec.EllipticCurvePrivateKey]:
        """A TLS server certificate of the CSMS for DNS names and IP addresses, with its chain; and its key.

        Its CN is the first of `names` [A00.FR.510: the CSMS's FQDN].
        """
        issuer = self.csms_sub_ca
        private_key = ec.generate_private_key(issuer.private_key.curve)
        (organization,) = issuer.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        # The other end of the station's own connection: a leaf of the same kind, for a server.
        client = next(profile for profile in PROFILES.values() if not profile.secc_id)
        extensions = [
            (x509.SubjectAlternativeName(list(map(_general_name, names))), False),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            *((value, critical) for value, critical in extensions_of(client, client.key_usage) if critical),
            *_status(issuer),
        ]
        subject = _name(str(organization.value), names[0], None)
        leaf = issuer.issue(subject, private_key.public_key(), extensions, not_before=now - timedelta(hours=1))
        return [leaf, issuer.certificate], private_key

    def trust_anchors_pem(self, certificate_type: CertificateType | None = None) -> str:
        """The root for a certificate type, or both roots."""
        if certificate_type is not None:
            return to_pem([self.issuers(certificate_type)[-1].certificate])
        return to_pem([self.v2g_root.certificate, self.csms_root.certificate])

    def save(self, directory: Path) -> None:
        """Write every authority as ``<name>.crt`` and ``<name>.key`` (mode 0600), and a README that says what it is."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "README").write_text(_README)
        for name in _AUTHORITIES:
            authority: Authority = getattr(self, name)
            (directory / f"{name}.crt").write_text(to_pem([authority.certificate]))
            key_file = directory / f"{name}.key"
            key_file.touch(mode=0o600)
            key_file.chmod(0o600)
            key_file.write_bytes(key_to_pem(authority.private_key))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read what `save` has written.

        Raises:
            ConfigurationError: it is not there, or not whole.
        """
        try:
            return cls(**{name: _load(directory, name) for name in _AUTHORITIES})
        except (OSError, ValueError) as error:
            words = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigurationError(
                f"{directory} holds no hierarchy of authorities that can be read: {words}", reason="pki_unreadable"
            ) from None


_AUTHORITIES: Final = ("v2g_root", "cpo_sub_ca_1", "cpo_sub_ca_2", "csms_root", "csms_sub_ca")


def to_pem(chain: Sequence[x509.Certificate]) -> str:
    """Certificates in PEM, one after the other [RFC 7468]."""
    encoded = (certificate.public_bytes(serialization.Encoding.PEM) for certificate in chain)
    return b"".join(encoded).decode("ascii")


def certificate_hash(certificate: x509.Certificate, issuer: x509.Certificate | None = None) -> dict[str, str]:
    """OCPP's CertificateHashDataType with SHA-256, by default of a root, which issued itself.

    As in an OCSP request [RFC 6960 4.1.1]: hashes of the issuer's name and of the bits of its key.
    """
    builder = ocsp.OCSPRequestBuilder().add_certificate(certificate, issuer or certificate, hashes.SHA256())
    request = builder.build()
    return {
        "hashAlgorithm": "SHA256",
        "issuerNameHash": request.issuer_name_hash.hex(),
        "issuerKeyHash": request.issuer_key_hash.hex(),
        "serialNumber": f"{request.serial_number:x}",
    }


def _sign(
    signer: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    subject: x509.Name,
    public_key: PublicKey,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
    not_before: datetime,
    lifetime: timedelta,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_before + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, _HASHES[signer.curve.name])


def _status(issuer: Authority) -> list[tuple[x509.ExtensionType, bool]]:
    """Where to ask whether a certificate is revoked: OCSP and CRL of its issuer [RFC 5280 4.2.2.1, 4.2.1.13]."""
    name = str(issuer.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    ocsp = x509.UniformResourceIdentifier(f"{_STATUS_URL}/ocsp")
    crl = x509.UniformResourceIdentifier(f"{_STATUS_URL}/crl/{name.replace(' ', '-')}.crl")
    return [
        (x509.AuthorityInformationAccess([x509.AccessDescription(AuthorityInformationAccessOID.OCSP, ocsp)]), False),
        (x509.CRLDistributionPoints([x509.DistributionPoint([crl], None, None, None)]), False),
    ]


def _name(organization: str, common_name: str, domain: str | None) -> x509.Name:
    attributes = [
        (NameOID.COUNTRY_NAME, _COUNTRY),
        (NameOID.ORGANIZATION_NAME, organization),
        (NameOID.COMMON_NAME, common_name),
    ]
    if domain is not None:
        attributes.append((NameOID.DOMAIN_COMPONENT, domain))
    return x509.Name([x509.NameAttribute(oid, value, _validate=False) for oid, value in attributes])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def key_to_pem(private_key: ec.EllipticCurvePrivateKey) -> bytes:
    """A software key in PEM, PKCS#8, in the clear."""
    return private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load(directory: Path, name: str) -> Authority:
    content, key = ((directory / f"{name}.{kind}").read_bytes() for kind in ("crt", "key"))
    try:
        certificate = x509.load_pem_x509_certificate(content)
        private_key = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError):
        raise ValueError(f"key or certificate of {name} is damaged") from None
    if not isinstance(private_key, ec.EllipticCurvePrivateKey) or private_key.public_key() != certificate.public_key():
        raise ValueError(f"key and certificate of {name} do not belong together")
    return Authority(certificate, private_key)
