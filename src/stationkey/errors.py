"""The error family: whose fault it is, the answer on the wire, and what the operator should do.

Every failure that a user may see is a `StationKeyError`. The MQTT answer, the command's exit status and the log line
are made from the same object, so they cannot disagree. No message contains a secret: no authorisation value, no private
blob, no password.
"""

from __future__ import annotations

from enum import StrEnum


class Fault(StrEnum):
    """Where the fault must be corrected."""

    REQUEST = "request"
    """The requester: a message violates the contract, a profile or the policy."""
    DEVICE = "device"
    """The key store: the TPM is gone, hung, full, locked, or lacks the algorithm."""
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
        hint: what to do about it, or an empty string.
        transient: whether a retry may succeed without a change by hand; None for the default of the class.
        scope: how much fails for the same reason; None for the default of the class.

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
    """A message for stationkey on ``josev/cs`` is invalid.

    `request_id` is the id to reject, unchanged, or None if the message has no usable id and cannot be answered
    (contract, decision 4).
    """

    fault = Fault.REQUEST

    def __init__(self, message: str, *, reason: str, request_id: str | None = None) -> None:
        super().__init__(message, reason=reason)
        self.request_id = request_id


class RequestRefused(StationKeyError):
    """A valid request that must not be served: an id used again with other content, or refused by the policy."""

    fault = Fault.REQUEST


class UnsupportedAlgorithm(StationKeyError):
    """The key store's device lacks a curve, hash or key size. Raised before a key is made."""

    fault = Fault.DEVICE


class KeyStoreError(StationKeyError):
    """The key store cannot serve: the TPM is unreachable, hung, full, locked, or holds something else at the SRK."""

    fault = Fault.DEVICE


class ConfigurationError(StationKeyError):
    """The configuration file, an option or the environment is invalid. Refused at start."""

    fault = Fault.OPERATOR


class LedgerError(StationKeyError):
    """The ledger cannot be read or written."""

    fault = Fault.STORAGE
    scope = Scope.STORE


class ShardLost(LedgerError):
    """Another daemon of the site has taken over the stations; it answers instead. Nothing was changed."""

    transient = True


class BrokerError(StationKeyError):
    """The MQTT broker is unreachable, or refuses. The daemon retries forever."""

    fault = Fault.BROKER
    transient = True


class NotVerified(StationKeyError):
    """Evidence, or its accompanying data, is invalid; see `stationkey.attestation`."""

    fault = Fault.REQUEST
    exit_code = 3
