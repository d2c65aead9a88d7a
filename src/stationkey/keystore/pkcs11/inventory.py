"""The record of what this station has in tokens: a file for each key, named by its CKA_ID, in the state directory.

Its content is the URI of the key, by which its token is known. A file that a crash left empty is of any token.

The file is created durably before the token makes the key, and removed after the key is destroyed. So a key that a
crash leaves in the token has a file, and an object without one belongs to another program.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from stationkey.errors import KeyStoreError
from stationkey.keystore.pkcs11.uri import object_uri
from stationkey.system.files import read_regular, sync_directory

_LOOKS: Final = 10
"""How many looks pass, one a minute, before something is certain: that the token does not have a key on record (it may
finish after a crash what it was asked before), or that a key of this process has missed its way to the ledger."""
ID_LENGTH: Final = 14
"""Bytes of a CKA_ID. The label then has 39 characters: some devices take 40 (YubiHSM 2)."""
_NAME: Final = re.compile(rf"[0-9a-f]{{{2 * ID_LENGTH}}}")
DIRECTORY_NAME: Final = "pkcs11"
"""Of the files, in the state directory."""
_URI: Final = 4096
"""Bytes of a file at most."""
LABEL: Final = "stationkey {}"
"""CKA_LABEL of a key, by its CKA_ID in hexadecimal."""


class Inventory:
    """The files.

    Args:
        directory: of the files; made where it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._looks: Counter[bytes] = Counter()
        self._known = {bytes.fromhex(name) for name in self._names()}  # by earlier processes, or once in the ledger

    def new(self, token: Mapping[str, str]) -> bytes:
        """Record a key that is about to be made, durably, and return its CKA_ID.

        Args:
            token: what names the token, by attribute.

        Raises:
            KeyStoreError: the file cannot be written.
        """
        identifier = secrets.token_bytes(ID_LENGTH)
        try:
            if not self.directory.exists():
                self.directory.mkdir(mode=0o700)
                sync_directory(self.directory.parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with open(os.open(self.directory / identifier.hex(), flags, 0o600), "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(object_uri(token, identifier).encode())
            sync_directory(self.directory)
        except OSError as error:
            raise KeyStoreError(
                f"cannot record a key in {self.directory}: {error.strerror}", reason="state_dir_unusable"
            ) from None
        return identifier

    def drop(self, identifier: bytes) -> None:
        """Forget a key that the token does not have any more."""
        del self._looks[identifier]  # a Counter takes that for one that it does not have
        with suppress(OSError):  # it is looked for again at the next start
            (self.directory / identifier.hex()).unlink(missing_ok=True)

    def drop_missing(self, identifier: bytes) -> None:
        """Forget a key that the token has not made, if it was looked for often enough."""
        if self._looked(identifier):
            self.drop(identifier)

    def ended(self, living: Collection[bytes]) -> list[bytes]:
        """Return the keys on record here, of all tokens, that are certainly none of the ledger's any more.

        A key of this process that was never in the ledger may be on its way there for a while, though a request that
        misses its deadline leaves its key behind. One of an earlier process is not.

        Args:
            living: CKA_IDs of the keys whose private part the ledger has.
        """
        names = {bytes.fromhex(name) for name in self._names()}
        self._known |= names & set(living)
        self._known |= {identifier for identifier in names - self._known if self._looked(identifier)}
        return sorted((names & self._known) - set(living))

    def _looked(self, identifier: bytes) -> bool:
        """Count a look at a key; return whether it was the last that is needed."""
        self._looks[identifier] += 1
        if self._looks[identifier] < _LOOKS:
            return False
        del self._looks[identifier]
        return True

    def is_in(self, identifier: bytes, token: Mapping[str, str]) -> bool:
        """Return whether a key is in a token, as far as is recorded.

        Args:
            identifier: CKA_ID of the key.
            token: what names the token, by attribute.
        """
        return self._uri(identifier.hex()) in {"", object_uri(token, identifier)}

    def refused_pin(self, uri: str) -> Path:
        """Return the file that remembers the PIN that the token of a key store refused."""
        place = hashlib.sha256(uri.partition("?")[0].encode()).hexdigest()[:16]
        return self.directory / f"pin-refused-{place}"

    def uris(self) -> set[str]:
        """Return the URIs of the keys on record."""
        return {self._uri(name) for name in self._names()} - {""}

    def _uri(self, name: str) -> str:
        try:
            return read_regular(self.directory / name, limit=_URI, follow=False).decode(errors="replace")
        except OSError:
            return ""

    def _names(self) -> list[str]:
        try:
            return [path.name for path in self.directory.iterdir() if _NAME.fullmatch(path.name)]
        except FileNotFoundError:
            return []


def recorded(state_dir: Path) -> set[str]:
    """Return the URIs of the keys that a station has in tokens, or is making there.

    Args:
        state_dir: its state directory.
    """
    return Inventory(state_dir / DIRECTORY_NAME).uris()
