"""A public-key infrastructure of the tests' own: V2G root, CPO Sub-CA 1 and 2, leaf; and one for vehicles.

Made with nothing of this project, so that it judges what the project does.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from issuing import Extension, issue

HASH_OF: dict[str, hashes.SHA256 | hashes.SHA512] = {"secp256r1": hashes.SHA256(), "secp521r1": hashes.SHA512()}
"""ISO 15118-2 signs with SHA-256 and -20 with SHA-512."""


def pem(certificates: Iterable[x509.Certificate]) -> str:
    return "".join(one.public_bytes(serialization.Encoding.PEM).decode() for one in certificates)


@dataclass(frozen=True)
class Issuer:
    """A CA: what it signs with, and the certificates from its own up to the root."""

    key: ec.EllipticCurvePrivateKey
    path: tuple[x509.Certificate, ...]

    def sign(
        self, subject: x509.Name, public_key: object, extensions: Iterable[Extension], *, days: int = 60
    ) -> x509.Certificate:
        return _sign(subject, public_key, extensions, issuer=self.path[0].subject, key=self.key, days=days)


def _sign(
    subject: x509.Name,
    public_key: object,
    extensions: Iterable[Extension],
    *,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: int = 60,
) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)
    identifiers = [
        (x509.SubjectKeyIdentifier.from_public_key(public_key), False),  # type: ignore[arg-type] # a public key, whichever it is
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), False),
    ]
    return issue(
        subject,
        public_key,
        [*identifiers, *extensions],
        issuer=issuer,
        key=key,
        begins=now - dt.timedelta(days=100),
        ends=now + dt.timedelta(days=days),
        algorithm=HASH_OF[key.curve.name],
    )


def _name(common_name: str, domain: str) -> x509.Name:
    names = [(NameOID.COMMON_NAME, common_name), (NameOID.ORGANIZATION_NAME, "Test"), (NameOID.COUNTRY_NAME, "DE")]
    return x509.Name([x509.NameAttribute(*name) for name in (*names, (NameOID.DOMAIN_COMPONENT, domain))])


def _ca_extensions(path_length: int | None) -> list[Extension]:
    constraints = x509.BasicConstraints(ca=True, path_length=path_length)
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return [(constraints, True), (usage, True)]


class Authority:
    """Root, Sub-CA 1 and Sub-CA 2 of one curve.

    Args:
        curve: of all its keys.
        domain: DC of its names: ``V2G`` for those of stations, ``OEM`` for those of vehicles.
    """

    def __init__(self, curve: ec.EllipticCurve, domain: str = "V2G") -> None:
        self.curve = curve
        self.domain = domain
        key = ec.generate_private_key(curve)
        name = _name(f"{domain}RootCA", domain)
        root = _sign(name, key.public_key(), _ca_extensions(None), issuer=name, key=key)
        self.issuer = Issuer(key, (root,))
        for number, path_length in ((1, 1), (2, 0)):
            sub_key = ec.generate_private_key(curve)
            subject = _name(f"SubCA{number}", domain)
            certificate = self.issuer.sign(subject, sub_key.public_key(), _ca_extensions(path_length))
            self.issuer = Issuer(sub_key, (certificate, *self.issuer.path))

    @property
    def root(self) -> str:
        """What the other side trusts, in PEM."""
        return pem(self.issuer.path[-1:])

    @property
    def sub_cas(self) -> str:
        """Sub-CA 2 and Sub-CA 1, in PEM."""
        return pem(self.issuer.path[:-1])

    def certify(self, csr_pem: str) -> str:
        """Leaf and Sub-CAs, in PEM, for a CSR; its subject and the extensions that it asks for are taken over."""
        csr = x509.load_pem_x509_csr(csr_pem.encode())
        assert csr.is_signature_valid
        asked = [(extension.value, extension.critical) for extension in csr.extensions]
        leaf = self.issuer.sign(csr.subject, csr.public_key(), asked)
        return pem([leaf]) + self.sub_cas

    def software(self, file: Path, common_name: str, extensions: Iterable[Extension] = ()) -> Path:
        """A certificate with a software key, for the other side of a connection: key and chain in a file."""
        key = ec.generate_private_key(self.curve)
        leaf = self.issuer.sign(_name(common_name, self.domain), key.public_key(), extensions)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
        return write(file, private + pem([leaf]) + self.sub_cas)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="ascii")
    return path
