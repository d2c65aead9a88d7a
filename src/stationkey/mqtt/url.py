"""The URL of a broker."""

from __future__ import annotations

from typing import Final, Self
from urllib.parse import urlsplit

from msgspec import Struct

from stationkey.errors import ConfigurationError

DEFAULT_PORT: Final = 1883
DEFAULT_TLS_PORT: Final = 8883
MAX_SHOWN: Final = 120
"""Characters of an invalid URL that are shown."""


class Broker(Struct, frozen=True):
    """Where the broker is: ``mqtt://HOST[:PORT]``, or ``mqtts://HOST[:PORT]`` for TLS."""

    host: str
    port: int = DEFAULT_PORT
    tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read a broker URL.

        Raises:
            ConfigurationError: another scheme, no host, a port out of range, or a password in it.
        """
        hint = "for example mqtt://127.0.0.1:1883, or with TLS mqtts://broker.local:8883"
        if "@" in url:  # checked first: the messages for other mistakes show the URL
            raise ConfigurationError(
                "a broker URL must not contain a user name or password: every user can read a command line",
                reason="broker_invalid",
            )
        try:
            parts = urlsplit(url)
            tls = parts.scheme == "mqtts"
            port = (DEFAULT_TLS_PORT if tls else DEFAULT_PORT) if parts.port is None else parts.port
        except ValueError:
            raise ConfigurationError(f"invalid broker URL {_short(url)}", reason="broker_invalid", hint=hint) from None
        if (
            parts.scheme not in {"mqtt", "mqtts"}
            or not parts.hostname
            or parts.path not in {"", "/"}
            or parts.query
            or parts.fragment
            or port == 0
        ):
            raise ConfigurationError(f"invalid broker URL {_short(url)}", reason="broker_invalid", hint=hint)
        return cls(parts.hostname, port, tls)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt{'s' if self.tls else ''}://{host}:{self.port}"


def _short(text: str) -> str:
    """Return the beginning of a text that fits into a line."""
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…")
