"""The key store in a PKCS#11 token: a secure element, an HSM, OP-TEE. Opening a store loads python-pkcs11."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from stationkey.config.settings import TpmTerms
from stationkey.errors import ConfigurationError
from stationkey.keystore.pkcs11.inventory import DIRECTORY_NAME, FileInventory, Inventory, refused_pin
from stationkey.keystore.pkcs11.uri import TokenUri
from stationkey.keystore.refusal import refuse_tpm_terms

if TYPE_CHECKING:
    from stationkey.keystore.protocol import KeyStore

__all__ = ["opener"]


def opener(
    location: str,
    *,
    terms: TpmTerms | None,
    state_dir: Path | None,
    guest: bool,  # noqa: ARG001 - a token is not cleared of what others have in it
    inventory: Inventory | None = None,
) -> Callable[[], KeyStore]:
    """See `stationkey.keystore.keystore_opener`; the location is a PKCS#11 URI without its scheme [RFC 7512].

    Args:
        location: see there, and the same for the next ones.
        terms: none.
        state_dir: the state directory.
        guest: of no use here.
        inventory: the record of a site; None for the files in the state directory.

    Raises:
        ConfigurationError: invalid URI, unsafe module, no state directory, python-pkcs11 is missing, or TPM options.
    """
    token = TokenUri.parse(location)
    refuse_tpm_terms(terms, "pkcs11")
    if state_dir is None:
        raise ConfigurationError("a pkcs11 key store needs a state directory", reason="state_dir_unnamed")
    if find_spec("pkcs11") is None:
        raise ConfigurationError(
            "a pkcs11 key store needs python-pkcs11, which is not installed",
            reason="extra_missing",
            hint="install the extra [pkcs11]: docs/install.md, on Debian in /usr/share/doc/stationkey",
        )
    directory, uri = state_dir / DIRECTORY_NAME, f"pkcs11:{location}"
    record = FileInventory(directory) if inventory is None else inventory

    def open_store() -> KeyStore:
        from stationkey.keystore.pkcs11.store import Pkcs11KeyStore  # noqa: PLC0415 - only who needs it pays for it

        return Pkcs11KeyStore(uri, token, record, refused_pin(directory, uri))

    return open_store
