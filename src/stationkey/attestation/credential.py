"""A challenge that only one TPM can open, and only with one attestation key in it [TPM 2.0 part 1, 24].

An endorsement key cannot sign, but a secret can be encrypted to it: TPM2_MakeCredential, here in software, binds the
secret to the name of an attestation key. TPM2_ActivateCredential returns it only if both keys are in the same TPM. The
name is a hash over the attestation key's public area, so its attributes (such as restricted) are proved, too.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from stationkey.attestation.documents import SECRET_SIZE, Challenge, Secret
from stationkey.attestation.refusals import unsupported
from stationkey.attestation.structures import HASHES, PublicKey, describe_key, spki_of

NONCE_SIZE: Final = 32
_BLOCK: Final = 16
_PROOF_LABEL: Final = b"stationkey activation v1\0"


class _Kind(NamedTuple):
    """The common parameters of endorsement key templates of one key type [TCG EK Credential Profile 2.5, B.4]."""

    name_alg: str
    aes_bits: int


_KINDS: Final = {
    "RSA-2048": _Kind("sha256", 128),
    "RSA-3072": _Kind("sha384", 256),
    "RSA-4096": _Kind("sha384", 256),
    "secp256r1": _Kind("sha256", 128),
    "secp384r1": _Kind("sha384", 256),
    "secp521r1": _Kind("sha512", 256),
}


def make_challenge(ek: PublicKey, ak_name: bytes, *, believed: str) -> tuple[Challenge, Secret]:
    """Make a new challenge for the station, and the verifier's secret.

    Args:
        ek: the endorsement key; assumed to have the TCG's template for its key type.
        ak_name: name of a verified attestation key.
        believed: why `ek` is trusted as an endorsement key, for the verdict.

    Raises:
        NotVerified: no template of the TCG has a key of this kind.
    """
    secret, nonce = secrets.token_bytes(SECRET_SIZE), secrets.token_bytes(NONCE_SIZE)
    credential_blob, encrypted_secret = make_credential(ek, ak_name, secret)
    both = {"ak_name": ak_name, "ek": spki_of(ek), "nonce": nonce}
    challenge = Challenge(credential_blob=credential_blob, encrypted_secret=encrypted_secret, **both)
    return challenge, Secret(secret=secret, believed=believed, **both)


def make_credential(ek: PublicKey, ak_name: bytes, credential: bytes) -> tuple[bytes, bytes]:
    """Return the result of TPM2_MakeCredential: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET [part 3, 12.6].

    Raises:
        NotVerified: no template of the TCG has a key of this kind.
    """
    described = describe_key(ek)
    if described not in _KINDS:
        raise unsupported(f"no endorsement key of the TCG's templates is {described}")
    kind = _KINDS[described]
    seed, encrypted_seed = _share_seed(ek, kind)
    digest_size = hashlib.new(kind.name_alg).digest_size
    identity = _encrypt(_kdfa(kind, seed, b"STORAGE", ak_name, kind.aes_bits // 8), _sized(credential))
    integrity = hmac.digest(_kdfa(kind, seed, b"INTEGRITY", b"", digest_size), identity + ak_name, kind.name_alg)
    return _sized(_sized(integrity) + identity), _sized(encrypted_seed)


def activation(secret: bytes, attestation: bytes) -> bytes:
    """Return the proof that a challenge was opened: HMAC-SHA-256 of the TPMS_ATTEST by the secret.

    The evidence does not contain the secret, and the proof is valid for this evidence only.
    """
    return hmac.digest(secret, _PROOF_LABEL + attestation, "sha256")


def _share_seed(ek: PublicKey, kind: _Kind) -> tuple[bytes, bytes]:
    """Return a seed, and its encryption for the endorsement key [part 1, B.10.3 and C.6.3]."""
    size = hashlib.new(kind.name_alg).digest_size
    algorithm = HASHES[kind.name_alg]
    if isinstance(ek, rsa.RSAPublicKey):
        seed = secrets.token_bytes(size)
        # The terminating zero belongs to the label [part 1, B.4].
        oaep = padding.OAEP(padding.MGF1(algorithm), algorithm, b"IDENTITY\0")
        return seed, ek.encrypt(seed, oaep)
    ephemeral = ec.generate_private_key(ek.curve)
    here, there = (key.public_numbers() for key in (ephemeral.public_key(), ek))
    length = (ek.curve.key_size + 7) // 8
    here_x, here_y, there_x = (number.to_bytes(length, "big") for number in (here.x, here.y, there.x))
    # KDFe [part 1, 11.4.10.3] is the concatenation KDF of SP 800-56A.
    derive = ConcatKDFHash(algorithm, size, b"IDENTITY\0" + here_x + there_x)
    return derive.derive(ephemeral.exchange(ec.ECDH(), ek)), _sized(here_x) + _sized(here_y)


def _kdfa(kind: _Kind, key: bytes, label: bytes, context: bytes, size: int) -> bytes:
    """KDFa [part 1, 11.4.10.2]: SP 800-108 in counter mode."""
    return KBKDFHMAC(
        algorithm=HASHES[kind.name_alg],
        mode=Mode.CounterMode,
        length=size,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=label,
        context=context,
        fixed=None,
    ).derive(key)


def _encrypt(key: bytes, data: bytes) -> bytes:
    """Encrypt with AES-CFB and a zero initialisation vector; cryptography's CFB moves between its modules."""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - the block cipher alone, for the mode below
    last, encrypted = bytes(_BLOCK), b""
    for start in range(0, len(data), _BLOCK):
        mask = block.update(last)
        last = bytes(one ^ other for one, other in zip(data[start : start + _BLOCK], mask, strict=False))
        encrypted += last
    return encrypted


def _sized(data: bytes) -> bytes:
    """A TPM2B."""
    return len(data).to_bytes(2, "big") + data
