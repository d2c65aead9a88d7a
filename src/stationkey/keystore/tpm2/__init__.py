"""The key store in a TPM 2.0. What needs tpm2-tss is loaded when a store is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stationkey.config.settings import TpmTerms
from stationkey.errors import ConfigurationError

if TYPE_CHECKING:
    from stationkey.keystore.protocol import KeyStore

__all__ = ["opener"]


def opener(location: str, *, terms: TpmTerms | None, state_dir: Path | None, guest: bool) -> Callable[[], KeyStore]:
    """See `stationkey.keystore.keystore_opener`; the location is a TCTI.

    Raises:
        ConfigurationError: terms that need a state directory, without one.
    """
    terms = terms or TpmTerms()
    if state_dir is None and (terms.key_auth == "generated" or terms.session != "none"):
        raise ConfigurationError(
            "key_auth = generated, and sessions, need a state directory", reason="state_dir_unnamed"
        )

    def open_store() -> KeyStore:
        from stationkey.keystore.tpm2.store import Tpm2KeyStore  # noqa: PLC0415 - only a daemon pays for tpm2-tss

        return Tpm2KeyStore(location, terms=terms, state_dir=state_dir, guest=guest)

    return open_store
