"""What the key stores refuse in the same words, and the meaning of a device's return code: each has a table of them."""

from __future__ import annotations

from msgspec import Struct

from stationkey.config.settings import TpmTerms
from stationkey.errors import ConfigurationError, KeyStoreError, Scope
from stationkey.keystore.protocol import KeyRef


class Refusal(Struct, frozen=True, kw_only=True):
    """The meaning of a return code: the fields of `KeyStoreError`."""

    reason: str
    words: str
    hint: str = ""
    transient: bool = False
    scope: Scope

    def error(self, code: str) -> KeyStoreError:
        """Return the error, with the device's own code for it."""
        return KeyStoreError(
            f"{self.words} ({code})", reason=self.reason, hint=self.hint, transient=self.transient, scope=self.scope
        )


def refuse_foreign(key: KeyRef, scheme: str) -> None:
    """Refuse a key of another scheme.

    Raises:
        KeyStoreError: it is one.
    """
    if key.scheme != scheme:
        raise KeyStoreError(
            f"key {key.key_id} is in a {key.scheme}: key store, and this one is {scheme}:",
            reason="key_of_another_store",
            scope=Scope.KEY,
        )


def refuse_tpm_terms(terms: TpmTerms | None, scheme: str) -> None:
    """Refuse options that a key store other than a TPM cannot keep.

    Raises:
        ConfigurationError: one is set.
    """
    given, default = terms or TpmTerms(), TpmTerms()
    names = [name for name in TpmTerms.__struct_fields__ if getattr(given, name) != getattr(default, name)]
    if names:
        raise ConfigurationError(
            f"[tpm] {', '.join(names)} does not apply to a {scheme} key store",
            reason="tpm_terms_without_tpm",
            hint="remove these options, or name a TPM as the key store",
        )
