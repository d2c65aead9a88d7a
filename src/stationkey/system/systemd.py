"""Notifications to systemd: ready, stopping, a status line, and watchdog keep-alives [sd_notify(3)].

One datagram each. Without ``NOTIFY_SOCKET`` nothing is sent.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Final, Self

log = logging.getLogger(__name__)

PATIENCE: Final = 1.0
"""Seconds that a notification which is sent once may wait for room. Repeated ones do not wait, because the event loop
must not block."""


class ServiceManager:
    """The service manager that started this process, if there is one.

    Args:
        address: ``NOTIFY_SOCKET``: a path, or ``@`` and an abstract name; empty for none.
        watchdog: seconds within which it expects a keep-alive, or None.
    """

    def __init__(self, address: str = "", *, watchdog: float | None = None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog = watchdog if address else None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Return the service manager of the environment. A watchdog for another process is ignored."""
        microseconds, process = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
        wanted = microseconds.isdecimal() and int(microseconds) > 0 and process in {"", str(os.getpid())}
        return cls(environment.get("NOTIFY_SOCKET", ""), watchdog=int(microseconds) / 1e6 if wanted else None)

    def __bool__(self) -> bool:
        """Return whether there is a service manager."""
        return bool(self._address)

    def ready(self) -> None:
        """Report that the service has started."""
        self._tell("READY=1", patience=PATIENCE)

    def stopping(self) -> None:
        """Report that the service is stopping."""
        self._tell("STOPPING=1", patience=PATIENCE)

    def status(self, line: str) -> None:
        """Set the line of ``systemctl status``, which every user can read."""
        self._tell("STATUS=" + line.replace("\n", " "))

    def alive(self) -> None:
        """Send a keep-alive to the watchdog."""
        self._tell("WATCHDOG=1")

    def _tell(self, state: str, *, patience: float = 0.0) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notification:
                notification.settimeout(patience)
                notification.sendto(state.encode(), self._address)
        except OSError as error:
            log.warning("notification to systemd failed: %s: %s", state.partition("=")[0], error)
