"""A key in a token as a private-key object of cryptography's: what a CSR is signed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import AsymmetricPadding, PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

Buffer = bytes | bytearray | memoryview
Sign = Callable[[bytes], bytes]
"""Signs a digest: by CKM_ECDSA, giving r and s; or a DigestInfo by CKM_RSA_PKCS [PKCS #11 6.3.12, 6.1.6]."""

_DIGEST_INFO: Final = {
    "sha256": bytes.fromhex("3031300d060960864801650304020105000420"),
    "sha384": bytes.fromhex("3041300d060960864801650304020205000430"),
    "sha512": bytes.fromhex("3051300d060960864801650304020305000440"),
}
"""DER before the digest [RFC 8017 9.2, note 1]."""


def _digest(data: bytes, algorithm: hashes.HashAlgorithm) -> bytes:
    hashing = hashes.Hash(algorithm)
    hashing.update(data)
    return hashing.finalize()


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
        signature = self._sign(_digest(bytes(data), algorithm))
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
        if not isinstance(padding, PKCS1v15) or algorithm.name not in _DIGEST_INFO:
            raise ValueError("only PKCS #1 v1.5 with SHA-2 is supported")
        return self._sign(_DIGEST_INFO[algorithm.name] + _digest(bytes(data), algorithm))
