"""How every authority of the tests signs a certificate."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes

Extension = tuple[x509.ExtensionType, bool]
"""An extension, and whether it is critical."""


def issue(
    subject: x509.Name,
    public_key: Any,
    extensions: Iterable[Extension],
    *,
    issuer: x509.Name,
    key: Any,
    begins: datetime,
    ends: datetime,
    algorithm: hashes.SHA256 | hashes.SHA512 | None = None,
) -> x509.Certificate:
    """Sign a certificate, by SHA-256 unless `algorithm` is another; `key` is the issuer's."""
    builder = x509.CertificateBuilder(issuer, subject, public_key, x509.random_serial_number(), begins, ends)
    for value, critical in extensions:
        builder = builder.add_extension(value, critical=critical)
    return builder.sign(key, algorithm or hashes.SHA256())
