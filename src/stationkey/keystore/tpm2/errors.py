"""The words for what goes wrong with a TPM. Codes are in hexadecimal, as tpm2_rc_decode takes them."""

from __future__ import annotations

from typing import Any, Final

from stationkey.config.settings import TpmTerms
from stationkey.errors import KeyStoreError
from stationkey.keystore.tpm2 import return_codes as rc

_WORDS: Final = {
    rc.LOCKOUT: (
        "tpm_lockout",
        "the TPM is in lockout",
        "it ends by itself after the TPM's lockout interval, or with tpm2_dictionarylockout --clear-lockout",
    ),
    **dict.fromkeys(
        (rc.INITIALIZE, rc.REFERENCE_H0, rc.REFERENCE_S0),
        ("tpm_reset", "the TPM was reset while it was in use", "ask again"),
    ),
    rc.OBJECT_MEMORY: ("tpm_full", "the TPM has no free slot", "another program holds keys loaded"),
    **dict.fromkeys(
        rc.SESSIONS_FULL, ("tpm_full", "the TPM has no room for another session", "other programs hold them all")
    ),
    rc.INTEGRITY: (
        "key_of_another_tpm",
        "the key was made by another TPM, or before this one was cleared, or its blob is damaged",
        "it cannot be used again; ask for a new certificate",
    ),
}
"""Reason, words and hint for a return code."""


def of_code(error: Any) -> KeyStoreError:
    """By the return code of a ``TSS2_Exception``."""
    reason, words, hint = _WORDS.get(rc.code(error), ("tpm_error", f"the TPM refused: {error}", ""))
    return KeyStoreError(f"{words} ({error.rc:#x})", reason=reason, hint=hint)


def auth_refused(whose: str, option: str, configured: object, code: str) -> KeyStoreError:
    """An authorisation value that is missing or wrong, by the option that names it."""
    if configured is None:
        words = f"{whose} has an authorisation value, and [tpm] {option} is not set ({code})"
        hint = f"let {option} name a file or a credential that has it"
    else:
        words = f"the authorisation value of {whose} is another than [tpm] {option} says ({code})"
        hint = f"put the right value where {option} points to"
    return KeyStoreError(words, reason="tpm_auth", hint=hint)


def parent_refused(handle: int, terms: TpmTerms, code: str) -> KeyStoreError:
    """The authorisation value of a storage key that is missing or wrong."""
    if handle == terms.srk_handle:
        return auth_refused("the storage root key", "srk_auth", terms.srk_auth, code)
    return KeyStoreError(
        f"the storage key at {handle:#x}, which the key hangs on, has an authorisation value ({code})",
        reason="tpm_auth",
        hint=f"[tpm] srk_auth is for the one at {terms.srk_handle:#x} only",
    )


def altered(code: str) -> KeyStoreError:
    """A session shows that somebody has had a hand in."""
    return KeyStoreError(
        f"what goes to the TPM or comes from it was altered on its way ({code})",
        reason="tpm_altered",
        hint="is the bus disturbed, or is there something between this machine and the TPM? Each request tries again",
    )


def pcr_changed(registers: object, code: str) -> KeyStoreError:
    """Registers have other values than a key is bound to."""
    return KeyStoreError(
        f"the key is bound to {registers}, whose values are not those that it was made with ({code})",
        reason="pcr_changed",
        hint="it works again with the firmware and settings of then; otherwise ask for a new certificate",
    )


def key_auth_wrong(words: str, *, hint: str) -> KeyStoreError:
    """The authorisation value of a key is not there, or another."""
    return KeyStoreError(words, reason="key_auth_wrong", hint=hint)
