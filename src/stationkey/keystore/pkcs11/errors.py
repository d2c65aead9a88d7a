"""Errors of a token, by the return value of its module [PKCS #11 3.1, 5.1.6]."""

from __future__ import annotations

from typing import Final

import pkcs11

from stationkey.errors import KeyStoreError, Scope
from stationkey.keystore.refusal import Refusal

_AGAIN: Final = "each request retries; if it lasts, reset the token"


_GONE: Final = Refusal(
    reason="pkcs11_token_missing",
    words="the token is gone or was removed",
    hint="plug it in; each request retries",
    transient=True,
    scope=Scope.DEVICE,
)
_SESSION: Final = Refusal(
    reason="pkcs11_session_lost",
    words="the session with the token was lost",
    hint=_AGAIN,
    scope=Scope.STORE,
    transient=True,
)
_FAILED: Final = Refusal(
    reason="pkcs11_failed", words="the token or its module failed", hint=_AGAIN, transient=True, scope=Scope.DEVICE
)
_PIN_WRONG: Final = Refusal(
    reason="pkcs11_pin_wrong",
    words="the token refused the PIN",
    hint="correct the PIN in pin-source; the refused one is not tried again",
    scope=Scope.STORE,
)
_PIN_LOCKED: Final = Refusal(
    reason="pkcs11_pin_locked",
    words="the PIN of the token is locked",
    hint="unlock it with the security officer's PIN, for example pkcs11-tool --init-pin",
    scope=Scope.STORE,
)
_PIN_UNSET: Final = Refusal(
    reason="pkcs11_pin_locked",
    words="the token has no valid user PIN",
    hint="set one, for example with pkcs11-tool --init-pin",
    scope=Scope.STORE,
)
_FULL: Final = Refusal(
    reason="pkcs11_token_full",
    words="the token has no room for another key",
    hint="lower [lifecycle] pending_total and pool, in a site pending_in; or remove other programs' objects",
    scope=Scope.STORE,
    transient=True,
)
_KEY_GONE: Final = Refusal(
    reason="key_of_another_token",
    words="the token does not have this key",
    hint="was the token exchanged or initialised? Then request a new certificate",
    scope=Scope.KEY,
)
UNFIT: Final = Refusal(
    reason="pkcs11_refused",
    words="the token refuses such a key or signature",
    hint="use another token or another algorithm",
    scope=Scope.KEY,
)
_REFUSALS: Final[dict[type[Exception], Refusal]] = {
    **dict.fromkeys(
        (pkcs11.DeviceRemoved, pkcs11.TokenNotPresent, pkcs11.TokenNotRecognised, pkcs11.NoSuchToken), _GONE
    ),
    **dict.fromkeys(
        (
            pkcs11.SessionHandleInvalid,
            pkcs11.SessionClosed,
            pkcs11.UserNotLoggedIn,
            pkcs11.ObjectHandleInvalid,
            pkcs11.KeyHandleInvalid,
        ),
        _SESSION,
    ),
    pkcs11.PinIncorrect: _PIN_WRONG,
    pkcs11.PinInvalid: _PIN_WRONG,
    pkcs11.PinLenRange: _PIN_WRONG,
    pkcs11.PinLocked: _PIN_LOCKED,
    pkcs11.PinExpired: _PIN_UNSET,
    pkcs11.UserPinNotInitialized: _PIN_UNSET,
    pkcs11.DeviceMemory: _FULL,
    pkcs11.NoSuchKey: _KEY_GONE,
    **dict.fromkeys(
        (
            pkcs11.MechanismInvalid,
            pkcs11.MechanismParamInvalid,
            pkcs11.TemplateInconsistent,
            pkcs11.TemplateIncomplete,
            pkcs11.AttributeValueInvalid,
            pkcs11.AttributeTypeInvalid,
            pkcs11.DomainParamsInvalid,
            pkcs11.KeySizeRange,
        ),
        UNFIT,
    ),
}
LOST: Final = (
    pkcs11.DeviceRemoved,
    pkcs11.TokenNotPresent,
    pkcs11.NoSuchToken,
    pkcs11.SessionHandleInvalid,
    pkcs11.SessionClosed,
    pkcs11.UserNotLoggedIn,
    pkcs11.ObjectHandleInvalid,
    pkcs11.KeyHandleInvalid,
    pkcs11.GeneralError,
    pkcs11.DeviceError,
    pkcs11.FunctionFailed,
)
"""Errors after which a new session may succeed."""


def of(error: pkcs11.PKCS11Error, *, doing: str) -> KeyStoreError:
    """Return the error of a key store for one of the module's.

    Args:
        error: as python-pkcs11 raises it.
        doing: the called function of PKCS #11, such as ``C_Login``.
    """
    refusal = _REFUSALS.get(type(error), _FAILED)
    return refusal.error(f"{type(error).__name__} by {doing}")


def full(objects: int) -> KeyStoreError:
    """No room in a token that holds this many objects."""
    return _FULL.error(f"DeviceMemory, {objects} objects in it")


def pin_kept_back(why: str) -> KeyStoreError:
    """Return the error for a PIN that is not tried, so that the token does not lock."""
    return KeyStoreError(
        f"the PIN of the token is not tried: {why}",
        reason="pkcs11_pin_wrong",
        hint="correct the PIN in pin-source; or log in to the token once with it, which resets its counter",
        scope=Scope.STORE,
    )
