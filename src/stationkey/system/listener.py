"""The listening socket of metrics and health: a loopback address or a UNIX socket.

It has no TLS and no password, so an address that other machines can reach is refused.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from pathlib import Path
from typing import Final, Self

from msgspec import Struct

from stationkey.errors import ConfigurationError
from stationkey.system.addresses import is_loopback

BACKLOG: Final = 128
"""Connections that the kernel queues; further ones are retried by the client after a second."""
SOCKET_MODE: Final = 0o660
_UNIX: Final = "unix:"
_MAX_UNIX: Final = 107
"""Longest path to a socket in bytes [unix(7)]."""
_MAX_PORT: Final = 65535
_HINT: Final = "for example 127.0.0.1:9464, [::1]:9464 or unix:/run/stationkey/metrics.sock"


class Address(Struct, frozen=True):
    """A loopback address and a port, or the path of a UNIX socket."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``127.0.0.1:PORT``, ``[::1]:PORT`` or ``unix:PATH``.

        Raises:
            ConfigurationError: it is invalid, or reachable from another machine.
        """
        if text.startswith(_UNIX):
            path = Path(text.removeprefix(_UNIX))
            if not path.is_absolute() or "\0" in text or len(os.fsencode(path)) > _MAX_UNIX:
                raise _invalid(f"{text!r} must name an absolute path of {_MAX_UNIX} bytes at the most")
            return cls(path=path)
        host, _, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        try:
            address = ipaddress.ip_address(bare)
            number = int(port) if port.isascii() and port.isdecimal() else 0
        except ValueError:
            address, number = None, 0
        if address is None or not 0 < number <= _MAX_PORT or (address.version == 6) != (bare != host):  # noqa: PLR2004 - IPv6
            raise _invalid(f"{text!r} is neither an address with a port nor unix:PATH")
        if not is_loopback(bare):
            raise ConfigurationError(
                f"[metrics] listen: other machines can reach {text}, and there is no TLS and no password",
                reason="metrics_not_loopback",
                hint=f"listen on a loopback address and put a reverse proxy or an agent in front; {_HINT}",
            )
        return cls(str(address), number)

    def __str__(self) -> str:
        if self.path is not None:
            return f"{_UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Listener:
    """A socket that listens at an address. Closing it removes the file of a UNIX socket.

    Args:
        address: where to listen.

    Raises:
        ConfigurationError: it is in use, or not permitted.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._file: tuple[int, int] | None = None
        try:
            if address.path is None:
                family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
                self.socket = socket.create_server((address.host, address.port), family=family, backlog=BACKLOG)
            else:
                self.socket = self._in_file(address.path)
        except OSError as error:
            raise ConfigurationError(
                f"[metrics] listen: {address} cannot be used: {error.strerror or error}",
                reason="metrics_cannot_listen",
                hint="does another program use it, or does the directory not exist?",
            ) from None

    def _in_file(self, path: Path) -> socket.socket:
        _remove_stale(path)
        listening = socket.socket(socket.AF_UNIX)
        # Created with its mode: chmod afterwards could follow a link that was planted meanwhile.
        mask = os.umask(0o777 & ~SOCKET_MODE)
        try:
            listening.bind(str(path))
        except OSError:
            listening.close()
            raise
        finally:
            os.umask(mask)
        made = path.lstat()
        self._file = made.st_dev, made.st_ino
        listening.listen(BACKLOG)
        return listening

    def close(self) -> None:
        """Stop listening."""
        if self._file is not None and self.address.path is not None:
            with contextlib.suppress(OSError):
                there = self.address.path.lstat()
                if (there.st_dev, there.st_ino) == self._file:  # not replaced by another program's meanwhile
                    self.address.path.unlink()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _invalid(words: str) -> ConfigurationError:
    return ConfigurationError(f"[metrics] listen: {words}", reason="metrics_listen_invalid", hint=_HINT)


def _remove_stale(path: Path) -> None:
    """Remove the socket of a killed run, if no program listens at it."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigurationError(
            f"[metrics] listen: {path} exists, and is not a socket",
            reason="metrics_cannot_listen",
            hint="nothing was removed; name another path",
        )
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(1.0)
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigurationError(
        f"[metrics] listen: another program listens at {path}", reason="metrics_cannot_listen", hint="name another path"
    )
