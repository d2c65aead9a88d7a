"""A key in a device as a private-key object of cryptography's: what a CSR is signed with.

Each store adds how its device signs.
"""

from __future__ import annotations

from typing import Any, Generic, NoReturn, TypeVar

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import AsymmetricPadding, PKCS1v15

Buffer = bytes | bytearray | memoryview
Sign = TypeVar("Sign")
Public = TypeVar("Public", bound=ec.EllipticCurvePublicKey | rsa.RSAPublicKey)


class _InDevice(Generic[Sign, Public]):
    """A key that signs, and does nothing else.

    Args:
        sign: has the device sign.
        public_key: its public part.
    """

    def __init__(self, sign: Sign, public_key: Public) -> None:
        self._sign = sign
        self._public_key = public_key

    def public_key(self) -> Public:
        """Return the public key, without asking the device."""
        return self._public_key

    @property
    def key_size(self) -> int:
        """Bits of the curve, or of the modulus."""
        return self._public_key.key_size

    def _refused(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("a key in a device only signs")

    private_numbers = private_bytes = exchange = decrypt = _refused

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, _: Any) -> Any:
        return self


class EccKey(_InDevice[Sign, ec.EllipticCurvePublicKey], ec.EllipticCurvePrivateKey):
    """An EC key in a device."""

    @property
    def curve(self) -> ec.EllipticCurve:
        """Curve of the public key."""
        return self._public_key.curve


class RsaKey(_InDevice[Sign, rsa.RSAPublicKey], rsa.RSAPrivateKey):
    """An RSA key in a device."""


def hash_of(algorithm: ec.EllipticCurveSignatureAlgorithm) -> hashes.HashAlgorithm:
    """Return the hash of an ECDSA signature."""
    found = algorithm.algorithm
    assert isinstance(found, hashes.HashAlgorithm)
    return found


def refuse_other(padding: AsymmetricPadding) -> None:
    """Refuse another padding than PKCS #1 v1.5 [RFC 8017 8.2], which the contract's algorithms have.

    Raises:
        ValueError: as cryptography's own keys raise it.
    """
    if not isinstance(padding, PKCS1v15):
        raise ValueError(f"{padding.name} is not one of the contract's")  # noqa: TRY004 - see above
