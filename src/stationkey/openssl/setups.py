"""What OpenSSL needs to use the keys of a key store: a provider or an engine, and its configuration."""

from __future__ import annotations

import _ssl
import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from stationkey.errors import ConfigurationError

_PROVIDERS: Final = ("OPENSSL_MODULES", 1003)
_ENGINES: Final = ("OPENSSL_ENGINES", 1002)
"""Variable, and OPENSSL_INFO_MODULES_DIR and OPENSSL_INFO_ENGINES_DIR [OPENSSL_info(3)]."""

HEAD: Final = """\
# OpenSSL with the keys under active/, which are in a {device}. Made by: stationkey tls-config
#
# Only for the services that use such a key: it replaces the system's openssl.cnf.
"""
TAIL: Final = """\

# As Debian has it. The suites of ISO 15118-2 pass.
[stationkey_ssl]
system_default = stationkey_tls

[stationkey_tls]
MinProtocol = TLSv1.2
CipherString = DEFAULT@SECLEVEL=2
"""


class Sign(NamedTuple):
    """A message on standard error that explains a failure.

    Attributes:
        text: part of the message.
        meaning: for the operator.
        hint: what to do.
        of_device: whether the fault is the device's, and not the key's.
    """

    text: str
    meaning: str
    hint: str
    of_device: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What OpenSSL needs to use the keys of a key store.

    Attributes:
        device: where the keys are: ``TPM`` or ``token``.
        module: OpenSSL's name for the provider or engine.
        engine: whether it is an engine.
        package: Debian's package with it.
        install: what to install where it is missing.
        configuration: text of the file that ``OPENSSL_CONF`` names.
        variables: environment variables besides.
        shared: whether several handshakes at a time can be tried without harm to the device.
        servers: configurations of TLS servers by name, as ``tls-config --for`` prints them.
        locked_part: from the name and content of a key's file the private part for which the key store knows a value,
            see `stationkey.keystore.Locking.auth_value`; None if the key needs no value.
        signs: messages that explain a failure.
        reason: of the error when the device fails.
    """

    device: str
    module: str
    engine: bool = False
    package: str
    install: str
    configuration: str
    variables: Mapping[str, str] = field(default_factory=dict)
    shared: bool
    servers: Mapping[str, str]
    locked_part: Callable[[str, bytes], bytes | None]
    signs: Sequence[Sign] = ()
    reason: str

    @property
    def description(self) -> str:
        """Name the module, for a message."""
        return f"{self.module} {'engine' if self.engine else 'provider'}"

    def write(self, path: Path) -> dict[str, str]:
        """Write OpenSSL's configuration, and return the environment variables of a service that uses it."""
        path.write_text(self.configuration, encoding="utf-8")
        return {"OPENSSL_CONF": str(path), **self.variables}

    def text(self, server: str | None) -> str:
        """Return OpenSSL's configuration, or that of a TLS server.

        Raises:
            ConfigurationError: the server cannot use such a key.
        """
        if server is None:
            return self.configuration
        if server not in self.servers:
            raise ConfigurationError(
                f"{server} cannot use a key in a {self.device} by the {self.description}",
                reason="server_unsupported",
                hint=f"these can: {', '.join(sorted(self.servers))}; docs/tls.md has more",
            )
        return self.servers[server]

    def installed(self) -> bool:
        """Return whether this process's OpenSSL has the module."""
        variable, number = _ENGINES if self.engine else _PROVIDERS
        directory = os.environ.get(variable) or _openssl_directory(number)
        return directory is not None and Path(directory, f"{self.module}.so").is_file()


def _openssl_directory(number: int) -> str | None:
    """Return a directory of the OpenSSL that Python's `ssl` uses; None if that is not a shared library."""
    try:
        info = ctypes.CDLL(getattr(_ssl, "__file__", None)).OPENSSL_info
    except (OSError, AttributeError):
        return None
    info.restype = ctypes.c_char_p
    told: bytes = info(number)
    return told.decode()
