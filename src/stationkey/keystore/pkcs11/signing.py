"""A key in a token as a private-key object of cryptography's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.padding import AsymmetricPadding
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from stationkey.keystore.signing import Buffer, EccKey, RsaKey, hash_of, refuse_other
from stationkey.x509.csr import HASHES

Sign = Callable[[str, bytes], bytes]
"""Signs data by a hash of that name, and returns r and s, or what PKCS #1 makes [PKCS #11 6.3.12, 6.1.6]."""


class EccPrivateKey(EccKey[Sign]):
    """An EC key in a token."""

    def sign(self, data: Buffer, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """Return the signature in DER [RFC 3279 2.2.3]."""
        signature = self._sign(hash_of(signature_algorithm).name, bytes(data))
        middle = len(signature) // 2
        return encode_dss_signature(int.from_bytes(signature[:middle]), int.from_bytes(signature[middle:]))


class RsaPrivateKey(RsaKey[Sign]):
    """An RSA key in a token."""

    def sign(self, data: Buffer, padding: AsymmetricPadding, algorithm: Any) -> bytes:
        """Return the signature [RFC 8017 8.2].

        Raises:
            ValueError: another padding or hash.
        """
        refuse_other(padding)
        if algorithm.name not in HASHES:
            raise ValueError(f"{algorithm.name} is not one of the contract's")
        return self._sign(algorithm.name, bytes(data))
