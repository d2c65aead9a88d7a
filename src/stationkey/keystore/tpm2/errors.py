"""The words for what goes wrong with a TPM. Codes are in hexadecimal, as tpm2_rc_decode takes them."""

from __future__ import annotations

from typing import Any, Final

from stationkey.config.settings import TpmTerms
from stationkey.errors import KeyStoreError, Scope
from stationkey.keystore.refusal import Refusal
from stationkey.keystore.tpm2 import return_codes as rc

_RESET: Final = Refusal(
    reason="tpm_reset",
    words="the TPM was reset while it was in use",
    hint="ask again",
    transient=True,
    scope=Scope.STORE,
)
_BUSY: Final = Refusal(
    reason="tpm_busy",
    words="the TPM asked to be tried again later, and did so until the time was over",
    hint="each request tries again; if it lasts, reset the TPM",
    transient=True,
    scope=Scope.STORE,
)
_NO_SLOT: Final = Refusal(
    reason="tpm_full",
    words="the TPM has no free slot",
    hint="another program holds keys loaded",
    transient=True,
    scope=Scope.STORE,
)
_NO_SESSION: Final = Refusal(
    reason="tpm_full",
    words="the TPM has no room for another session",
    hint="other programs hold them all",
    transient=True,
    scope=Scope.STORE,
)
_REFUSALS: Final = {
    rc.LOCKOUT: Refusal(
        reason="tpm_lockout",
        words="the TPM is in lockout",
        hint="it ends after the TPM's lockout interval, or with tpm2_dictionarylockout --clear-lockout",
        transient=True,
        scope=Scope.STORE,
    ),
    rc.INITIALIZE: _RESET,
    rc.REFERENCE_H0: _RESET,
    rc.REFERENCE_S0: _RESET,
    **dict.fromkeys(rc.BUSY, _BUSY),
    rc.OBJECT_MEMORY: _NO_SLOT,
    rc.OBJECT_HANDLES: _NO_SLOT,
    rc.SESSION_MEMORY: _NO_SESSION,
    rc.SESSION_HANDLES: _NO_SESSION,
    rc.INTEGRITY: Refusal(
        reason="key_of_another_tpm",
        words="the key was made by another TPM, or before this one was cleared, or its blob is damaged",
        hint="it cannot be used again; ask for a new certificate",
        scope=Scope.KEY,
    ),
}


def of_code(error: Any) -> KeyStoreError:
    """By the return code of a ``TSS2_Exception``."""
    refusal = _REFUSALS.get(rc.code(error)) or Refusal(
        reason="tpm_error", words=f"the TPM refused: {error}", scope=Scope.KEY
    )
    return refusal.error(f"{error.rc:#x}")


def auth_refused(whose: str, option: str, configured: object, code: str) -> KeyStoreError:
    """An authorisation value that is missing or wrong, by the option that names it."""
    if configured is None:
        words = f"{whose} has an authorisation value, and [tpm] {option} is not set ({code})"
        hint = f"let {option} name a file or a credential that has it"
    else:
        words = f"the authorisation value of {whose} is another than [tpm] {option} says ({code})"
        hint = f"put the right value where {option} points to"
    return KeyStoreError(words, reason="tpm_auth", hint=hint, scope=Scope.STORE)


def parent_refused(handle: int, terms: TpmTerms, code: str) -> KeyStoreError:
    """The authorisation value of a storage key that is missing or wrong."""
    if handle == terms.srk_handle:
        return auth_refused("the storage root key", "srk_auth", terms.srk_auth, code)
    return KeyStoreError(
        f"the storage key at {handle:#x}, which the key hangs on, has an authorisation value ({code})",
        reason="tpm_auth",
        hint=f"[tpm] srk_auth is for the one at {terms.srk_handle:#x} only",
        scope=Scope.STORE,
    )


class SessionInDoubtError(Exception):
    """A command was refused over its session: it may have been altered when it began, and another one may do.

    Args:
        error: the error if another session is refused too.
    """

    def __init__(self, error: KeyStoreError) -> None:
        super().__init__(error.reason)
        self.error = error


def altered(code: str) -> KeyStoreError:
    """Return the error for a session that shows an alteration on the bus."""
    return KeyStoreError(
        f"what goes to the TPM or comes from it was altered on its way ({code})",
        reason="tpm_altered",
        hint="is the bus disturbed, or is there something between this machine and the TPM? Each request tries again",
        transient=True,
    )


def pcr_changed(registers: object, code: str) -> KeyStoreError:
    """Registers have other values than a key is bound to."""
    return KeyStoreError(
        f"the key is bound to {registers}, whose values are not those that it was made with ({code})",
        reason="pcr_changed",
        hint="it works again with the firmware and settings of then; otherwise ask for a new certificate",
        scope=Scope.KEY,
    )


def key_auth_wrong(words: str, *, hint: str) -> KeyStoreError:
    """The authorisation value of a key is not there, or another."""
    return KeyStoreError(words, reason="key_auth_wrong", hint=hint, scope=Scope.KEY)
