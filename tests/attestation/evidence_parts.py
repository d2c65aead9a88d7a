"""Evidence and certificates for the tests of the judge."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from forgery import Object, an_ak, evidence, p256

from stationkey.attestation import trust, verifier
from stationkey.attestation.trust import RecordedKey
from stationkey.errors import NotVerified

NONCE = bytes(range(32))


NOW = datetime(2026, 3, 1, tzinfo=UTC)


@cache
def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def by_key(ak: Object) -> RecordedKey:
    return RecordedKey(ak.spki, "recorded")


def reason_of(judge: Callable[[], object]) -> str:
    """Why the evidence was refused; anything but a refusal fails the test."""
    with pytest.raises(NotVerified) as refused:
        judge()
    assert refused.value.exit_code == 3
    return refused.value.reason


# What is wrong, one thing at a time.


def refused(**changes: Any) -> Callable[[], object]:
    """Evidence with something wrong in it, its attestation key believed."""
    ak: Object = changes.pop("ak", None) or an_ak()
    return lambda: verifier.verify(evidence(ak=ak, **changes), by_key(ak), nonce=None)


def pem_of(document: x509.CertificateSigningRequest | x509.Certificate) -> bytes:
    return document.public_bytes(serialization.Encoding.PEM)


# Certificates.


def a_certificate(
    public_key: Any,
    issuer: tuple[Any, x509.Name],
    *,
    subject: str = "leaf",
    usages: tuple[x509.ObjectIdentifier, ...] = (trust.AK_CERTIFICATE,),
    ca: bool = False,
    key_cert_sign: bool = False,
    starts: datetime = NOW - timedelta(days=1),
    ends: datetime = NOW + timedelta(days=1),
    extra: tuple[x509.ExtensionType, ...] = (),
) -> x509.Certificate:
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"), False
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(name_of(subject))
        .issuer_name(issuer[1])
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(starts)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=key_cert_sign,
                encipher_only=False,
                decipher_only=False,
                **usage,
            ),
            critical=True,
        )
    )
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    for extension in extra:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(issuer[0], hashes.SHA256())


def name_of(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


CA = (p256(), name_of("factory CA"))
