"""PKCS#11 URIs [RFC 7512]: which token, by which module, with which PIN; and which object in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from msgspec import Struct

from stationkey.config.secrets import MAX_SECRET, SecretReference
from stationkey.errors import ConfigurationError
from stationkey.system.bounded_command import ENVIRONMENT, run_bounded

_TOKEN: Final = ("token", "manufacturer", "serial", "model")
_QUERY: Final = ("module-path", "pin-source")
_ENCODED: Final = re.compile(r"(?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=&/?|]|%[0-9A-Fa-f]{2})*")
"""pk11-pchar and pk11-qchar, and the bar of a pin-source that is a command [RFC 7512 2.3, 2.4]."""
_COMMAND_TIMEOUT: Final = 10.0
"""Seconds that a program may take to print a PIN."""


def _invalid(words: str, hint: str = "") -> ConfigurationError:
    return ConfigurationError(f"invalid PKCS#11 URI: {words}", reason="keystore_uri_invalid", hint=hint)


def _attributes(text: str, separator: str) -> dict[str, bytes]:
    """Split attributes and decode their values.

    Raises:
        ConfigurationError: malformed, or an attribute is there twice.
    """
    found: dict[str, bytes] = {}
    for part in filter(None, text.split(separator)):
        name, equals, value = part.partition("=")
        if not equals or _ENCODED.fullmatch(value) is None:
            raise _invalid(f"attribute {name[:40]!r} is malformed", "percent-encode reserved characters [RFC 7512 2.3]")
        if name in found:
            raise _invalid(f"attribute {name[:40]!r} is given twice")
        found[name] = unquote_to_bytes(value)
    return found


def token_uri(token: Mapping[str, str]) -> str:
    """Return the URI of a token, with nothing in it that a shell or a server's configuration may interpret.

    Args:
        token: what names the token, by attribute.
    """
    named = [f"{name}={quote_from_bytes(token[name].encode(), safe='')}" for name in _TOKEN if token.get(name)]
    return "pkcs11:" + ";".join(named)


def object_uri(token: Mapping[str, str], identifier: bytes) -> str:
    """Return the URI of a private key in a token; see `token_uri`.

    Args:
        token: what names the token, by attribute.
        identifier: CKA_ID of the key.
    """
    return f"{token_uri(token)};id={''.join(f'%{byte:02x}' for byte in identifier)};type=private"


def identifier_of(uri: str) -> bytes:
    """Return the CKA_ID in the URI of a key.

    Raises:
        ValueError: no such URI.
    """
    try:
        return _attributes(uri.removeprefix("pkcs11:"), ";")["id"]
    except (ConfigurationError, KeyError):
        raise ValueError("not the URI of a key") from None


class PinSource(Struct, frozen=True):
    """Where the PIN of a token is: a file, a systemd credential, or a command that prints it.

    Args:
        source: ``file:/path``, ``credential:NAME``, or ``|/path`` of a program [RFC 7512 2.4].

    Raises:
        ConfigurationError: none of these.
    """

    source: str

    def __post_init__(self) -> None:
        kind, _, path = self.source.partition(":" if self.source.startswith("file:") else "|")
        if self.source.startswith("credential:"):
            SecretReference(self.source)
        elif kind not in {"file", ""} or not path.startswith("/") or "\0" in path:
            raise _invalid(
                "invalid pin-source",
                "give file:/path, credential:NAME for one of systemd's, or |/path of a program that prints it",
            )

    @property
    def file(self) -> SecretReference | None:
        """Where it is to be read; None if a program prints it."""
        return None if self.source.startswith("|") else SecretReference(self.source.removeprefix("file:"))

    def read(self) -> str:
        """Return the PIN.

        Raises:
            ConfigurationError: it cannot be read, is empty, too long or not UTF-8; the message does not tell it.
            StationKeyError: the program that prints it cannot be started.
        """
        pin = self._printed() if self.file is None else self.file.read()
        try:
            return pin.decode()
        except UnicodeDecodeError:
            raise ConfigurationError(
                "the PIN of the PKCS#11 token is not UTF-8", reason="secret_unreadable", hint="PKCS#11 wants UTF-8"
            ) from None

    def _printed(self) -> bytes:
        program = self.source[1:]
        status, output = run_bounded(
            [program], ENVIRONMENT, timeout=_COMMAND_TIMEOUT, limit=MAX_SECRET + 2, with_errors=False
        )
        pin = output.removesuffix(b"\n")
        if status != 0 or not pin or len(pin) > MAX_SECRET:
            told = "did not end" if status is None else f"ended with {status}" if status else "printed no PIN"
            raise ConfigurationError(f"cannot get the PIN: the program {program} {told}", reason="secret_unreadable")
        return pin


class TokenUri(Struct, frozen=True):
    """A token, and how to get at it.

    Attributes:
        wanted: what the token's label, manufacturer, serial number and model have to be, as far as they are given.
        module: path of the PKCS#11 module.
        pin: where the PIN is, or None for a token that wants none.
    """

    wanted: Mapping[str, str]
    module: Path
    pin: PinSource | None

    @classmethod
    def parse(cls, location: str) -> TokenUri:
        """Read a URI without its scheme.

        Raises:
            ConfigurationError: malformed, an attribute that does not name a token, no module, or a PIN in it.
        """
        path, _, query = location.partition("?")
        token, how = _attributes(path, ";"), _attributes(query, "&")
        if "pin-value" in {*token, *how}:
            raise _invalid("it contains the PIN", "use pin-source=file:/path; pin-value is refused")
        if unknown := [name for name in token if name not in _TOKEN] + [name for name in how if name not in _QUERY]:
            raise _invalid(
                f"attribute {unknown[0][:40]!r} is not supported",
                f"a token is named by {', '.join(_TOKEN)}, and found by {' and '.join(_QUERY)}",
            )
        if not token:
            raise _invalid("it names no token", "give its label: pkcs11:token=station?module-path=/usr/lib/…")
        try:
            wanted = {name: value.decode() for name, value in token.items()}
            module = Path(how.get("module-path", b"").decode())
            pin = PinSource(how["pin-source"].decode()) if "pin-source" in how else None
        except UnicodeDecodeError:
            raise _invalid("a value is not UTF-8") from None
        if not module.is_absolute() or "\0" in str(module):
            raise _invalid("module-path is missing or not absolute", "give the path of the token's PKCS#11 module")
        return cls(wanted, module, pin)
