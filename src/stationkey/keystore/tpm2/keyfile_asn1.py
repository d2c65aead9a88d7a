"""The ASN.1 of a key file; see `stationkey.keystore.tpm2.keyfile`."""

from __future__ import annotations

from typing import Annotated

from cryptography.hazmat import asn1
from cryptography.hazmat.asn1 import decode_der, encode_der
from cryptography.x509 import ObjectIdentifier

__all__ = ["Command", "File", "decode_der", "encode_der"]


@asn1.sequence
class Command:
    """TPMPolicy."""

    code: Annotated[int, asn1.Explicit(0)]
    policy: Annotated[bytes, asn1.Explicit(1)]


@asn1.sequence
class File:
    """TPMKey."""

    type: ObjectIdentifier
    empty_auth: Annotated[bool | None, asn1.Explicit(0)]
    policy: Annotated[list[Command] | None, asn1.Explicit(1)]
    parent: int
    public: bytes
    private: bytes
