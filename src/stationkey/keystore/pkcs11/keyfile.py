"""The file format of keys in a token, ``PKCS#11 PROVIDER URI``, which OpenSSL's pkcs11-provider reads.

``SEQUENCE { VisibleString, UTF8String }`` [pkcs11-provider 1.0, tools/uri2pem.py]. The file says where the key is, and
not how to log in: each program that uses the token has its own way to the PIN.
"""

from __future__ import annotations

from typing import Final

from cryptography.hazmat import asn1

LABEL: Final = "PKCS#11 PROVIDER URI"
_VERSION: Final = asn1.decode_der(asn1.TLV, b"\x1a\x19PKCS#11 Provider URI v1.0")
"""A VisibleString, which cryptography has no type for."""


@asn1.sequence
class _File:
    version: asn1.TLV
    uri: str


def encode(uri: str) -> bytes:
    """Return the DER of a key file.

    Args:
        uri: of a private key [RFC 7512].
    """
    return asn1.encode_der(_File(version=_VERSION, uri=uri))


def uri_of(der: bytes) -> str:
    """Return the URI in a key file.

    Raises:
        ValueError: invalid file.
    """
    return asn1.decode_der(_File, der).uri
