"""``stationkey health``: the daemon's health, for a field engineer, a script or a container."""

from __future__ import annotations

import http.client
import socket
import sys
from typing import Final

import click

from stationkey.cli._options import Configured, configured, wrong_usage
from stationkey.errors import ConfigurationError, StationKeyError
from stationkey.system.listener import Address

PATIENCE: Final = 10.0
"""Seconds."""
MAX_REPORT: Final = 64 * 1024
"""Bytes."""


class _Connection(http.client.HTTPConnection):
    """A connection to a loopback address or a UNIX socket."""

    def __init__(self, address: Address) -> None:
        super().__init__(address.host or "localhost", address.port or None, timeout=PATIENCE)
        self._path = address.path

    def connect(self) -> None:
        if self._path is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))


def ask(address: Address) -> tuple[bool, str]:
    """Return whether the daemon at an address is healthy, and its report in JSON.

    Raises:
        StationKeyError: no answer.
    """
    connection = _Connection(address)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        return response.status == http.client.OK, response.read(MAX_REPORT).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise StationKeyError(
            f"no answer at {address}: {getattr(error, 'strerror', None) or 'the answer is not HTTP'}",
            reason="health_unreachable",
            hint="is stationkey serve running, with [metrics] listen set to this address?",
        ) from None
    finally:
        connection.close()


def _authority(address: str) -> str:
    """Return the address of a URL, or the unchanged text if it is none; the path is always ``/health``."""
    authority = address.removeprefix("http://") if address.startswith("http://") else ""
    return authority.partition("/")[0] or address


@click.command()
@click.argument("address", required=False)
@configured(file="Configuration file (TOML) of the daemon.", needs_keystore=False)
def health(address: str | None, settings: Configured) -> None:
    """Print the health of the running daemon.

    ADDRESS is [metrics] listen of the daemon, also as a URL (http://127.0.0.1:9464); by default that of the
    configuration file.

    \b
    Exit status: 0 healthy, 1 not healthy or no answer, 2 wrong usage.
    """  # noqa: D301 - \b is click's mark for lines to be left as they are: the character itself
    address = settings().metrics if address is None else _authority(address)
    if not address:
        raise ConfigurationError(
            "no address: give ADDRESS, or [metrics] listen in the configuration",
            reason="health_unasked",
            hint="[metrics] listen in the configuration file makes the daemon answer",
        )
    with wrong_usage():
        where = Address.parse(address)
    well, report = ask(where)
    click.echo(report, nl=False)
    if not well:
        sys.exit(1)
