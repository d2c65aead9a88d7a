"""A key in a token as a private-key object of cryptography's: what a CSR is signed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import AsymmetricPadding, PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from stationkey.x509.csr import HASHES

Buffer = bytes | bytearray | memoryview
Sign = Callable[[str, bytes], bytes]
"""Signs data by a hash of that name, and returns r and s, or what PKCS #1 makes [PKCS #11 6.3.12, 6.1.6]."""


class _InToken:
    """What a key in a token does not do."""

    def _refused(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a key in a token only signs")

    private_numbers = private_bytes = exchange = decrypt = _refused

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, _: Any) -> Any:
        return self


class EccPrivateKey(_InToken, ec.EllipticCurvePrivateKey):
    """An EC key.

    Args:
        sign: see `Sign`.
        public_key: its public part.
    """

    def __init__(self, sign: Sign, public_key: ec.EllipticCurvePublicKey) -> None:
        self._sign = sign
        self._public_key = public_key

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public_key

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public_key.curve

    @property
    def key_size(self) -> int:
        return self._public_key.key_size

    def sign(self, data: Buffer, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """Return the signature in DER [RFC 3279 2.2.3]."""
        algorithm = signature_algorithm.algorithm
        assert isinstance(algorithm, hashes.HashAlgorithm)
        signature = self._sign(algorithm.name, bytes(data))
        middle = len(signature) // 2
        return encode_dss_signature(int.from_bytes(signature[:middle]), int.from_bytes(signature[middle:]))


class RsaPrivateKey(_InToken, rsa.RSAPrivateKey):
    """An RSA key, with PKCS #1 v1.5 padding [RFC 8017 8.2]: what the algorithms of the contract are.

    Args:
        sign: see `Sign`.
        public_key: its public part.
    """

    def __init__(self, sign: Sign, public_key: rsa.RSAPublicKey) -> None:
        self._sign = sign
        self._public_key = public_key

    def public_key(self) -> rsa.RSAPublicKey:
        return self._public_key

    @property
    def key_size(self) -> int:
        return self._public_key.key_size

    def sign(self, data: Buffer, padding: AsymmetricPadding, algorithm: Any) -> bytes:
        """Return the signature [RFC 8017 8.2].

        Raises:
            ValueError: another padding or hash.
        """
        if not isinstance(padding, PKCS1v15) or algorithm.name not in HASHES:
            raise ValueError("only PKCS #1 v1.5 with SHA-2 is supported")
        return self._sign(algorithm.name, bytes(data))
