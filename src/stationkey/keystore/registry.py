"""Find the opener of a key store by its URI; `stationkey.keystore.schemes` has the schemes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

from msgspec import Struct

from stationkey.errors import ConfigurationError
from stationkey.keystore.protocol import KeyRef, KeyStore
from stationkey.keystore.schemes import SCHEMES, Scheme

if TYPE_CHECKING:
    from stationkey.keystore.pkcs11.inventory import Inventory


class Opener(Protocol):
    """The function of a store that checks its options, and returns the function that opens it.

    That of a store whose keys stay in the device also takes an `inventory`.
    """

    def __call__(
        self, location: str, *, terms: Any, state_dir: Path | None, guest: bool, **inventory: Any
    ) -> Callable[[], KeyStore]:  # Any: each store has its own terms
        """See `keystore_opener`."""
        ...


class KeyStoreUri(Struct, frozen=True):
    """The URI of a key store.

    Attributes:
        scheme: its scheme.
        location: the part after the colon: for ``tpm2:`` the TCTI.
    """

    scheme: Scheme
    location: str

    @classmethod
    def parse(cls, uri: str) -> KeyStoreUri:
        """Split a URI.

        Raises:
            ConfigurationError: invalid scheme or location, or a location if the scheme has none.
        """
        name, colon, location = uri.partition(":")
        scheme = SCHEMES.get(name)
        if scheme is None or not colon:
            known = " or ".join(f"{scheme}:" for scheme in SCHEMES)
            raise ConfigurationError(
                f"invalid key store URI {uri!r}",
                reason="keystore_uri_invalid",
                hint=f"it begins with {known}, for example {SCHEMES['tpm2'].example}",
            )
        if location and not scheme.located:
            raise ConfigurationError(
                f"the key store URI {uri!r} should be just '{name}:'", reason="keystore_uri_invalid"
            )
        # Without a TCTI, tpm2-tss uses whatever listens on localhost:2321.
        if scheme.located and not location.partition(":")[0].strip():
            raise ConfigurationError(
                f"the key store URI {uri!r} does not say which one",
                reason="keystore_uri_invalid",
                hint=f"for example {scheme.example}",
            )
        if scheme.reader is not None:
            resolve_name(scheme.reader)(location)
        return cls(scheme, location)

    @property
    def device(self) -> tuple[str, str]:
        """Return what no two key stores may have in common; see `Scheme`."""
        found = re.search(self.scheme.device, self.location)
        return self.scheme.name, found[0] if found else ""

    def holds(self, key: KeyRef) -> bool:
        """Return whether a key is in this store, as far as can be told without asking the device.

        Raises:
            KeyStoreError: the record of the key is corrupt.
        """
        return key.scheme == self.scheme.name and self.has(key.location)

    def has(self, location: str) -> bool:
        """Return whether a key of this kind of store with this location is in this store."""
        return not self.scheme.locate or _attributes(self.location) <= _attributes(location)

    def fits(self, identity: str) -> bool:
        """Return whether a device with this `stationkey.keystore.KeyStore.identity` fits the URI."""
        name, _, location = identity.partition(":")
        return name == self.scheme.name and self.has(location)

    def __str__(self) -> str:
        """Return the URI without what may be secret in it."""
        location, query, _ = self.location.partition("?") if self.scheme.secret_query else (self.location, "", "")
        return f"{self.scheme.name}:{location}{query and '?…'}"


def _attributes(location: str) -> set[str]:
    """Return what names a device in the location of a store whose keys tell theirs [RFC 7512 2.3]."""
    return {unquote(part) for part in location.partition("?")[0].split(";")}


def keystore_opener(
    uri: str,
    *,
    allow_software_keys: bool = False,
    terms: object = None,
    state_dir: Path | None = None,
    guest: bool = False,
    inventory: Inventory | None = None,
) -> Callable[[], KeyStore]:
    """Check a key-store URI and return a function that opens it, to be called in the thread that will own it.

    Args:
        uri: which store.
        allow_software_keys: whether a store without protection is allowed.
        terms: how the store is used, and what protects its keys: `TpmTerms` for ``tpm2:``; None for the defaults.
        state_dir: the state directory, if the terms need a file there.
        guest: whether other programs use the device too, so that their loaded objects are left alone.
        inventory: the record of keys that stay in the device, for a site; None for the one in the state directory.

    Raises:
        ConfigurationError: invalid scheme, invalid location, a store without protection that was not allowed, or terms
            that the store cannot keep.
    """
    where = KeyStoreUri.parse(uri)
    if not where.scheme.protected and not allow_software_keys:
        raise ConfigurationError(
            f"a {where.scheme.name} key store leaves private keys unprotected, and is refused",
            reason="software_keys_refused",
            hint="name a TPM, or give --allow-software-keys to try things out without one",
        )
    opener: Opener = resolve_name(where.scheme.opener)
    record = {"inventory": inventory} if inventory is not None and where.scheme.resident else {}
    return opener(where.location, terms=terms, state_dir=state_dir, guest=guest, **record)
