"""Keys in a PKCS#11 token: made there, never extractable, and used there.

A token keeps its keys by itself, and a crash does not undo what it has made. So each key is recorded before it is made
(`stationkey.keystore.pkcs11.inventory`), and `Pkcs11KeyStore.sweep` destroys keys that the ledger no longer has.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm as CryptographyUnsupported
from pkcs11 import Mechanism, NoSuchKey

from stationkey.contract.profiles import ALGORITHMS, Algorithm, EllipticCurve
from stationkey.contract.profiles import KeyType as Kind
from stationkey.errors import KeyStoreError, Scope, StationKeyError, UnsupportedAlgorithm
from stationkey.keystore.pkcs11 import keyfile, keys
from stationkey.keystore.pkcs11.inventory import Inventory
from stationkey.keystore.pkcs11.token import Connection
from stationkey.keystore.pkcs11.uri import TokenUri, identifier_of, object_uri, token_uri
from stationkey.keystore.protocol import KeyRef, Support, Swept
from stationkey.keystore.refusal import refuse_foreign
from stationkey.x509.csr import PrivateKey, PublicKey

_SCHEME: Final = "pkcs11"
_FOR_THE_RECORD: Final = 0.7
"""The share of a call's time that a key may wait for its record; it is made and used in the rest."""


class Pkcs11KeyStore:
    """A key store in a token.

    Args:
        uri: of the key store.
        token: what that says.
        inventory: record of what is in it.
        refused: file that remembers a PIN that was refused.
    """

    def __init__(self, uri: str, token: TokenUri, inventory: Inventory, refused: Path) -> None:
        self.uri = uri
        self._connection = Connection(token, refused)
        self._inventory = inventory
        self._until = 0.0  # when the record has to be there, on the monotonic clock
        self._proven: set[Algorithm] = set()

    def within(self, seconds: float) -> None:
        """See `stationkey.keystore.protocol.Timed`: what passes here is an outage of a site's record."""
        self._until = time.monotonic() + seconds * _FOR_THE_RECORD

    @property
    def description(self) -> str:
        """Label, maker and model of the token."""
        names = self._names()
        return f"PKCS#11 token {names['token']}: {names['manufacturer']} {names['model']} {names['serial']}"

    @property
    def identity(self) -> str:
        """Label, maker, serial number and model of the token, as a URI."""
        return token_uri(self._names())

    def _names(self) -> dict[str, str]:
        """Return what names the token, by attribute; opens it if need be."""
        self._connection.call("C_GetTokenInfo", lambda _: None)
        return self._connection.names()

    def supports(self, algorithm: Algorithm) -> Support:
        return self._connection.call("C_GetMechanismInfo", lambda _: self._supports(algorithm))

    def _supports(self, algorithm: Algorithm) -> Support:
        slot = self._connection.token.slot
        present = slot.get_mechanisms()
        missing = []
        for kind in ALGORITHMS[algorithm].key_types:
            if isinstance(kind, EllipticCurve):
                make, bits = Mechanism.EC_KEY_PAIR_GEN, keys.CURVES[kind].key_size
            else:
                make, bits = Mechanism.RSA_PKCS_KEY_PAIR_GEN, kind.bits
            sign = keys.mechanism_for(kind, ALGORITHMS[algorithm].hash_name, present)
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
        attempt = partial(keys.try_out, kind=kind, algorithm=algorithm)
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
        identifier = self._inventory.new(self._connection.names(), within=self._until - time.monotonic())
        try:
            public = self._connection.call(
                "C_GenerateKeyPair", partial(keys.generate, kind=support.key_type, identifier=identifier), again=False
            )
            if algorithm not in self._proven:
                proof = partial(
                    keys.prove, identifier=identifier, kind=support.key_type, public=public, algorithm=algorithm
                )
                self._connection.call("C_Sign", proof)
                self._proven.add(algorithm)
        except BaseException:
            with suppress(StationKeyError):  # else the next sweep destroys it
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
        self._connection.call("C_FindObjects", partial(keys.find_private, identifier=identifier))

        def sign(hash_name: str, data: bytes) -> bytes:
            return self._connection.call(
                "C_Sign", lambda session: keys.sign(session, identifier, key.key_type, hash_name, data)
            )

        yield keys.private_key_of(self.public_key(key), sign)

    def auth_value(self, private: bytes) -> bytes:
        """Return the PIN, which the token has just accepted. See `stationkey.keystore.Locking`."""
        try:
            identifier = identifier_of(keyfile.uri_of(private))
        except ValueError:
            raise KeyStoreError("the key cannot be read", reason="key_damaged", scope=Scope.KEY) from None
        self._connection.call("C_FindObjects", partial(keys.find_private, identifier=identifier))
        return self._connection.pin()

    def public_key(self, key: KeyRef) -> PublicKey:
        try:
            return keys.loaded(key.public)
        except (ValueError, CryptographyUnsupported):
            raise _damaged(key) from None

    def destroy(self, key: KeyRef) -> None:
        self._end(_identifier(key))

    def sweep(self, living: Collection[KeyRef] | None) -> Swept:
        """Destroy keys that the ledger no longer has: see `stationkey.keystore.Sweeping`."""
        kept = None if living is None else {_identifier(key) for key in living if key.scheme == _SCHEME}
        destroyed = 0
        ended = self._inventory.ended(kept, self._names)
        for identifier in ended.identifiers:
            if self._destroyed(identifier):
                self._inventory.drop(identifier)
                destroyed += 1
            else:
                self._inventory.drop_missing(identifier)
        return Swept(destroyed, ended.more)

    def unload(self) -> None:
        """Nothing to do: a token has no slots to clear."""

    def abandon(self) -> None:
        self._connection.give_up()

    def close(self) -> None:
        self._connection.close()

    def _end(self, identifier: bytes) -> None:
        if self._inventory.end(identifier):
            self._inventory.drop(identifier, found=self._destroyed(identifier))

    def _destroyed(self, identifier: bytes) -> bool:
        def destroy(session: Any) -> bool:
            if not self._inventory.is_in(identifier, self._connection.names()):
                raise NoSuchKey  # it stays on record, to be destroyed in its own token
            return keys.destroy(session, identifier=identifier)

        return self._connection.call("C_DestroyObject", destroy)


def _identifier(key: KeyRef) -> bytes:
    refuse_foreign(key, _SCHEME)
    try:
        return identifier_of(keyfile.uri_of(key.private))
    except ValueError:
        raise _damaged(key) from None


def _damaged(key: KeyRef) -> KeyStoreError:
    return KeyStoreError(f"key {key.key_id} is corrupt in the ledger", reason="key_damaged", scope=Scope.KEY)
