"""A key in the TPM as a private-key object of cryptography's: what a CSR is signed with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import AsymmetricPadding, PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from tpm2_pytss.constants import TPM2_ALG
from tpm2_pytss.cryptography import tpm_ecc_private_key, tpm_rsa_private_key
from tpm2_pytss.types import TPM2B_PUBLIC, TPMS_SCHEME_HASH, TPMT_SIG_SCHEME, TPMT_SIGNATURE, TPMU_SIG_SCHEME

from stationkey.contract.profiles import SECP256R1, SECP521R1, KeyType, RsaModulus

Sign = Callable[[bytes, Any, Any], TPMT_SIGNATURE]
"""Signs data by a TPM_ALG_ID and one of cryptography's hashes."""

HASHES: Final[dict[str, Any]] = {"sha256": TPM2_ALG.SHA256, "sha384": TPM2_ALG.SHA384, "sha512": TPM2_ALG.SHA512}
_POINTS: Final[dict[KeyType, ec.EllipticCurve]] = {SECP256R1: ec.SECP256R1(), SECP521R1: ec.SECP521R1()}


class EccPrivateKey(tpm_ecc_private_key):  # type: ignore[misc] # untyped, like all of tpm2-pytss
    """tpm2-pytss's face of a loaded key towards cryptography, with the public part that is known already.

    The class it comes from asks the TPM for the public part, decodes it anew at each use, and looks at it again before
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
        # TPMT_SIGNATURE: two algorithm identifiers, then r and s [TPM 2.0 part 2, 11.2.4.2 and 11.3.4].
        return encode_dss_signature(*_two_numbers(signature.marshal()[4:]))


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
        return bytes(self._sign(data, TPM2_ALG.RSASSA, algorithm))


@cache
def signing_scheme(scheme: Any, hash_name: str) -> TPMT_SIG_SCHEME:
    """By a TPM_ALG_ID and the name that cryptography gives a hash."""
    if hash_name not in HASHES:
        raise ValueError(f"{hash_name} is not one of the contract's")
    details = TPMU_SIG_SCHEME(any=TPMS_SCHEME_HASH(hashAlg=HASHES[hash_name]))
    return TPMT_SIG_SCHEME(scheme=scheme, details=details)


def public_der(kind: KeyType, public: TPM2B_PUBLIC) -> bytes:
    """The subjectPublicKeyInfo of a key that the TPM made."""
    if isinstance(kind, RsaModulus):
        rsa_der: bytes = public.publicArea.to_der()
        return rsa_der
    point = ec.EllipticCurvePublicNumbers(*_two_numbers(public.publicArea.unique.ecc.marshal()), _POINTS[kind])
    return point.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _two_numbers(marshalled: bytes) -> tuple[int, int]:
    """Return two big-endian numbers, each after its length in two bytes: r and s, or the coordinates of a point.

    Reading them as attributes of tpm2-pytss takes ten times as long as marshalling the structure.
    """
    middle = 2 + int.from_bytes(marshalled[:2], "big")
    return int.from_bytes(marshalled[2:middle], "big"), int.from_bytes(marshalled[middle + 2 :], "big")
