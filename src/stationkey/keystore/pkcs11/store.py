"""Keys in a PKCS#11 token: made there, never extractable, and used there.

A token keeps its keys by itself, and a crash does not undo what it has made. So each key is recorded before it is made
(`stationkey.keystore.pkcs11.inventory`), and `Pkcs11KeyStore.sweep` destroys what the ledger knows no more.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm as CryptographyUnsupported
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
from stationkey.errors import KeyStoreError, Scope, UnsupportedAlgorithm
from stationkey.keystore.pkcs11 import errors, keyfile
from stationkey.keystore.pkcs11.inventory import LABEL, Inventory
from stationkey.keystore.pkcs11.signing import EccPrivateKey, RsaPrivateKey, Sign
from stationkey.keystore.pkcs11.token import Connection
from stationkey.keystore.pkcs11.uri import TokenUri, identifier_of, object_uri
from stationkey.keystore.protocol import KeyRef, Support
from stationkey.x509.csr import HASHES, PrivateKey, PublicKey

_SCHEME: Final = "pkcs11"
_CURVES: Final[dict[Kind, ec.EllipticCurve]] = {SECP256R1: ec.SECP256R1(), SECP521R1: ec.SECP521R1()}
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


class Pkcs11KeyStore:
    """A key store in a token.

    Args:
        uri: of the key store.
        token: what that says.
        inventory: record of what is in it.
    """

    def __init__(self, uri: str, token: TokenUri, inventory: Inventory) -> None:
        self.uri = uri
        self._connection = Connection(token, inventory.refused_pin(uri))
        self._inventory = inventory
        self._proven: set[Algorithm] = set()

    @property
    def description(self) -> str:
        """Label, maker and model of the token."""
        self._connection.call("C_GetTokenInfo", lambda _: None)
        names = self._connection.names()
        return f"PKCS#11 token {names['token']}: {names['manufacturer']} {names['model']} {names['serial']}"

    def supports(self, algorithm: Algorithm) -> Support:
        return self._connection.call("C_GetMechanismInfo", lambda _: self._supports(algorithm))

    def _supports(self, algorithm: Algorithm) -> Support:
        slot = self._connection.token.slot
        present = slot.get_mechanisms()
        missing = []
        for kind in ALGORITHMS[algorithm].key_types:
            if isinstance(kind, EllipticCurve):
                make, bits = Mechanism.EC_KEY_PAIR_GEN, _CURVES[kind].key_size
            else:
                make, bits = Mechanism.RSA_PKCS_KEY_PAIR_GEN, kind.bits
            sign = _mechanism(kind, ALGORITHMS[algorithm].hash_name, present)
            if {make, sign} <= present:
                sizes = [slot.get_mechanism_info(mechanism) for mechanism in (make, sign)]
                if all(size.min_key_length <= bits <= (size.max_key_length or bits) for size in sizes):
                    return Support(kind)
            missing.append(str(kind))
        return Support(None, f"this token has no {' and no '.join(missing)}")

    def try_out(self, algorithm: Algorithm) -> Support:
        """Make a key, sign with it, and destroy it: shows what the mechanism list only promises.

        The key is a session object, which a crash takes with it; a token that has none of these makes it as any other.

        Raises:
            KeyStoreError: the token failed.
        """
        support = self.supports(algorithm)
        if support.key_type is None:
            return support
        attempts = (
            partial(self._try_in_session, support.key_type, algorithm),
            partial(self._try_stored, algorithm),
        )
        missing = ""
        for attempt in attempts:
            try:
                attempt()
            except KeyStoreError as error:
                if error.scope is not Scope.KEY:
                    raise
                missing = error.message
            else:
                return support
        return Support(None, missing)

    def _try_in_session(self, kind: Kind, algorithm: Algorithm) -> None:
        attempt = partial(_try_out, kind=kind, algorithm=algorithm)
        self._connection.call("C_GenerateKeyPair", attempt, again=False)

    def _try_stored(self, algorithm: Algorithm) -> None:
        self._proven.discard(algorithm)
        self.destroy(self.generate(algorithm))

    def generate(self, algorithm: Algorithm) -> KeyRef:
        support = self.supports(algorithm)
        if support.key_type is None:
            raise UnsupportedAlgorithm(
                f"{algorithm} cannot be served: {support.missing}", reason="algorithm_unsupported_by_token"
            )
        identifier = self._inventory.new(self._connection.names())
        try:
            public = self._connection.call(
                "C_GenerateKeyPair", partial(_generate, kind=support.key_type, identifier=identifier), again=False
            )
            if algorithm not in self._proven:
                proof = partial(
                    _prove, identifier=identifier, kind=support.key_type, public=public, algorithm=algorithm
                )
                self._connection.call("C_Sign", proof)
                self._proven.add(algorithm)
        except BaseException:
            with suppress(KeyStoreError):  # else the next sweep destroys it
                self._end(identifier)
            raise
        uri = object_uri(self._connection.names(), identifier)
        return KeyRef(
            scheme=_SCHEME,
            key_type=support.key_type,
            public=public,
            private=keyfile.encode(uri),
        )

    @contextmanager
    def signer(self, key: KeyRef) -> Iterator[PrivateKey]:
        identifier = _identifier(key)
        self._connection.call("C_FindObjects", partial(_private, identifier=identifier))

        def sign(hash_name: str, data: bytes) -> bytes:
            return self._connection.call(
                "C_Sign", lambda session: _sign(session, identifier, key.key_type, hash_name, data)
            )

        yield _private_key(self.public_key(key), sign)

    def auth_value(self, private: bytes) -> bytes:
        """Return the PIN, which the token has just accepted. See `stationkey.keystore.Locking`."""
        try:
            identifier = identifier_of(keyfile.uri_of(private))
        except ValueError:
            raise KeyStoreError("the key cannot be read", reason="key_damaged", scope=Scope.KEY) from None
        self._connection.call("C_FindObjects", partial(_private, identifier=identifier))
        return self._connection.pin()

    def public_key(self, key: KeyRef) -> PublicKey:
        try:
            return _loaded(key.public)
        except (ValueError, CryptographyUnsupported):
            raise _damaged(key) from None

    def destroy(self, key: KeyRef) -> None:
        self._end(_identifier(key))

    def sweep(self, living: Collection[KeyRef]) -> int:
        """Destroy what the ledger knows no more: see `stationkey.keystore.Sweeping`."""
        kept = {_identifier(key) for key in living if key.scheme == _SCHEME}
        ended = self._inventory.ended(kept)
        if not ended:
            return 0
        self._connection.call("C_GetTokenInfo", lambda _: None)
        names = self._connection.names()
        destroyed = 0
        for identifier in [identifier for identifier in ended if self._inventory.is_in(identifier, names)]:
            if self._destroyed(identifier):
                self._inventory.drop(identifier)
                destroyed += 1
            else:
                self._inventory.drop_missing(identifier)
        return destroyed

    def unload(self) -> None:
        """Nothing to do: a token has no slots to clear."""

    def abandon(self) -> None:
        self._connection.give_up()

    def close(self) -> None:
        self._connection.close()

    def _end(self, identifier: bytes) -> None:
        self._destroyed(identifier)
        self._inventory.drop(identifier)

    def _destroyed(self, identifier: bytes) -> bool:
        def destroy(session: Any) -> bool:
            if not self._inventory.is_in(identifier, self._connection.names()):
                raise NoSuchKey  # it stays on record, to be destroyed in its own token
            return _destroy(session, identifier=identifier)

        return self._connection.call("C_DestroyObject", destroy)


def _identifier(key: KeyRef) -> bytes:
    if key.scheme != _SCHEME:
        raise KeyStoreError(
            f"key {key.key_id} is in a {key.scheme} key store, and this one is pkcs11",
            reason="key_of_another_store",
            scope=Scope.KEY,
        )
    try:
        return identifier_of(keyfile.uri_of(key.private))
    except ValueError:
        raise _damaged(key) from None


def _damaged(key: KeyRef) -> KeyStoreError:
    return KeyStoreError(f"key {key.key_id} is corrupt in the ledger", reason="key_damaged", scope=Scope.KEY)


def _loaded(public: bytes) -> PublicKey:
    return serialization.load_der_public_key(public)  # type: ignore[return-value] # EC or RSA: this store made it


def _private_key(public_key: PublicKey, sign: Sign) -> PrivateKey:
    if isinstance(public_key, ec.EllipticCurvePublicKey):
        return EccPrivateKey(sign, public_key)
    return RsaPrivateKey(sign, public_key)


def _mechanism(kind: Kind, hash_name: str, present: Collection[Any]) -> Mechanism:
    """Return what a key signs with.

    CKM_RSA_PKCS is the second choice: in tpm2-pkcs11 it needs a key that also decrypts.
    """
    if isinstance(kind, EllipticCurve):
        return Mechanism.ECDSA
    return _RSA[hash_name][0] if _RSA[hash_name][0] in present else Mechanism.RSA_PKCS


# With an open session.


def _objects(session: Any, identifier: bytes, kind: ObjectClass | None = None) -> list[Any]:
    """Return our objects with a CKA_ID. The label is asked for too: no other program's object is touched."""
    wanted: dict[Attribute, Any] = {Attribute.ID: identifier, Attribute.LABEL: LABEL.format(identifier.hex())}
    if kind is not None:
        wanted[Attribute.CLASS] = kind
    return list(session.get_objects(wanted))


def _private(session: Any, *, identifier: bytes) -> Any:
    found = _objects(session, identifier, ObjectClass.PRIVATE_KEY)
    if len(found) != 1:
        raise NoSuchKey
    return found[0]


def _sign(session: Any, identifier: bytes, kind: Kind, hash_name: str, data: bytes) -> bytes:
    private = _private(session, identifier=identifier)
    mechanism = _mechanism(kind, hash_name, session.token.slot.get_mechanisms())
    if mechanism is Mechanism.ECDSA:
        data = hashlib.new(hash_name, data).digest()
    elif mechanism is Mechanism.RSA_PKCS:
        data = _RSA[hash_name][1] + hashlib.new(hash_name, data).digest()
    return bytes(private.sign(data, mechanism=mechanism))


def _try_out(session: Any, *, kind: Kind, algorithm: Algorithm) -> None:
    identifier = secrets.token_bytes(16)
    try:
        public = _generate(session, kind=kind, identifier=identifier, store=False)
        _prove(session, identifier=identifier, kind=kind, public=public, algorithm=algorithm)
    finally:
        with suppress(PKCS11Error):  # the token that has lost the session has lost its objects
            _destroy(session, identifier=identifier)


def _prove(session: Any, *, identifier: bytes, kind: Kind, public: bytes, algorithm: Algorithm) -> None:
    """Sign a CSR with a key just made: some modules make keys that they cannot sign with.

    Raises:
        KeyStoreError: this one does.
    """
    private_key = _private_key(_loaded(public), partial(_sign, session, identifier, kind))
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


def _generate(session: Any, *, kind: Kind, identifier: bytes, store: bool = True) -> bytes:
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
        der = _ec_public(bytes(public[Attribute.EC_POINT]), _CURVES[kind])
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
    _private(session, identifier=identifier)  # some modules choose CKA_ID by themselves
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


def _destroy(session: Any, *, identifier: bytes) -> bool:
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
