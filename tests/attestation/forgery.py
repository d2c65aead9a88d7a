"""A TPM's structures made in software: evidence as a TPM would give it, and as somebody would forge it.

Written from the tables of the specification, with nothing of the code that reads them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from stationkey.attestation.documents import AttestationKey, EndorsementKey, Evidence

# [TPM 2.0 part 2, 8.3.2]
FIXED_TPM, ST_CLEAR, FIXED_PARENT, SENSITIVE_DATA_ORIGIN = 1 << 1, 1 << 2, 1 << 4, 1 << 5
USER_WITH_AUTH, NO_DA, ENCRYPTED_DUPLICATION = 1 << 6, 1 << 10, 1 << 11
RESTRICTED, DECRYPT, SIGN, X509_SIGN = 1 << 16, 1 << 17, 1 << 18, 1 << 19

KEY_ATTRIBUTES = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | USER_WITH_AUTH | NO_DA | SIGN
AK_ATTRIBUTES = KEY_ATTRIBUTES | RESTRICTED

SHA1, SHA256, SHA384, SHA512, NULL = 0x0004, 0x000B, 0x000C, 0x000D, 0x0010
RSASSA, RSAPSS, ECDSA = 0x0014, 0x0016, 0x0018
HASHES = {SHA1: "sha1", SHA256: "sha256", SHA384: "sha384", SHA512: "sha512"}
SIGNING: dict[int, hashes.HashAlgorithm] = {
    SHA1: hashes.SHA1(),
    SHA256: hashes.SHA256(),
    SHA384: hashes.SHA384(),
    SHA512: hashes.SHA512(),
}
CURVES = {"secp256r1": 0x0003, "secp384r1": 0x0004, "secp521r1": 0x0005, "secp224r1": 0x0002}
GENERATED, ATTEST_CERTIFY, ATTEST_QUOTE = 0xFF544347, 0x8017, 0x8018
ENDORSEMENT = 0x4000000B
LABEL = b"stationkey attestation v1\0"

Private = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass
class Object:
    """An object as a TPM would have it.

    Attributes:
        scheme: identifiers of signing scheme and hash, or None.
        symmetric: what protects its children, as it stands in the public area.
    """

    private: Private = field(default_factory=p256)
    attributes: int = KEY_ATTRIBUTES
    name_alg: int = SHA256
    policy: bytes = b""
    scheme: tuple[int, int] | None = None
    symmetric: bytes = struct.pack(">H", NULL)

    @property
    def public_area(self) -> bytes:
        """TPMT_PUBLIC."""
        scheme = struct.pack(">H", NULL) if self.scheme is None else struct.pack(">HH", *self.scheme)
        kind = 0x0023 if isinstance(self.private, ec.EllipticCurvePrivateKey) else 0x0001
        begun = struct.pack(">HHI", kind, self.name_alg, self.attributes) + sized(self.policy) + self.symmetric + scheme
        if isinstance(self.private, rsa.RSAPrivateKey):
            modulus = self.private.public_key().public_numbers().n
            return begun + struct.pack(">HI", self.private.key_size, 0) + sized(big(modulus, self.private.key_size))
        point, curve = self.private.public_key().public_numbers(), self.private.curve
        unique = sized(big(point.x, curve.key_size)) + sized(big(point.y, curve.key_size))
        return begun + struct.pack(">HH", CURVES[curve.name], NULL) + unique

    @property
    def public(self) -> bytes:
        """TPM2B_PUBLIC."""
        return sized(self.public_area)

    @property
    def name(self) -> bytes:
        return struct.pack(">H", self.name_alg) + hashlib.new(HASHES[self.name_alg], self.public_area).digest()

    def qualified_name(self, parent: bytes) -> bytes:
        return struct.pack(">H", self.name_alg) + hashlib.new(HASHES[self.name_alg], parent + self.name).digest()

    @property
    def spki(self) -> bytes:
        return self.private.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def pem(self) -> bytes:
        return self.private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def sign(self, data: bytes, scheme: tuple[int, int] | None = None) -> bytes:
        """TPMT_SIGNATURE."""
        scheme = scheme or self.scheme
        assert scheme is not None
        algorithm = SIGNING[scheme[1]]
        begun = struct.pack(">HH", *scheme)
        if isinstance(self.private, ec.EllipticCurvePrivateKey):
            numbers = decode_dss_signature(self.private.sign(data, ec.ECDSA(algorithm)))
            return begun + b"".join(sized(big(number, self.private.curve.key_size)) for number in numbers)
        how = padding.PKCS1v15() if scheme[0] == RSASSA else padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
        return begun + sized(self.private.sign(data, how, algorithm))


def big(number: int, bits: int) -> bytes:
    return number.to_bytes((bits + 7) // 8, "big")


def an_ak(
    private: Private | None = None,
    *,
    scheme: tuple[int, int] = (ECDSA, SHA256),
    attributes: int = AK_ATTRIBUTES,
    name_alg: int = SHA256,
) -> Object:
    """An attestation key, as it should be but for what is said otherwise."""
    return Object(private or p256(), scheme=scheme, attributes=attributes, name_alg=name_alg)


def attest(
    key: Object,
    ak: Object,
    *,
    nonce: bytes | None = None,
    magic: int = GENERATED,
    kind: int = ATTEST_CERTIFY,
    name: bytes | None = None,
    signer: bytes | None = None,
    safe: int = 1,
    behind: bytes = b"",
) -> bytes:
    """TPMS_ATTEST of TPM2_Certify, with whatever somebody would write into it."""
    signer = ak.qualified_name(struct.pack(">I", ENDORSEMENT)) if signer is None else signer
    extra = b"" if nonce is None else hashlib.sha256(LABEL + nonce).digest()
    clock = struct.pack(">QIIB", 4711, 1, 0, safe)
    name = key.name if name is None else name
    attested = sized(name) + sized(key.qualified_name(b"some parent"))
    return struct.pack(">IH", magic, kind) + sized(signer) + sized(extra) + clock + bytes(8) + attested + behind


def evidence(
    key: Object | None = None,
    ak: Object | None = None,
    *,
    attestation: Callable[[Object, Object], bytes] = attest,
    signature: Callable[[Object, bytes], bytes] = Object.sign,
    eks: tuple[EndorsementKey, ...] = (),
    about: dict[str, str] | None = None,
) -> Evidence:
    """Evidence that is right but for what is said otherwise."""
    key, ak = key or Object(), ak or an_ak()
    statement = attestation(key, ak)
    return Evidence(
        key_public=key.public,
        attestation=statement,
        signature=signature(ak, statement),
        attestation_key=AttestationKey(public=ak.public, endorsement_keys=eks),
        about=about or {},
    )
