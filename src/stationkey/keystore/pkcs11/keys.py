"""A key in a token, with an open session: how it is made, found, used and destroyed."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pkcs11 import (
    Attribute,
    AttributeSensitive,
    AttributeTypeInvalid,
    AttributeValueInvalid,
    DeviceMemory,
    KeyType,
    Mechanism,
    MechanismFlag,
    NoSuchKey,
    ObjectClass,
    PKCS11Error,
    TemplateInconsistent,
)
from pkcs11.constants import DEFAULT
from pkcs11.util.ec import encode_named_curve_parameters

from stationkey.contract.profiles import ALGORITHMS, SECP256R1, SECP521R1, Algorithm, EllipticCurve
from stationkey.contract.profiles import KeyType as Kind
from stationkey.errors import KeyStoreError, Scope
from stationkey.keystore.pkcs11 import errors
from stationkey.keystore.pkcs11.inventory import ID_LENGTH, LABEL
from stationkey.keystore.pkcs11.signing import EccPrivateKey, RsaPrivateKey, Sign
from stationkey.x509.csr import HASHES, PrivateKey, PublicKey

CURVES: Final[dict[Kind, ec.EllipticCurve]] = {SECP256R1: ec.SECP256R1(), SECP521R1: ec.SECP521R1()}
_OCTET_STRING: Final = 0x04
_RSA: Final = {
    "sha256": (Mechanism.SHA256_RSA_PKCS, bytes.fromhex("3031300d060960864801650304020105000420")),
    "sha384": (Mechanism.SHA384_RSA_PKCS, bytes.fromhex("3041300d060960864801650304020205000430")),
    "sha512": (Mechanism.SHA512_RSA_PKCS, bytes.fromhex("3051300d060960864801650304020305000440")),
}
"""By hash: the mechanism, and for a token without it the DER before the digest, for CKM_RSA_PKCS [RFC 8017 9.2]."""
_BORN_INSIDE: Final = {
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.LOCAL: True,
    Attribute.ALWAYS_SENSITIVE: True,
    Attribute.NEVER_EXTRACTABLE: True,
}
"""What a key has to say of itself [PKCS #11 4.9]."""
_USES: Final = {
    Attribute.SIGN_RECOVER: False,
    Attribute.DECRYPT: False,
    Attribute.UNWRAP: False,
    Attribute.DERIVE: False,
}
"""What a key is not for. Some modules refuse attributes that they do not know, so these are left out if need be."""


def loaded(public: bytes) -> PublicKey:
    """Return the public key of a subjectPublicKeyInfo."""
    return serialization.load_der_public_key(public)  # type: ignore[return-value] # EC or RSA: this store made it


def private_key_of(public_key: PublicKey, sign: Sign) -> PrivateKey:
    """Return a private-key object of cryptography's that signs by `sign`."""
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        return EccPrivateKey(sign, public_key)
    return RsaPrivateKey(sign, public_key)


def mechanism_for(kind: Kind, hash_name: str, present: Collection[Any]) -> Mechanism:
    """Return what a key signs with.

    CKM_RSA_PKCS is the second choice: in tpm2-pkcs11 it needs a key that also decrypts.
    """
    if isinstance(kind, EllipticCurve):
        return Mechanism.ECDSA
    return _RSA[hash_name][0] if _RSA[hash_name][0] in present else Mechanism.RSA_PKCS


def _objects(session: Any, identifier: bytes, kind: ObjectClass | None = None) -> list[Any]:
    """Return our objects with a CKA_ID. The label is asked for too: no other program's object is touched."""
    wanted: dict[Attribute, Any] = {Attribute.ID: identifier, Attribute.LABEL: LABEL.format(identifier.hex())}
    if kind is not None:
        wanted[Attribute.CLASS] = kind
    return list(session.get_objects(wanted))


def find_private(session: Any, *, identifier: bytes) -> Any:
    """Return the private key with a CKA_ID.

    Raises:
        NoSuchKey: it is missing, or there are several.
    """
    found = _objects(session, identifier, ObjectClass.PRIVATE_KEY)
    if len(found) != 1:
        raise NoSuchKey
    return found[0]


def sign(session: Any, identifier: bytes, kind: Kind, hash_name: str, data: bytes) -> bytes:
    """Sign data with the key with a CKA_ID; see `stationkey.keystore.pkcs11.signing.Sign`."""
    private = find_private(session, identifier=identifier)
    mechanism = mechanism_for(kind, hash_name, session.token.slot.get_mechanisms())
    if mechanism is Mechanism.ECDSA:
        data = hashlib.new(hash_name, data).digest()
    elif mechanism is Mechanism.RSA_PKCS:
        data = _RSA[hash_name][1] + hashlib.new(hash_name, data).digest()
    return bytes(private.sign(data, mechanism=mechanism))


def try_out(session: Any, *, kind: Kind, algorithm: Algorithm) -> None:
    """Make a key of the session's, sign with it, and destroy it.

    Raises:
        KeyStoreError: see `generate` and `prove`.
    """
    identifier = secrets.token_bytes(ID_LENGTH)
    try:
        public = generate(session, kind=kind, identifier=identifier, store=False)
        prove(session, identifier=identifier, kind=kind, public=public, algorithm=algorithm)
    finally:
        with suppress(PKCS11Error):  # the token that has lost the session has lost its objects
            destroy(session, identifier=identifier)


def prove(session: Any, *, identifier: bytes, kind: Kind, public: bytes, algorithm: Algorithm) -> None:
    """Sign a CSR with a key just made: some modules make keys that they cannot sign with.

    Raises:
        KeyStoreError: this one does.
    """
    private_key = private_key_of(loaded(public), partial(sign, session, identifier, kind))
    empty = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    wrong = "the signature is wrong"
    try:
        if empty.sign(private_key, HASHES[ALGORITHMS[algorithm].hash_name]).is_signature_valid:
            return
    except errors.LOST:
        raise
    except PKCS11Error as error:
        wrong = type(error).__name__
    raise errors.UNFIT.error(f"{kind} keys can be made, but do not sign: {wrong}")


def generate(session: Any, *, kind: Kind, identifier: bytes, store: bool = True) -> bytes:
    """Make a key and return its subjectPublicKeyInfo.

    Raises:
        KeyStoreError: the key could have left the token, or cannot be shown not to have.
    """
    label = LABEL.format(identifier.hex())
    named = {"id": identifier, "label": label, "store": store, "capabilities": MechanismFlag.SIGN}
    private_template = {
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: False,
        Attribute.PRIVATE: True,
        Attribute.SIGN: True,
    }
    # Nothing is asked of the public part: tpm2-pkcs11 takes usages of both parts for bits of the one key.
    public_template = dict.fromkeys((Attribute.VERIFY, Attribute.ENCRYPT, Attribute.WRAP), DEFAULT)

    def make(uses: dict[Attribute, Any]) -> Any:
        templates = {"public_template": public_template, "private_template": private_template | uses}
        if isinstance(kind, EllipticCurve):
            curve = session.create_domain_parameters(
                KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters(kind.name)}, local=True
            )
            return curve.generate_keypair(**named, **templates)
        return session.generate_keypair(KeyType.RSA, kind.bits, **named, **templates)

    try:
        try:
            public, private = make(_USES)
        except (AttributeTypeInvalid, AttributeValueInvalid, TemplateInconsistent):
            public, private = make(dict.fromkeys(_USES, DEFAULT))
    except DeviceMemory:
        raise errors.full(sum(1 for _ in session.get_objects())) from None
    if isinstance(kind, EllipticCurve):
        der = _ec_public(bytes(public[Attribute.EC_POINT]), CURVES[kind])
    else:
        numbers = rsa.RSAPublicNumbers(
            int.from_bytes(public[Attribute.PUBLIC_EXPONENT]), int.from_bytes(public[Attribute.MODULUS])
        )
        der = _der(numbers.public_key())
    for attribute, wanted in (_BORN_INSIDE | _USES).items():
        told = _told(private, attribute)
        if told != wanted and (told is not None or attribute in _BORN_INSIDE):
            raise KeyStoreError(
                f"the token made a key whose CKA_{attribute.name} is {'unknown' if told is None else told}, so it may "
                "leave the token or do more than sign",
                reason="pkcs11_key_unprotected",
                hint="such a key is not used; is the token in a mode for tests?",
                scope=Scope.STORE,
            )
    find_private(session, identifier=identifier)  # some modules choose CKA_ID by themselves
    return der


def _told(item: Any, attribute: Attribute) -> bool | None:
    try:
        return bool(item[attribute])
    except (AttributeTypeInvalid, AttributeSensitive):
        return None


def _ec_public(point: bytes, curve: ec.EllipticCurve) -> bytes:
    """Return the subjectPublicKeyInfo of CKA_EC_POINT: a point in an OCTET STRING [PKCS #11 6.3.3], or bare."""
    bare = 1 + 2 * ((curve.key_size + 7) // 8)
    if len(point) > bare and point[0] == _OCTET_STRING:
        point = point[-bare:]
    try:
        return _der(ec.EllipticCurvePublicKey.from_encoded_point(curve, point))
    except ValueError:
        raise KeyStoreError(
            f"the token made a key that is not on {curve.name}", reason="pkcs11_refused", scope=Scope.KEY
        ) from None


def _der(public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> bytes:
    return public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def destroy(session: Any, *, identifier: bytes) -> bool:
    """Destroy a key, make sure that it is gone, and return whether it was there."""
    there = _objects(session, identifier)
    for item in there:
        item.destroy()
    if left := _objects(session, identifier):
        raise KeyStoreError(
            f"the token still has {len(left)} objects of a key that it destroyed",
            reason="pkcs11_failed",
            transient=True,
            scope=Scope.DEVICE,
        )
    return bool(there)
