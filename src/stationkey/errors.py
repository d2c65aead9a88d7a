"""The error family: whose fault it is, the answer on the wire, what the operator should do.

Every failure that a person may meet is a `StationKeyError`. The MQTT answer, the exit code of the command and the log
line are all made from the same object, so they cannot disagree. No message in here ever carries a secret: no
authorisation value, no private blob, no password.
"""

from __future__ import annotations

from enum import StrEnum


class Fault(StrEnum):
    """Who can put it right."""

    REQUEST = "request"
    """The asking side sent something that the contract, a profile or the policy does not allow."""
    DEVICE = "device"
    """The key store: the TPM is gone, hung, full, locked, or has not got the algorithm."""
    OPERATOR = "operator"
    """The configuration, the command line or the rights on this machine."""
    STORAGE = "storage"
    """The ledger: a full disk, a damaged or newer database, a state directory in use."""
    BROKER = "broker"
    """The MQTT broker."""


class Scope(StrEnum):
    """How much fails for the same reason."""

    REQUEST = "request"
    """This request, message or command alone."""
    KEY = "key"
    """One key: another key can be used."""
    DEVICE = "device"
    """The key store's device: unreachable, so the key store serves no request."""
    STORE = "store"
    """The key store or the ledger as a whole: reachable, but serves no request."""


class StationKeyError(Exception):
    """Base of every error of this project.

    Args:
        message: one sentence for a person, without secrets.
        reason: a stable, lower-case identifier for logs, metrics and the ledger, for example ``country_name_invalid``.
        hint: what to do about it, or an empty string where the message says it all.
        transient: whether the same may succeed later with nothing changed by hand; None for what its class says.
        scope: how much fails for the same reason; None for what its class says.

    Declare a reason where it is raised, with its `transient` and `scope`. Control flow uses these, not the reason.
    """

    fault: Fault = Fault.OPERATOR
    exit_code: int = 1
    transient: bool = False
    scope: Scope = Scope.REQUEST

    def __init__(
        self, message: str, *, reason: str, hint: str = "", transient: bool | None = None, scope: Scope | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.hint = hint
        if transient is not None:
            self.transient = transient
        if scope is not None:
            self.scope = scope

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class MessageError(StationKeyError):
    """A message on ``josev/cs`` is ours and is wrong.

    `request_id` is the id to reject, character for character as it came, or None where the message carries no usable
    one and so cannot be answered (contract, decision 4).
    """

    fault = Fault.REQUEST

    def __init__(self, message: str, *, reason: str, request_id: str | None = None) -> None:
        super().__init__(message, reason=reason)
        self.request_id = request_id


class RequestRefused(StationKeyError):
    """A well-formed request that may not be served: an id used twice with different content, or against the policy."""

    fault = Fault.REQUEST


class UnsupportedAlgorithm(StationKeyError):
    """The key store's device lacks a curve, hash or key size. Raised before a key is made."""

    fault = Fault.DEVICE


class KeyStoreError(StationKeyError):
    """The key store cannot serve: the TPM is unreachable, hung, full, locked, or holds something else at the SRK."""

    fault = Fault.DEVICE


class ConfigurationError(StationKeyError):
    """The configuration file, an option or the environment asks for something that cannot be. Refused at start."""

    fault = Fault.OPERATOR


class LedgerError(StationKeyError):
    """The ledger cannot be read or written."""

    fault = Fault.STORAGE
    scope = Scope.STORE


class BrokerError(StationKeyError):
    """The MQTT broker is unreachable, or refuses. The daemon retries forever."""

    fault = Fault.BROKER
    transient = True


class NotVerified(StationKeyError):
    """Evidence, or its accompanying data, is invalid; see `stationkey.attestation`."""

    fault = Fault.REQUEST
    exit_code = 3
