"""The meaning of a device's return code; each store has a table of them."""

from __future__ import annotations

from msgspec import Struct

from stationkey.errors import KeyStoreError, Scope


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
