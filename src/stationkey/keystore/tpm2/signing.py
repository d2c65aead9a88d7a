"""A key in the TPM as a private-key object of cryptography's: what a CSR is signed with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import AsymmetricPadding, PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from tpm2_pytss.constants import TPM2_ALG
from tpm2_pytss.cryptography import tpm_ecc_private_key, tpm_rsa_private_key
from tpm2_pytss.types import TPMS_SCHEME_HASH, TPMT_SIG_SCHEME, TPMU_SIG_SCHEME

from stationkey.contract.profiles import SECP256R1, SECP521R1, KeyType, RsaModulus
from stationkey.x509.csr import PublicKey

Sign = Callable[[bytes, Any, Any], bytes]
"""Signs data by a TPM_ALG_ID and one of cryptography's hashes; returns the TPMT_SIGNATURE, marshalled."""

HASHES: Final[dict[str, Any]] = {"sha256": TPM2_ALG.SHA256, "sha384": TPM2_ALG.SHA384, "sha512": TPM2_ALG.SHA512}
_POINTS: Final[dict[KeyType, ec.EllipticCurve]] = {SECP256R1: ec.SECP256R1(), SECP521R1: ec.SECP521R1()}


class EccPrivateKey(tpm_ecc_private_key):  # type: ignore[misc] # untyped, like all of tpm2-pytss
    """tpm2-pytss's face of a loaded key towards cryptography, with the public part that is known already.

    Its base class asks the TPM for the public part, decodes it at each use, and checks it again before
    it signs; that took a tenth of a request's time.
    """

    def __init__(self, sign: Sign, public_key: ec.EllipticCurvePublicKey) -> None:
        self._sign = sign
        self._public_key = public_key

    def public_key(self) -> ec.EllipticCurvePublicKey:
        """Known without asking the TPM."""
        return self._public_key

    @property
    def curve(self) -> ec.EllipticCurve:
        """Of the public key."""
        return self._public_key.curve

    def sign(self, data: bytes, signature_algorithm: ec.ECDSA) -> bytes:
        """DER [RFC 3279 2.2.3]."""
        signature = self._sign(data, TPM2_ALG.ECDSA, signature_algorithm.algorithm)
        # Two algorithm identifiers, then r and s [TPM 2.0 part 2, 11.3.2 and 11.3.4].
        return encode_dss_signature(*_two_numbers(signature[4:]))


class RsaPrivateKey(tpm_rsa_private_key):  # type: ignore[misc] # as above
    """The same for RSA, with PKCS #1 v1.5 padding [RFC 8017 8.2], as the contract's algorithms have it."""

    def __init__(self, sign: Sign, public_key: rsa.RSAPublicKey) -> None:
        self._sign = sign
        self._public_key = public_key

    def public_key(self) -> rsa.RSAPublicKey:
        """Known without asking the TPM."""
        return self._public_key

    @property
    def key_size(self) -> int:
        """Bits of the modulus."""
        return self._public_key.key_size

    def sign(self, data: bytes, padding: AsymmetricPadding, algorithm: hashes.HashAlgorithm) -> bytes:
        """As RFC 8017 8.2 has it."""
        if not isinstance(padding, PKCS1v15):
            raise ValueError(f"{padding.name} is not one of the contract's")  # noqa: TRY004 - as cryptography's own keys say it
        return self._sign(data, TPM2_ALG.RSASSA, algorithm)[6:]  # after two identifiers and the size [part 2, 11.3.1]


@cache
def signing_scheme(scheme: Any, hash_name: str) -> TPMT_SIG_SCHEME:
    """By a TPM_ALG_ID and the name that cryptography gives a hash."""
    if hash_name not in HASHES:
        raise ValueError(f"{hash_name} is not one of the contract's")
    details = TPMU_SIG_SCHEME(any=TPMS_SCHEME_HASH(hashAlg=HASHES[hash_name]))
    return TPMT_SIG_SCHEME(scheme=scheme, details=details)


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
    """Return two numbers, each after its length in two bytes: r and s, or the coordinates of a point.

    Reading them as attributes of tpm2-pytss takes ten times as long.
    """
    middle = 2 + _number(marshalled[:2])
    return _number(marshalled[2:middle]), _number(marshalled[middle + 2 :])


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")
