"""The interface of key stores, and its values.

Stores are synchronous and belong to one thread, `KeyStoreThread`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, runtime_checkable

from msgspec import Struct

from stationkey.contract.profiles import Algorithm, KeyType
from stationkey.errors import KeyStoreError, Scope
from stationkey.keystore.schemes import SCHEMES
from stationkey.system.pem import to_pem

if TYPE_CHECKING:
    from stationkey.x509.csr import PrivateKey, PublicKey

T = TypeVar("T")
KEY_ID_LENGTH: Final = 20


def key_id_of(public: bytes) -> str:
    """Name a key: the first 80 bits, in hexadecimal, of the SHA-256 of its subjectPublicKeyInfo.

    Anyone with the CSR or the certificate can compute it, and no two keys share a name.
    """
    return hashlib.sha256(public).hexdigest()[:KEY_ID_LENGTH]


class KeyRef(Struct, frozen=True, kw_only=True):
    """Everything that a key store needs to use a key again.

    Attributes:
        scheme: URI scheme of the store that made it: ``tpm2``, ``pkcs11`` or ``software``.
        key_type: curve or RSA size.
        public: subjectPublicKeyInfo in DER [RFC 5280 4.1.2.7].
        private: what the store needs to load the private part. From ``tpm2:`` the wrapped blob as the DER of a
            ``TSS2 PRIVATE KEY``, which opens only in the TPM that made it; from ``pkcs11:`` the URI of the key in its
            token, as the DER of a ``PKCS#11 PROVIDER URI``; from ``software:`` a PKCS#8 in the clear. Never shown by
            repr.
    """

    scheme: str
    key_type: KeyType
    public: bytes
    private: bytes

    def __repr__(self) -> str:
        """Show neither part of the key itself."""
        return f"KeyRef(scheme={self.scheme!r}, key_type={self.key_type!r})"

    @property
    def key_id(self) -> str:
        """See `key_id_of`."""
        return key_id_of(self.public)

    @property
    def location(self) -> str:
        """The location of the key as the key itself tells it, without the scheme; empty if it does not.

        Raises:
            KeyStoreError: the record of the key is corrupt.
        """
        scheme = SCHEMES.get(self.scheme)
        if scheme is None or not scheme.locate:
            return ""
        try:
            return str(resolve_name(scheme.locate)(self.private)).removeprefix(f"{self.scheme}:")
        except ValueError:
            raise KeyStoreError(
                f"key {self.key_id} is corrupt in the ledger", reason="key_damaged", scope=Scope.KEY
            ) from None

    def pem(self) -> bytes:
        """Return the key as a PEM file that OpenSSL can use.

        A ``TSS2 PRIVATE KEY``, a ``PRIVATE KEY``, or the URI of the key on a line, for engines and GnuTLS, and as a
        ``PKCS#11 PROVIDER URI``.
        """
        pem = to_pem(SCHEMES[self.scheme].pem_label, self.private)
        with suppress(KeyStoreError):  # of a corrupt record: told when the key is used
            if location := self.location:
                return f"{self.scheme}:{location}\n".encode() + pem
        return pem


class Support(Struct, frozen=True):
    """Whether a store can serve an algorithm; true if it can.

    Attributes:
        key_type: type of the key that it would make, or None.
        missing: the capability that the device lacks, as text; empty if none.
    """

    key_type: KeyType | None
    missing: str = ""

    def __bool__(self) -> bool:
        return self.key_type is not None


class Swept(Struct, frozen=True):
    """The result of a sweep.

    Attributes:
        destroyed: how many keys were destroyed.
        more: whether others wait for a look: a sweep ends after some, so that requests have their turn.
    """

    destroyed: int = 0
    more: bool = False


class KeyStore(Protocol):
    """A key store. Not thread-safe: all calls come from the thread that opened it."""

    @property
    def uri(self) -> str:
        """The URI that the store was opened by."""
        ...

    @property
    def description(self) -> str:
        """Describe the store for the log: vendor and firmware, or that keys are not protected."""
        ...

    @property
    def identity(self) -> str:
        """Name the device itself, apart from how it is reached: the same for every process that reaches the same keys.

        Raises:
            KeyStoreError: the device cannot be asked.
        """
        ...

    def supports(self, algorithm: Algorithm) -> Support:
        """Ask the device, without making a key.

        Raises:
            KeyStoreError: the device cannot be asked.
        """
        ...

    def generate(self, algorithm: Algorithm) -> KeyRef:
        """Make a key pair for `algorithm`.

        Raises:
            UnsupportedAlgorithm: the device cannot; no key was made.
            KeyStoreError: the device failed; no key is left behind in it.
        """
        ...

    def signer(self, key: KeyRef) -> AbstractContextManager[PrivateKey]:
        """Load a key for signing. It may stay loaded after the ``with`` block, see `unload`.

        Raises:
            KeyStoreError: the key is not of this store or of this device, or the device failed.
        """
        ...

    def public_key(self, key: KeyRef) -> PublicKey:
        """The public part of a key. Needs no device."""
        ...

    def destroy(self, key: KeyRef) -> None:
        """Remove a key from the device. The ledger removes its own part."""
        ...

    def unload(self) -> None:
        """Take out of the device whatever key is loaded there. The next command that needs room does the same.

        A separate call, so that a request does not wait for it. Never fails: a lost device holds nothing.
        """
        ...

    def close(self) -> None:
        """Close the device. The store can be used again afterwards: it reopens the device."""
        ...


@runtime_checkable
class Abandonable(Protocol):
    """A store whose device another store may take over while a call to this one hangs."""

    def abandon(self) -> None:
        """Send nothing more to the device; the other store unloads what this one has loaded.

        The only method that may be called from any thread.
        """
        ...


@runtime_checkable
class Timed(Protocol):
    """A store that retries while its device is busy."""

    def within(self, seconds: float) -> None:
        """Allow each call from now on so many seconds, retries included."""
        ...


@runtime_checkable
class Locking(Protocol):
    """A store whose keys may need a value to be used: an authorisation value, or a PIN."""

    def auth_value(self, private: bytes) -> bytes:
        """Return that value of a key; empty if it has none.

        Args:
            private: as in `KeyRef`.

        Raises:
            KeyStoreError: it is not known, the device does not give it out, or does not accept it.
        """
        ...


@runtime_checkable
class Protecting(Locking, Protocol):
    """A store whose keys may need more than to be loaded: an authorisation value, or a policy."""

    def check(self, key: KeyRef, *, as_new: bool = False) -> None:
        """Show that a key can be used.

        Args:
            key: the key.
            as_new: whether it must also be protected as a new key would be.

        Raises:
            KeyStoreError: it cannot, or is not.
        """
        ...


@runtime_checkable
class Lending(Protocol):
    """A store in a TPM that lends its TPM: for attestation."""

    def lend(self, key: KeyRef | None, use: Callable[[Any, Any, Any], T]) -> T:
        """Call `use` with the open ESAPI context, the handle of `key` loaded on it, and a session that authorises.

        The handle is None if no key is given. If the TPM is lost meanwhile, it is called a second time.

        Raises:
            KeyStoreError: the key is not of this store or of this device, or the device failed.
        """
        ...


@runtime_checkable
class Sweeping(Protocol):
    """A store whose keys are in its device, where a crash can leave one that the ledger does not know."""

    def sweep(self, living: Collection[KeyRef] | None) -> Swept:
        """Destroy the keys of this station or site in the device that are certainly not in the ledger any more.

        Args:
            living: the keys in the ledger that have a private part; None if the record of what is in the device knows
                them, as in a site.

        Raises:
            KeyStoreError: the device failed; the rest is left to the next call.
        """
        ...


@runtime_checkable
class Trying(Protocol):
    """A store whose device may promise more than it does."""

    def try_out(self, algorithm: Algorithm) -> Support:
        """Make a key for `algorithm`, sign with it, and destroy it.

        Raises:
            KeyStoreError: the device failed.
        """
        ...


def check_key(store: KeyStore, key: KeyRef, *, as_new: bool = False) -> None:
    """Show that a store can use a key: see `Protecting`; any other store has to load it.

    Raises:
        KeyStoreError: it cannot.
    """
    if isinstance(store, Protecting):
        store.check(key, as_new=as_new)
        return
    with store.signer(key):
        pass
