"""Secrets by reference: the configuration names the place of a secret, never its value.

A reference is the path of a file, or ``credential:NAME`` for a systemd credential (``LoadCredential=`` and
``LoadCredentialEncrypted=`` [systemd.exec(5)]). The value is in no message, log line or repr.
"""

from __future__ import annotations

import codecs
import functools
import logging
import os
import re
import stat
from pathlib import Path
from typing import Final

from msgspec import Struct

from stationkey.errors import ConfigurationError
from stationkey.system.files import opened_regular

MAX_SECRET: Final = 4096
"""Largest secret in bytes."""

_CREDENTIAL: Final = "credential:"
_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")


log = logging.getLogger(__name__)


def _oddity(secret: bytes) -> str:
    """Return what an editor may have added to a text secret; empty if nothing."""
    if secret.startswith(codecs.BOM_UTF8):
        return "begins with a byte order mark"
    try:
        text = secret.decode()
    except UnicodeDecodeError:
        return ""
    return "begins or ends with a blank" if text != text.strip() else ""


@functools.lru_cache(maxsize=64)
def _warn(words: str) -> None:
    """Log once in a run: a secret is read at each connection."""
    log.warning("%s", words)


class SecretReference(Struct, frozen=True):
    """The place of a secret.

    Args:
        source: a path, or ``credential:NAME``.

    Raises:
        ConfigurationError: it is neither.
    """

    source: str

    def __post_init__(self) -> None:
        name = self.source.removeprefix(_CREDENTIAL)
        if self.source.startswith(_CREDENTIAL):
            right = _NAME.fullmatch(name) is not None and name.strip(".") != ""
        else:
            right = self.source != "" and "\0" not in self.source
        if not right:
            raise ConfigurationError(
                f"{self.source[:80]!r} is not a valid reference to a secret",
                reason="secret_invalid",
                hint="give the path of a file, or credential:NAME for one from systemd's LoadCredential=",
            )

    @property
    def path(self) -> Path:
        """Return the file of the secret.

        Raises:
            ConfigurationError: it is a credential, and systemd passed none to this process.
        """
        if not self.source.startswith(_CREDENTIAL):
            return Path(self.source)
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if not directory:
            raise ConfigurationError(
                f"{self.source} is a systemd credential, but systemd passed none to this process",
                reason="secret_unreadable",
                hint="add LoadCredential= or LoadCredentialEncrypted= to the unit, or name a file",
            )
        return Path(directory, self.source.removeprefix(_CREDENTIAL))

    def read(self, *, limit: int = MAX_SECRET) -> bytes:
        """Return the secret, without a line feed at its end.

        Args:
            limit: its largest size in bytes.

        Raises:
            ConfigurationError: it cannot be read, is empty or too long, or others than its owner and group may read it.
                The message names the file, and shows nothing of its content.
        """
        path = self.path
        try:
            with opened_regular(path, follow=True) as (file, status):
                if status.st_mode & stat.S_IRWXO:
                    raise self._unreadable(
                        f"{path} is open to every user of this machine (mode {stat.S_IMODE(status.st_mode):04o})",
                        hint=f"chmod o= {path}",
                    )
                secret = file.read(limit + 1)
        except OSError as error:
            raise self._unreadable(f"{path} cannot be read: {error.strerror}") from None
        secret = secret.removesuffix(b"\n").removesuffix(b"\r")
        if not secret:
            raise self._unreadable(f"{path} is empty")
        if len(secret) > limit:
            raise self._unreadable(f"{path} has more than {limit} bytes")
        if odd := _oddity(secret):
            _warn(f"the secret {path} {odd}, which counts as part of it")
        return secret

    def _unreadable(self, message: str, *, hint: str = "") -> ConfigurationError:
        return ConfigurationError(f"the secret {message}", reason="secret_unreadable", hint=hint)
