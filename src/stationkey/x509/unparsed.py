"""What could not be parsed, and may be a certificate."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from msgspec import Struct


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


def _number_of(public: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - with the first certificate

    key = serialization.load_der_public_key(public)
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key.public_numbers().x.to_bytes((key.key_size + 7) // 8)
    assert isinstance(key, rsa.RSAPublicKey)
    return key.public_numbers().n.to_bytes((key.key_size + 7) // 8)
