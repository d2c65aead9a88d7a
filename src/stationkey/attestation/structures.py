"""Strict readers of the TPM structures in evidence [TPM 2.0 part 2].

Supported are names by SHA-2, P-256 to P-521, and RSA of 2048 to 4096 bits. Everything else is refused with a message.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from stationkey.attestation.refusals import MAX_STRUCTURE, malformed, unsupported
from stationkey.errors import NotVerified

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
Hash = hashes.SHA256 | hashes.SHA384 | hashes.SHA512

GENERATED: Final = 0xFF544347
"""TPM_GENERATED_VALUE [part 2, 6.2]: a restricted key signs nothing from outside that begins so."""

_ATTEST_CERTIFY: Final = 0x8017
_NULL: Final = 0x0010
_RSA: Final = 0x0001
_ECC: Final = 0x0023
_AES: Final = 0x0006
_CFB: Final = 0x0043

HASHES: Final[dict[str, Hash]] = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}
"""cryptography's hash by hashlib's name."""
_HASH_NAMES: Final = {0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
_SCHEMES: Final = {0x0014: "RSASSA", 0x0016: "RSAPSS", 0x0018: "ECDSA"}
_CURVES: Final[dict[int, ec.EllipticCurve]] = {0x0003: ec.SECP256R1(), 0x0004: ec.SECP384R1(), 0x0005: ec.SECP521R1()}
_RSA_BITS: Final = range(2048, 4097)
_EXPONENT: Final = 65537  # 0 stands for it [part 2, 12.2.3.5]


class Attribute(IntFlag):
    """TPMA_OBJECT [part 2, 8.3.2]."""

    FIXED_TPM = 1 << 1
    ST_CLEAR = 1 << 2
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    NO_DA = 1 << 10
    ENCRYPTED_DUPLICATION = 1 << 11
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18
    X509_SIGN = 1 << 19


WORDS: Final = {
    Attribute.FIXED_TPM: "fixedTPM",
    Attribute.ST_CLEAR: "stClear",
    Attribute.FIXED_PARENT: "fixedParent",
    Attribute.SENSITIVE_DATA_ORIGIN: "sensitiveDataOrigin",
    Attribute.USER_WITH_AUTH: "userWithAuth",
    Attribute.ADMIN_WITH_POLICY: "adminWithPolicy",
    Attribute.NO_DA: "noDA",
    Attribute.ENCRYPTED_DUPLICATION: "encryptedDuplication",
    Attribute.RESTRICTED: "restricted",
    Attribute.DECRYPT: "decrypt",
    Attribute.SIGN: "sign",
    Attribute.X509_SIGN: "x509sign",
}
"""The specification's own spelling."""
_KNOWN_ATTRIBUTES: Final = sum(WORDS)


@dataclass(frozen=True, slots=True)
class Scheme:
    """A signing scheme: ``ECDSA``, ``RSASSA`` or ``RSAPSS``, and hashlib's name of the hash."""

    name: str
    hash_name: str

    def __str__(self) -> str:
        return f"{self.name} with {self.hash_name.upper().replace('SHA', 'SHA-')}"


@dataclass(frozen=True, slots=True)
class Public:
    """The public area of an object, TPMT_PUBLIC [part 2, 12.2.4].

    Attributes:
        marshalled: the whole area, as the TPM hashes it.
        name_alg: hashlib's name of the hash of its name.
        attributes: see `Attribute`.
        policy: digest of its authorisation policy, or empty.
        symmetric_bits: size of the AES key by which a storage or endorsement key protects its children, or None.
        scheme: its signing scheme, or None if each signature chooses.
        key: the public key.
    """

    marshalled: bytes
    name_alg: str
    attributes: Attribute
    policy: bytes
    symmetric_bits: int | None
    scheme: Scheme | None
    key: PublicKey

    @property
    def name(self) -> bytes:
        """The object's name [part 1, 16]: the hash's identifier, and the hash of the public area."""
        return self.marshalled[2:4] + hashlib.new(self.name_alg, self.marshalled).digest()

    @property
    def spki(self) -> bytes:
        """Its subjectPublicKeyInfo in DER, as a CSR and a certificate have it."""
        return spki_of(self.key)

    def qualified_name(self, parent: bytes) -> bytes:
        """Its name under a parent, which is a hierarchy's handle or a qualified name [part 1, 26.5]."""
        return self.marshalled[2:4] + hashlib.new(self.name_alg, parent + self.name).digest()

    def lacking(self, needed: Attribute) -> str:
        """Return the missing attributes, as text; empty if none is missing."""
        return words_of(needed & ~self.attributes)


@dataclass(frozen=True, slots=True)
class Attest:
    """What TPM2_Certify states and the attestation key signs, TPMS_ATTEST [part 2, 10.12.12].

    Attributes:
        qualified_signer: qualified name of the attestation key.
        extra_data: the verifier's data.
        name: name of the certified key.
    """

    qualified_signer: bytes
    extra_data: bytes
    name: bytes


def words_of(attributes: Attribute) -> str:
    """Return the names of the attributes that are set."""
    return ", ".join(word for attribute, word in WORDS.items() if attribute in attributes)


def spki_of(key: PublicKey) -> bytes:
    """The subjectPublicKeyInfo of a public key in DER."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def kind_of(spki: bytes) -> str | None:
    """Describe a subjectPublicKeyInfo as `describe_key` does; None if it is invalid or of another type."""
    try:
        key: object = serialization.load_der_public_key(spki)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return describe_key(key) if isinstance(key, PublicKey) else None


def describe_key(key: PublicKey) -> str:
    """Return its type: ``secp256r1``, ``RSA-3072``."""
    return key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else f"RSA-{key.key_size}"


class Reader:
    """Reads a structure from beginning to end.

    Args:
        data: the bytes.
        what: their name in a refusal.
    """

    def __init__(self, data: bytes, what: str) -> None:
        if len(data) > MAX_STRUCTURE:
            raise malformed(f"{what} is too large: {len(data)} bytes")
        self._data = data
        self._at = 0
        self._what = what

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        part = self._data[self._at : self._at + count]
        if len(part) < count:
            raise malformed(f"{self._what} ends too early")
        self._at += count
        return part

    def number(self, size: int) -> int:
        """Return a big-endian number of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def sized(self, most: int) -> bytes:
        """Return a buffer after its length in two bytes (TPM2B), of at most `most` bytes."""
        size = self.number(2)
        if size > most:
            raise malformed(f"{self._what} has a field of {size} bytes; the maximum is {most}")
        return self.take(size)

    def hash_name(self) -> str:
        """Return a hash of the SHA-2 family by its identifier."""
        identifier = self.number(2)
        if identifier not in _HASH_NAMES:
            raise unsupported(f"{self._what} names the hash {identifier:#06x}, which is not SHA-2")
        return _HASH_NAMES[identifier]

    def end(self) -> None:
        """Refuse trailing bytes."""
        if self._at != len(self._data):
            raise malformed(f"{self._what} has {len(self._data) - self._at} bytes too many")


def unwrap(buffer: bytes, what: str) -> bytes:
    """Return the content of a TPM2B.

    Raises:
        NotVerified: its length is not that of its content.
    """
    reader = Reader(buffer, what)
    content = reader.sized(MAX_STRUCTURE)
    reader.end()
    return content


def read_public(buffer: bytes, what: str) -> Public:
    """Read a TPM2B_PUBLIC.

    Raises:
        NotVerified: it is invalid, or of an unsupported key.
    """
    marshalled = unwrap(buffer, what)
    reader = Reader(marshalled, what)
    kind = reader.number(2)
    if kind not in {_RSA, _ECC}:
        raise unsupported(f"{what} is of the type {kind:#06x}, which is neither RSA nor ECC")
    name_alg = reader.hash_name()
    bits = reader.number(4)
    if bits & ~_KNOWN_ATTRIBUTES:
        raise unsupported(f"{what} has the attributes {bits:#010x} with unknown bits")
    policy = reader.sized(64)
    if policy and len(policy) != hashlib.new(name_alg).digest_size:
        raise malformed(f"{what} has a policy of {len(policy)} bytes, which is not a {name_alg} digest")
    symmetric_bits = _read_symmetric(reader, what)
    scheme = _read_scheme(reader, what)
    key = _read_rsa(reader, what) if kind == _RSA else _read_ecc(reader, what)
    reader.end()
    return Public(marshalled, name_alg, Attribute(bits), policy, symmetric_bits, scheme, key)


def _read_symmetric(reader: Reader, what: str) -> int | None:
    """TPMT_SYM_DEF_OBJECT [part 2, 11.1.7]: AES in CFB, or none."""
    algorithm = reader.number(2)
    if algorithm == _NULL:
        return None
    bits, mode = reader.number(2), reader.number(2)
    if algorithm != _AES or bits not in {128, 192, 256} or mode != _CFB:
        raise unsupported(f"{what} protects its children with something other than AES in CFB")
    return bits


def _read_scheme(reader: Reader, what: str) -> Scheme | None:
    """TPMT_RSA_SCHEME or TPMT_ECC_SCHEME [part 2, 11.2.4.2, 11.2.5.6], of the signing ones."""
    scheme = reader.number(2)
    if scheme == _NULL:
        return None
    if scheme not in _SCHEMES:
        raise unsupported(f"{what} has the scheme {scheme:#06x}, which is not ECDSA, RSASSA or RSAPSS")
    return Scheme(_SCHEMES[scheme], reader.hash_name())


def _read_rsa(reader: Reader, what: str) -> rsa.RSAPublicKey:
    bits, exponent = reader.number(2), reader.number(4) or _EXPONENT
    modulus = reader.sized(512)
    number = int.from_bytes(modulus, "big")
    if bits not in _RSA_BITS or exponent != _EXPONENT:
        raise unsupported(f"{what} is an RSA key of {bits} bits with the exponent {exponent}")
    if len(modulus) * 8 != bits or number.bit_length() != bits:
        raise malformed(f"{what} has a modulus of another size than {bits} bits")
    try:
        return rsa.RSAPublicNumbers(exponent, number).public_key()
    except ValueError:
        raise malformed(f"{what} is not an RSA key") from None


def _read_ecc(reader: Reader, what: str) -> ec.EllipticCurvePublicKey:
    curve_id = reader.number(2)
    if curve_id not in _CURVES:
        raise unsupported(f"{what} is on the curve {curve_id:#06x}, which is not P-256, P-384 or P-521")
    curve = _CURVES[curve_id]
    if reader.number(2) != _NULL:
        raise unsupported(f"{what} has a key derivation scheme")
    size = (curve.key_size + 7) // 8
    x, y = (int.from_bytes(reader.sized(size), "big") for _ in range(2))
    try:
        return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except ValueError:
        raise malformed(f"{what} is not a point on {curve.name}") from None


def read_attest(data: bytes) -> Attest:
    """Read a TPMS_ATTEST of TPM2_Certify.

    Raises:
        NotVerified: it is invalid.
    """
    reader = Reader(data, "the attestation")
    if reader.number(4) != GENERATED:
        raise NotVerified(
            "the attestation does not begin with TPM_GENERATED: it is not a TPM's own statement",
            reason="attest_not_of_a_tpm",
        )
    if (kind := reader.number(2)) != _ATTEST_CERTIFY:
        raise NotVerified(
            f"the attestation is of the type {kind:#06x}, and not of TPM2_Certify", reason="attest_of_another_type"
        )
    qualified_signer, extra_data = reader.sized(66), reader.sized(66)
    reader.take(8 + 4 + 4)  # clock, resetCount, restartCount
    if reader.number(1) > 1:
        raise malformed("the attestation has an invalid clock state")
    reader.take(8)  # firmwareVersion
    name, _qualified_name = reader.sized(66), reader.sized(66)
    reader.end()
    return Attest(qualified_signer, extra_data, name)


def check_signature(signer: Public, signature: bytes, data: bytes) -> Scheme:
    """Verify a TPMT_SIGNATURE [part 2, 11.3.4] by the signer's own scheme, and no other.

    Raises:
        NotVerified: it does not verify, or is of another scheme.
    """
    reader = Reader(signature, "the signature")
    scheme = _read_scheme(reader, "the signature")
    if scheme is None or scheme != signer.scheme:
        raise NotVerified(
            f"the signature has the scheme {scheme or 'NULL'}, the attestation key {signer.scheme}",
            reason="attest_signature_invalid",
        )
    algorithm = HASHES[scheme.hash_name]
    try:
        if isinstance(signer.key, ec.EllipticCurvePublicKey):
            if scheme.name != "ECDSA":
                raise malformed(f"the attestation key is ECC, and its scheme is {scheme}")
            size = (signer.key.curve.key_size + 7) // 8
            r, s = (int.from_bytes(reader.sized(size), "big") for _ in range(2))
            reader.end()
            signer.key.verify(encode_dss_signature(r, s), data, ec.ECDSA(algorithm))
        else:
            if scheme.name == "ECDSA":
                raise malformed(f"the attestation key is RSA, and its scheme is {scheme}")
            value = reader.sized(512)
            reader.end()
            signer.key.verify(value, data, _padding(scheme), algorithm)
    except (InvalidSignature, ValueError):
        raise NotVerified(
            "the signature is not the attestation key's over this attestation", reason="attest_signature_invalid"
        ) from None
    return scheme


def _padding(scheme: Scheme) -> padding.AsymmetricPadding:
    if scheme.name == "RSASSA":
        return padding.PKCS1v15()
    # The TPM chooses the length of the salt [part 1, B.7].
    return padding.PSS(padding.MGF1(HASHES[scheme.hash_name]), padding.PSS.AUTO)
