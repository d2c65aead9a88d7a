"""Is a signed certificate fit to be installed? [A02.FR.06; ISO 15118-2 Annex F, ISO 15118-20 Annex B]."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.x509.verification import Store

from stationkey.errors import ConfigurationError, StationKeyError
from stationkey.simulators.ocpp import CHAIN_LIMIT
from stationkey.simulators.pending import Pending
from stationkey.system.files import read_bounded
from stationkey.x509.certificate import Chain, Expected, differences, oddities, read_chain, untrusted
from stationkey.x509.lenient import Certificate, comparable, name_text, read_certificate


class CertificateInvalid(StationKeyError):
    """A certificate that must not be installed [A02.FR.06, A02.FR.07]."""


def read_trust_anchors(path: Path) -> bytes:
    """Read the roots that certificates must lead to: a PEM file with at least one certificate.

    Raises:
        ConfigurationError: the file cannot be read, or holds no certificate in PEM.
    """
    content = read_bounded(path)
    try:
        Store(x509.load_pem_x509_certificates(content))
    except (ValueError, TypeError, x509.InvalidVersion):
        der = content[:1] == b"\x30"
        raise ConfigurationError(
            f"{path} holds no certificate in PEM that can be read" + (": it is DER" if der else ""),
            reason="trust_anchors_invalid",
            hint=f"convert it: openssl x509 -inform DER -in {path} -out anchors.pem"
            if der
            else "it must hold the root certificates in PEM, and nothing else that calls itself a certificate",
        ) from None
    return content


def read_signed(chain_pem: str) -> Chain:
    """Read the chain of a CertificateSigned, leaf first.

    Raises:
        CertificateInvalid: it is too long [A02.FR.16], cannot be read, or is in reverse order.
    """
    if len(chain_pem) > CHAIN_LIMIT:
        raise CertificateInvalid(
            f"the chain has {len(chain_pem)} characters, {CHAIN_LIMIT} are allowed", reason="chain_too_long"
        )
    chain = read_chain(chain_pem.encode())
    if chain is None or len(chain.certificates) != chain_pem.count("-----BEGIN CERTIFICATE-----"):
        raise CertificateInvalid("no readable certificate in it", reason="chain_unreadable")
    certificates = chain.certificates
    if len(certificates) > 1 and _is_ca(certificates[0]) and not _is_ca(certificates[-1]):
        raise CertificateInvalid(
            "the chain is in reverse order: the station's certificate must come first", reason="chain_reversed"
        )
    return chain


def verify(chain: Chain, expected: Expected, *, anchors: bytes | None, root_permitted: bool) -> str:
    """Verify a chain against the trust anchors, its CSR and its profile.

    Args:
        chain: leaf first.
        expected: what was asked for.
        anchors: roots in PEM; None to trust what the CSMS sends.
        root_permitted: whether the chain may have its root in it: permitted by TLS [RFC 8446 4.4.2], not by ISO 15118.

    Returns:
        A warning, or an empty string.

    Raises:
        CertificateInvalid: it must not be installed.
    """
    if anchors is not None and (why := untrusted(chain, anchors)):
        if missing := _missing_issuer(chain, x509.load_pem_x509_certificates(anchors)):
            raise CertificateInvalid(
                f"the chain is not complete: the certificate of its issuer {missing} is missing",
                reason="chain_incomplete",
            )
        raise CertificateInvalid(f"it does not lead to a trust anchor: {why}", reason="chain_untrusted")
    roots = [certificate for certificate in chain.certificates if certificate.self_issued]
    if roots and not root_permitted:
        raise CertificateInvalid("the chain has a root in it", reason="root_in_chain")
    if found := differences(chain, expected, now=time.time()):
        raise CertificateInvalid("; ".join(found), reason="certificate_differs")
    warnings = ["the chain contains its root, which is unnecessary [RFC 8446 4.4.2]"] if roots else []
    return "; ".join(warnings + oddities(chain))


def root_of(chain: Chain, anchors: bytes) -> x509.Certificate | None:
    """Return the trust anchor that a chain leads to, or None: it issued the last certificate, or is it."""
    last = chain.certificates[-1].loaded
    for anchor in x509.load_pem_x509_certificates(anchors):
        if last is not None and last != anchor:
            try:
                last.verify_directly_issued_by(anchor)
            except (ValueError, TypeError, InvalidSignature):
                continue
        return anchor if last is not None else None
    return None


def for_which(chain: Chain, candidates: Iterable[Pending]) -> Pending:
    """Return the pending CSR that a chain's leaf answers.

    Raises:
        CertificateInvalid: none of them.
    """
    for pending in candidates:
        if pending.public == chain.public:
            return pending
    raise CertificateInvalid("it is for no key that a CSR is pending for", reason="certificate_of_another_key")


def _missing_issuer(chain: Chain, anchors: list[x509.Certificate]) -> str:
    """The name of the first issuer that is neither in the chain nor a trust anchor; empty where none is missing."""
    roots = [read_certificate(anchor.public_bytes(serialization.Encoding.DER)) for anchor in anchors]
    known = {comparable(certificate.subject) for certificate in (*chain.certificates, *roots)}
    for certificate in chain.certificates:
        if comparable(certificate.issuer) not in known:
            return name_text(certificate.issuer)
    return ""


def _is_ca(certificate: Certificate) -> bool:
    constraints = certificate.extension(x509.BasicConstraints)
    return constraints is not None and constraints.ca
