"""The key stores of a station: which one makes the keys of a certificate type, and which one has a key."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from msgspec import Struct

from stationkey.config.settings import DEFAULT_STORE, NamedStore, Settings
from stationkey.contract.profiles import PROFILES, Algorithm, CertificateType
from stationkey.errors import ConfigurationError, KeyStoreError, Scope
from stationkey.keystore.protocol import KeyRef, KeyStore
from stationkey.keystore.registry import KeyStoreUri, keystore_opener
from stationkey.keystore.worker import KeyStoreThread

if TYPE_CHECKING:
    from stationkey.keystore.pkcs11.inventory import SiteRecord


class Store(Struct, frozen=True, eq=False):
    """A key store with its thread.

    Attributes:
        name: in the configuration.
        uri: its URI.
        types: the certificate types whose keys are made in it.
        thread: its thread.
        shared: whether its keys stay in its device, and all daemons of a site share the record of them.
    """

    name: str
    uri: KeyStoreUri
    types: frozenset[CertificateType]
    thread: KeyStoreThread
    shared: bool = False

    @property
    def suffix(self) -> str:
        """Return what tells its tasks and fields in the log from those of the others; empty for the default."""
        return "" if self.name == DEFAULT_STORE else f"-{self.name}"

    @property
    def about(self) -> dict[str, str]:
        """Return what a log line says of it; nothing for the default."""
        return {"store": self.name} if self.suffix else {}

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """Return the algorithms that a request for a key in this store may name."""
        required = {PROFILES[kind].required_algorithm for kind in self.types}
        return tuple(algorithm for algorithm in Algorithm if required & {None, algorithm})


class KeyStores:
    """The key stores, each with its own thread.

    Args:
        stores: together they make the keys of every certificate type.
    """

    def __init__(self, stores: Iterable[Store]) -> None:
        self._stores = tuple(stores)
        self._making = {kind: store for store in self._stores for kind in store.types}

    @classmethod
    def only(cls, uri: str, thread: KeyStoreThread) -> KeyStores:
        """Return one key store for all certificate types.

        Args:
            uri: its URI.
            thread: its thread.

        Raises:
            ConfigurationError: invalid URI.
        """
        return cls([Store(DEFAULT_STORE, KeyStoreUri.parse(uri), frozenset(CertificateType), thread)])

    def __iter__(self) -> Iterator[Store]:
        return iter(self._stores)

    def __len__(self) -> int:
        return len(self._stores)

    def making(self, certificate_type: CertificateType) -> Store:
        """Return the store in which the keys of a certificate type are made."""
        return self._making[certificate_type]

    def holding(self, key: KeyRef) -> Store:
        """Return the store that a key is in.

        Raises:
            KeyStoreError: the configuration names no such store.
        """
        for store in self._stores:
            if store.uri.holds(key):
                return store
        where = f"{key.scheme}:{key.location}"
        raise KeyStoreError(
            f"key {key.key_id} is in a key store that the configuration does not name, {where}",
            reason="keystore_unconfigured",
            hint="name it in [keystores], and in [keystore_for] existing_keys",
            scope=Scope.KEY,
        )

    def have(self, uri: str) -> bool:
        """Return whether a key with this URI is in one of the stores."""
        return any(store.uri.fits(uri) for store in self._stores)

    def close(self) -> None:
        """End the threads and close the stores."""
        for store in self._stores:
            store.thread.close(1.0 / len(self._stores))  # a second in all, for those that hang


def store_uris(stores: Iterable[NamedStore]) -> dict[str, KeyStoreUri]:
    """Return the URIs of key stores by their names.

    Raises:
        ConfigurationError: invalid URI, or two stores that cannot be in one process.
    """
    found: dict[str, KeyStoreUri] = {}
    places: dict[tuple[str, str], str] = {}
    for store in stores:
        found[store.name] = uri = KeyStoreUri.parse(store.uri)
        if (first := places.setdefault(uri.device, store.place)) != store.place:
            kind, device = uri.device
            raise ConfigurationError(
                f"{store.place} and {first} are both {kind}: key stores{device and f' by the module {device}'}",
                reason="keystores_conflict",
                hint="a station has one TPM, and one PKCS#11 key store for each module",
            )
    return found


def checked_stores(settings: Settings, *, site: SiteRecord | None = None) -> Callable[[], KeyStores]:
    """Check the key stores of the configuration and return the function that starts their threads.

    No store is opened before its first job.

    Args:
        settings: the configuration.
        site: the record that the daemons of a site share: each store is recorded there when it is opened, or refused.

    Raises:
        ConfigurationError: see `store_uris` and `keystore_opener`.
    """
    uris = store_uris(settings.stores)
    openers = {
        store.name: keystore_opener(
            store.uri,
            allow_software_keys=settings.allow_software_keys,
            terms=settings.keystore_terms(store.uri),
            state_dir=settings.state_dir,
            inventory=site,
        )
        for store in settings.stores
    }
    if site is not None:
        openers = {name: _admitted(opener, site, uris[name], uris.values()) for name, opener in openers.items()}
    return lambda: KeyStores(
        Store(
            store.name,
            uris[store.name],
            store.types,
            KeyStoreThread(openers[store.name]),
            shared=site is not None and uris[store.name].scheme.resident,
        )
        for store in settings.stores
    )


def _admitted(
    opener: Callable[[], KeyStore], site: SiteRecord, uri: KeyStoreUri, reached: Collection[KeyStoreUri]
) -> Callable[[], KeyStore]:
    """Return the function that opens a key store, and refuses one in another device than the site's."""

    def open_store() -> KeyStore:
        store = opener()
        try:
            site.admit(
                store.identity, fits=uri.fits, reached=lambda identity: any(one.fits(identity) for one in reached)
            )
        except BaseException:
            store.close()
            raise
        return store

    return open_store
