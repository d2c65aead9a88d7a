"""The key stores there are, by the scheme of their URI. A new store is a row here, its folder and its option."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from msgspec import Struct


class Scheme(Struct, frozen=True, kw_only=True):
    """The properties of a kind of key store.

    Attributes:
        name: scheme of its URI.
        opener: its `stationkey.keystore.registry.Opener` as ``module:function``; loaded when a store is opened.
        example: a URI.
        located: whether the URI says where the store is.
        reader: what refuses an invalid location, as ``module:function``; None if every name is taken.
        secret_query: whether what follows ``?`` in its URI may hold a secret, and is not shown.
        device: pattern of what no two key stores may have in common in their locations. An empty one allows one store
            of this kind: its keys do not tell which device they are of, or its options are for one device.
        locate: for a key that tells its device, the function that reads its URI from its private part, as
            ``module:function``.
        protected: whether its keys are protected. One without protection is for trying only, and never a fallback.
        recorded: for a store whose keys stay in the device, the function that reads from a state directory the URIs of
            those that were made there and not destroyed there yet, as ``module:function``.
        attests: whether it can prove that it made a key.
        pem_label: of the PEM file with a key.
        openssl_provider: what OpenSSL needs to use such a file, or None if it needs nothing.
    """

    name: str
    opener: str
    example: str
    located: bool
    reader: str | None = None
    secret_query: bool = False
    device: str = ""
    locate: str = ""
    protected: bool
    recorded: str = ""
    attests: bool
    pem_label: str
    openssl_provider: str | None

    @property
    def resident(self) -> bool:
        """Whether its keys stay in the device, so that a crash can leave one there: see `Sweeping`."""
        return bool(self.recorded)


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
        name="pkcs11",
        opener="stationkey.keystore.pkcs11:opener",
        example="pkcs11:token=station?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/stationkey/pin",
        located=True,
        reader="stationkey.keystore.pkcs11.uri:TokenUri.parse",
        device="(?<=module-path=)[^&]*",  # which takes one C_Initialize in a process
        locate="stationkey.keystore.pkcs11.keyfile:uri_of",
        protected=True,
        recorded="stationkey.keystore.pkcs11.inventory:recorded",
        attests=False,
        pem_label="PKCS#11 PROVIDER URI",
        openssl_provider="pkcs11",
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
