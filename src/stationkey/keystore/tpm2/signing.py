"""A key in the TPM as a private-key object of cryptography's: what a CSR is signed with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import AsymmetricPadding
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from stationkey.contract.profiles import SECP256R1, SECP521R1, KeyType, RsaModulus
from stationkey.keystore.signing import Buffer, EccKey, RsaKey, hash_of, refuse_other
from stationkey.x509.csr import PublicKey

Sign = Callable[[Buffer, int, hashes.HashAlgorithm], bytes]
"""Signs data by a TPM_ALG_ID and one of cryptography's hashes; returns the TPMT_SIGNATURE, marshalled."""

RSASSA: Final = 0x0014
ECDSA: Final = 0x0018
HASHES: Final[dict[str, int]] = {"sha256": 0x000B, "sha384": 0x000C, "sha512": 0x000D}
"""TPM_ALG_ID [TPM 2.0 part 2, 6.3]."""
_POINTS: Final[dict[KeyType, ec.EllipticCurve]] = {SECP256R1: ec.SECP256R1(), SECP521R1: ec.SECP521R1()}


class EccPrivateKey(EccKey[Sign]):
    """An EC key in the TPM."""

    def sign(self, data: Buffer, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """Return the signature in DER [RFC 3279 2.2.3]."""
        signature = self._sign(data, ECDSA, hash_of(signature_algorithm))
        # Two algorithm identifiers, then r and s [TPM 2.0 part 2, 11.3.2 and 11.3.4].
        return encode_dss_signature(*_two_numbers(signature[4:]))


class RsaPrivateKey(RsaKey[Sign]):
    """An RSA key in the TPM."""

    def sign(self, data: Buffer, padding: AsymmetricPadding, algorithm: Any) -> bytes:
        """Return the signature [RFC 8017 8.2]."""
        refuse_other(padding)
        return self._sign(data, RSASSA, algorithm)[6:]  # after two identifiers and the size [part 2, 11.3.1]


@cache
def signing_scheme(scheme: int, hash_name: str) -> bytes:
    """TPMT_SIG_SCHEME by a TPM_ALG_ID and the name that cryptography gives a hash [TPM 2.0 part 2, 11.2.1.5]."""
    if hash_name not in HASHES:
        raise ValueError(f"{hash_name} is not one of the contract's")
    return scheme.to_bytes(2, "big") + HASHES[hash_name].to_bytes(2, "big")


def public_key(kind: KeyType, public: bytes) -> PublicKey:
    """The public key in a TPM2B_PUBLIC [TPM 2.0 part 2, 12.2.4 and 12.2.5] made by `templates.key`.

    Raises:
        ValueError: it is not of this type.
    """
    at = 12 + int.from_bytes(public[10:12], "big")  # after size, type, name algorithm, attributes and policy
    if isinstance(kind, RsaModulus):  # symmetric, scheme, bits, exponent, modulus; an exponent of 0 stands for 65537
        exponent, modulus = public[at + 6 : at + 10], public[at + 12 :]
        return rsa.RSAPublicNumbers(_number(exponent) or 65537, _number(modulus)).public_key()
    point = _two_numbers(public[at + 8 :])  # after symmetric, scheme, curve and KDF
    return ec.EllipticCurvePublicNumbers(*point, _POINTS[kind]).public_key()


def _two_numbers(marshalled: bytes) -> tuple[int, int]:
    """Return two numbers, each after its length in two bytes: r and s, or the coordinates of a point."""
    middle = 2 + _number(marshalled[:2])
    return _number(marshalled[2:middle]), _number(marshalled[middle + 2 :])


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")
