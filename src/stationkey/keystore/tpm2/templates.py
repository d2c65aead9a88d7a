"""Templates of the objects that the TPM creates, marshalled [TPM 2.0 part 2, 12.2]."""

from __future__ import annotations

from functools import cache
from typing import Final

from cryptography.hazmat.primitives import hashes

from stationkey.contract.profiles import SECP256R1, SECP521R1, EllipticCurve, KeyType, RsaModulus

FIXED_TPM: Final = 1 << 1
FIXED_PARENT: Final = 1 << 4
SENSITIVE_DATA_ORIGIN: Final = 1 << 5
USER_WITH_AUTH: Final = 1 << 6
NO_DA: Final = 1 << 10
RESTRICTED: Final = 1 << 16
DECRYPT: Final = 1 << 17
SIGN: Final = 1 << 18
"""TPMA_OBJECT [part 2, 8.3]."""

KEY_ATTRIBUTES: Final = (
    FIXED_TPM  # cannot be duplicated to another TPM
    | FIXED_PARENT  # nor to another parent
    | SENSITIVE_DATA_ORIGIN  # made by the TPM, not imported
    | USER_WITH_AUTH
    # Without NODA, three power cuts while the key is in use lock the TPM.
    | NO_DA
    | SIGN
)
"""Attributes of every key made here; one with a policy has not USER_WITH_AUTH, or its authorisation value alone would
do."""

SRK_NEEDED: Final = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | USER_WITH_AUTH | RESTRICTED | DECRYPT
_SEALED: Final = FIXED_TPM | FIXED_PARENT | USER_WITH_AUTH | NO_DA

RSA: Final = 0x0001
_KEYEDHASH: Final = 0x0008
_SHA256: Final = 0x000B
_HASHES: Final[dict[int, type[hashes.HashAlgorithm]]] = {
    0x0004: hashes.SHA1,
    _SHA256: hashes.SHA256,
    0x000C: hashes.SHA384,
    0x000D: hashes.SHA512,
    0x0012: hashes.SM3,
    0x0027: hashes.SHA3_256,
    0x0028: hashes.SHA3_384,
    0x0029: hashes.SHA3_512,
}
_NULL: Final = b"\x00\x10"
ECC: Final = 0x0023
"""TPM_ALG_ID [part 2, 6.3]."""
_P256: Final = 0x0003
CURVES: Final[dict[KeyType, int]] = {SECP256R1: _P256, SECP521R1: 0x0005}
"""TPM_ECC_CURVE [part 2, 6.4]."""
_AES_128_CFB: Final = b"\x00\x06\x00\x80\x00\x43"
_NO_NUMBER: Final = b"\x00\x00"
_HEAD: Final = 2 + 2 + 2 + 4  # bytes before the policy in a TPM2B_PUBLIC: size, type, name algorithm, attributes


def srk() -> bytes:
    """TPM2B_PUBLIC of an ECC P-256 storage key by the template of the TCG [TPM v2.0 Provisioning Guidance 7.5.1]."""
    return sized(_area(ECC, SRK_NEEDED | NO_DA, b"", _ecc_parameters(_P256, _AES_128_CFB) + 2 * _NO_NUMBER))


@cache
def key(kind: KeyType, policy: bytes = b"") -> bytes:
    """TPM2B_PUBLIC, or TPM2B_TEMPLATE, of a signing key.

    Its scheme stays NULL: one fixed to ECDSA with SHA-512 fails in TLS 1.2.

    Args:
        kind: curve or RSA size.
        policy: digest of the policy that its use needs; empty for none.
    """
    elliptic = isinstance(kind, EllipticCurve)
    unique = 2 * _NO_NUMBER if elliptic else _NO_NUMBER
    attributes = _bound(KEY_ATTRIBUTES, policy)
    return sized(_area(ECC if elliptic else RSA, attributes, policy, key_parameters(kind) + unique))


def sealed(policy: bytes = b"") -> bytes:
    """TPM2B_PUBLIC of data that the TPM gives out again, where the policy lets it."""
    return sized(_area(_KEYEDHASH, _bound(_SEALED, policy), policy, _NULL + _NO_NUMBER))


def sensitive(*, auth: bytes = b"", data: bytes = b"") -> bytes:
    """TPM2B_SENSITIVE_CREATE: authorisation value of a new object, and what to seal in it."""
    return sized(sized(auth) + sized(data))


def key_parameters(kind: KeyType) -> bytes:
    """TPMU_PUBLIC_PARMS of a signing key."""
    if isinstance(kind, EllipticCurve):
        return _ecc_parameters(CURVES[kind], _NULL)
    # No symmetric algorithm, no scheme; an exponent of 0 stands for 65537 [TPM 2.0 part 2, 12.2.3.5].
    return _NULL + _NULL + _number(kind.bits) + bytes(4)


def rsa_parameters(kind: RsaModulus) -> bytes:
    """TPMT_PUBLIC_PARMS of an RSA key."""
    return _number(RSA) + key_parameters(kind)


def is_key(kind: KeyType, public: bytes) -> bool:
    """Whether a TPM2B_PUBLIC is that of a key made by `key`, without a policy."""
    numbers = 2 if isinstance(kind, EllipticCurve) else 1
    head = key(kind)[2 : -2 * numbers]
    rest = public[2 + len(head) :]
    for _ in range(numbers):
        rest = rest[2 + int.from_bytes(rest[:2], "big") :] if is_sized(rest, exactly=False) else b"?"
    return is_sized(public) and public.startswith(head, 2) and not rest


def attributes_of(public: bytes) -> int:
    """TPMA_OBJECT of a TPM2B_PUBLIC."""
    return int.from_bytes(public[6:_HEAD], "big")


def unlike_srk(public: bytes) -> str:
    """Return what the key of a TPM2B_PUBLIC is instead of an ECC P-256 storage key; empty if it is one."""
    parameters = public[_HEAD + 2 + int.from_bytes(public[_HEAD : _HEAD + 2], "big") :]
    # A storage key has a symmetric algorithm, of six bytes, and no scheme. With its attributes, no TPM lets it sign.
    is_ours = parameters[8:10] == _number(_P256) and attributes_of(public) & SRK_NEEDED == SRK_NEEDED
    if public[2:4] == _number(ECC) and is_ours:
        return ""
    from stationkey.keystore.tpm2.esapi import words_of  # noqa: PLC0415 - see there

    return words_of(public, needed=SRK_NEEDED)


def name_of(public: bytes) -> bytes:
    """The name of an object by its TPM2B_PUBLIC [part 1, 16].

    Raises:
        ValueError: unknown name algorithm.
    """
    algorithm = public[4:6]
    kind = _HASHES.get(int.from_bytes(algorithm, "big"))
    if kind is None:
        raise ValueError("unknown name algorithm")
    digest = hashes.Hash(kind())
    digest.update(public[2:])
    return algorithm + digest.finalize()


def is_sized(data: bytes, *, exactly: bool = True) -> bool:
    """Whether data is, or begins with, a TPM2B."""
    end = 2 + int.from_bytes(data[:2], "big")
    return len(data) == end if exactly else len(data) >= end


def sized(data: bytes) -> bytes:
    """Data after its length in two bytes: a TPM2B."""
    return len(data).to_bytes(2, "big") + data


def _area(kind: int, attributes: int, policy: bytes, rest: bytes) -> bytes:
    """TPMT_PUBLIC of a type, by parameters and unique identifier."""
    return _number(kind) + _number(_SHA256) + attributes.to_bytes(4, "big") + sized(policy) + rest


def _bound(attributes: int, policy: bytes) -> int:
    return attributes & ~USER_WITH_AUTH if policy else attributes


def _ecc_parameters(curve: int, symmetric: bytes) -> bytes:
    """Symmetric algorithm, no scheme, curve, no key derivation."""
    return symmetric + _NULL + _number(curve) + _NULL


def _number(value: int) -> bytes:
    return value.to_bytes(2, "big")
