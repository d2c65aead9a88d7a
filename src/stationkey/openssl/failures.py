"""Failures of ``stationkey tls-config --check``, by exit status."""

from __future__ import annotations

from typing import Final

from stationkey.errors import Fault, Scope, StationKeyError

EXIT_KEY: Final = 3
EXIT_DEVICE: Final = 4
EXIT_MODULE: Final = 5
EXIT_FILE: Final = 6


class TlsCheckFailed(StationKeyError):
    """A service cannot use the key. `exit_code` says where the fault is."""

    def __init__(self, message: str, *, reason: str, exit_code: int, hint: str = "") -> None:
        of_device = exit_code == EXIT_DEVICE
        scope = Scope.DEVICE if of_device else Scope.REQUEST
        super().__init__(message, reason=reason, hint=hint, transient=of_device, scope=scope)
        self.exit_code = exit_code
        self.fault = Fault.DEVICE if of_device else Fault.OPERATOR
