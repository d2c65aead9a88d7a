"""Notifications to systemd: ready, stopping, a status line, and watchdog keep-alives [sd_notify(3)].

One datagram each; the packages for it have not been kept since 2017. Without ``NOTIFY_SOCKET`` nothing is sent.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Final, Self

log = logging.getLogger(__name__)

PATIENCE: Final = 1.0
"""Seconds that something which is said once may wait for room at the other end. What is said again and again waits for
none: nothing on the event loop may block."""


class ServiceManager:
    """The service manager that started this process, if there is one.

    Args:
        address: ``NOTIFY_SOCKET``: a path, or ``@`` and an abstract name; empty for none.
        watchdog: seconds within which it wants a sign of life; None where it wants none.
    """

    def __init__(self, address: str = "", *, watchdog: float | None = None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog = watchdog if address else None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Return the one that the environment names. A watchdog for another process is ignored."""
        microseconds, process = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
        wanted = microseconds.isdecimal() and int(microseconds) > 0 and process in {"", str(os.getpid())}
        return cls(environment.get("NOTIFY_SOCKET", ""), watchdog=int(microseconds) / 1e6 if wanted else None)

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._address)

    def ready(self) -> None:
        """The service has started."""
        self._tell("READY=1", patience=PATIENCE)

    def stopping(self) -> None:
        """The service is about to end."""
        self._tell("STOPPING=1", patience=PATIENCE)

    def status(self, line: str) -> None:
        """One line for ``systemctl status``. Everybody on the machine can read it."""
        self._tell("STATUS=" + line.replace("\n", " "))

    def alive(self) -> None:
        """A sign of life for the watchdog."""
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
