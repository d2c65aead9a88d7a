"""The key stores there are, by the scheme of their URI. A new store is a row here, its folder and its option."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol

from stationkey.errors import ConfigurationError

if TYPE_CHECKING:
    from stationkey.keystore.protocol import KeyStore


class Opener(Protocol):
    """The function of a store that checks its options, and returns the function that opens it."""

    def __call__(
        self, location: str, *, terms: Any, state_dir: Path | None, guest: bool
    ) -> Callable[[], KeyStore]:  # Any: each store has its own terms
        """See `keystore_opener`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What the general code knows about a kind of key store.

    Attributes:
        name: scheme of its URI.
        opener: its `Opener` as ``module:function``; loaded when a store is opened.
        example: a URI.
        located: whether the URI says where the store is.
        secret_query: whether what follows ``?`` in its URI may hold a secret, and is not shown.
        protected: whether its keys are protected. One without protection is for trying only, and never a fallback.
        attests: whether it can prove that it made a key.
        pem_label: of the PEM file with a key.
        openssl_provider: what OpenSSL needs to use such a file, or None if it needs nothing.
    """

    name: str
    opener: str
    example: str
    located: bool
    secret_query: bool = False
    protected: bool
    attests: bool
    pem_label: str
    openssl_provider: str | None

    def load(self) -> Opener:
        """Import the function that opens the store."""
        module, _, function = self.opener.partition(":")
        opener: Opener = getattr(import_module(module), function)
        return opener


_SCHEMES: Final = (
    Scheme(
        name="tpm2",
        opener="stationkey.keystore.tpm2:opener",
        example="tpm2:device:/dev/tpmrm0",
        located=True,
        protected=True,
        attests=True,
        pem_label="TSS2 PRIVATE KEY",
        openssl_provider="tpm2",
    ),
    Scheme(
        name="software",
        opener="stationkey.keystore.software:opener",
        example="software:",
        located=False,
        protected=False,
        attests=False,
        pem_label="PRIVATE KEY",
        openssl_provider=None,
    ),
)
SCHEMES: Final[Mapping[str, Scheme]] = MappingProxyType({scheme.name: scheme for scheme in _SCHEMES})


@dataclass(frozen=True, slots=True)
class KeyStoreUri:
    """The URI of a key store.

    Attributes:
        scheme: what kind of store it is.
        location: what follows the colon: for ``tpm2:`` the TCTI.
    """

    scheme: Scheme
    location: str

    @classmethod
    def parse(cls, uri: str) -> KeyStoreUri:
        """Split a URI.

        Raises:
            ConfigurationError: invalid scheme, or a location if the scheme has none.
        """
        name, colon, location = uri.partition(":")
        scheme = SCHEMES.get(name)
        if scheme is None or not colon:
            raise ConfigurationError(
                f"{uri!r} is no key store URI",
                reason="keystore_uri_invalid",
                hint=f"it begins with {' or '.join(f'{name}:' for name in SCHEMES)}, for example {_SCHEMES[0].example}",
            )
        if location and not scheme.located:
            raise ConfigurationError(
                f"the key store URI {uri!r} should be just '{name}:'", reason="keystore_uri_invalid"
            )
        return cls(scheme, location)

    def __str__(self) -> str:
        """Return the URI without what may be secret in it."""
        location, query, _ = self.location.partition("?") if self.scheme.secret_query else (self.location, "", "")
        return f"{self.scheme.name}:{location}{query and '?…'}"


def keystore_opener(
    uri: str,
    *,
    allow_software_keys: bool = False,
    terms: object = None,
    state_dir: Path | None = None,
    guest: bool = False,
) -> Callable[[], KeyStore]:
    """Check a key-store URI and return a function that opens it, to be called in the thread that will own it.

    Args:
        uri: which store.
        allow_software_keys: whether a store without protection is allowed.
        terms: how the store is used, and what protects its keys: `TpmTerms` for ``tpm2:``; None for the defaults.
        state_dir: the state directory, if the terms need a file there.
        guest: whether the device is somebody else's too, so that what is loaded there is left alone.

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
    return where.scheme.load()(where.location, terms=terms, state_dir=state_dir, guest=guest)
