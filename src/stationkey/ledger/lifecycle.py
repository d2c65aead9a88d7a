"""The lifecycle of a key as a table.

States are those of NIST SP 800-57 part 1 revision 5, section 7. `docs/lifecycle.md` shows the table as a diagram; a
test fails where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from stationkey.errors import Scope, StationKeyError


class KeyState(StrEnum):
    """Where a key is in its life."""

    PRE_ACTIVATION = "pre-activation"
    """Made ahead, or its CSR was answered; no certificate is installed. Used only for proofs of possession."""
    ACTIVE = "active"
    """Its certificate is installed. At most one key for each certificate type, EVSE and, where told apart, root."""
    DEACTIVATED = "deactivated"
    """Replaced, or retired by the operator. Kept for a while because sessions may still use it, or the station may have
    to go back to it."""
    COMPROMISED = "compromised"
    """Reported as compromised by the operator. Kept as evidence until the operator destroys it."""
    DESTROYED = "destroyed"
    """Its private part is wiped everywhere. Its history stays on record for a while."""


class KeyEvent(StrEnum):
    """What can happen to a key."""

    INSTALLED = "installed"
    """Josev installed its certificate."""
    INSTALLATION_FAILED = "installation failed"
    """Josev failed to install it. A retry may succeed; otherwise the key expires soon."""
    CONFIRMED = "confirmed"
    """The station is known to have connected with its certificate [A02.FR.10]."""
    REPLACED = "replaced"
    """Another key became active for the same certificate type and EVSE [A02.FR.08]."""
    RESTORED = "restored"
    """The station went back to its certificate [A02.FR.28]."""
    RETIRED = "retired"
    """Taken out of use by the operator."""
    EXPIRED = "expired"
    """No certificate was installed in time, or the grace period ended [A02.FR.10]."""
    DELETED = "deleted"
    """Josev deleted its certificate."""
    DESTRUCTION_ORDERED = "destruction ordered"
    """Destroyed by the operator."""
    COMPROMISE_REPORTED = "compromise reported"
    """Reported as compromised by the operator."""


TRANSITIONS: Final[Mapping[tuple[KeyState, KeyEvent], KeyState]] = MappingProxyType(
    {
        (KeyState.PRE_ACTIVATION, KeyEvent.INSTALLED): KeyState.ACTIVE,
        (KeyState.PRE_ACTIVATION, KeyEvent.INSTALLATION_FAILED): KeyState.PRE_ACTIVATION,
        (KeyState.PRE_ACTIVATION, KeyEvent.EXPIRED): KeyState.DESTROYED,
        (KeyState.PRE_ACTIVATION, KeyEvent.DELETED): KeyState.DESTROYED,
        (KeyState.PRE_ACTIVATION, KeyEvent.DESTRUCTION_ORDERED): KeyState.DESTROYED,
        (KeyState.PRE_ACTIVATION, KeyEvent.COMPROMISE_REPORTED): KeyState.COMPROMISED,
        (KeyState.ACTIVE, KeyEvent.CONFIRMED): KeyState.ACTIVE,
        (KeyState.ACTIVE, KeyEvent.REPLACED): KeyState.DEACTIVATED,
        (KeyState.ACTIVE, KeyEvent.RETIRED): KeyState.DEACTIVATED,
        (KeyState.ACTIVE, KeyEvent.DELETED): KeyState.DESTROYED,
        (KeyState.ACTIVE, KeyEvent.DESTRUCTION_ORDERED): KeyState.DESTROYED,
        (KeyState.ACTIVE, KeyEvent.COMPROMISE_REPORTED): KeyState.COMPROMISED,
        (KeyState.DEACTIVATED, KeyEvent.RESTORED): KeyState.ACTIVE,
        (KeyState.DEACTIVATED, KeyEvent.EXPIRED): KeyState.DESTROYED,
        (KeyState.DEACTIVATED, KeyEvent.DELETED): KeyState.DESTROYED,
        (KeyState.DEACTIVATED, KeyEvent.DESTRUCTION_ORDERED): KeyState.DESTROYED,
        (KeyState.DEACTIVATED, KeyEvent.COMPROMISE_REPORTED): KeyState.COMPROMISED,
        (KeyState.COMPROMISED, KeyEvent.DELETED): KeyState.DESTROYED,
        (KeyState.COMPROMISED, KeyEvent.DESTRUCTION_ORDERED): KeyState.DESTROYED,
    }
)
"""(state, event) to the next state. Everything else is illegal."""

INITIAL: Final = KeyState.PRE_ACTIVATION
"""The state of a new key."""

MADE_AHEAD: Final = "made ahead"
CSR_ANSWERED: Final = "CSR answered"
"""The first events of a key. One made ahead has both, the second when a request takes it."""


class IllegalTransition(StationKeyError):
    """An event that is illegal in the key's state. Nothing was changed."""

    scope = Scope.KEY


def step(state: KeyState, event: KeyEvent) -> KeyState:
    """Return the state after an event.

    Raises:
        IllegalTransition: the event is illegal in this state.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(
            f"a key that is {state} cannot have the event '{event}'", reason="illegal_transition"
        ) from None
