"""The record of what a station or a site has in tokens.

Each key is recorded durably before the token makes it, and forgotten after it is destroyed there. So a key that a crash
leaves in the token is on record, and an object without a record belongs to another program.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, Protocol

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


class Ended(NamedTuple):
    """Keys to be looked for in a token, and destroyed.

    Attributes:
        identifiers: their CKA_IDs.
        more: whether there are others.
    """

    identifiers: list[bytes]
    more: bool = False


class Inventory(Protocol):
    """The record. Its methods are called on the threads of the key stores, and may be called on several at a time.

    Raises:
        StationKeyError: the record cannot be read or written; nothing was changed.
    """

    def new(self, token: Mapping[str, str], *, within: float = 0.0) -> bytes:
        """Record a key that is about to be made, durably, and return its CKA_ID.

        Args:
            token: what names the token, by attribute.
            within: seconds to wait for a record that is away for a moment.
        """
        ...

    def ended(self, living: Collection[bytes] | None, token: Callable[[], Mapping[str, str]]) -> Ended:
        """Return the keys on record in a token that are certainly not in the ledger any more.

        Args:
            living: CKA_IDs of the keys whose private part the ledger has; None if the record knows by itself.
            token: returns what names the token, by attribute; called only if there are such keys.
        """
        ...

    def end(self, identifier: bytes) -> bool:
        """Record that a key is going to be destroyed in its token.

        Returns:
            Whether it may be: False if the ledger has it, or if it is not on record any more.
        """
        ...

    def is_in(self, identifier: bytes, token: Mapping[str, str]) -> bool:
        """Return whether a key is in a token, as far as is recorded.

        Args:
            identifier: CKA_ID of the key.
            token: what names the token, by attribute.
        """
        ...

    def drop(self, identifier: bytes, *, found: bool = True) -> None:
        """Forget a key that the token does not have any more.

        Args:
            identifier: CKA_ID of the key.
            found: whether the token had it before it was destroyed there.
        """
        ...

    def drop_missing(self, identifier: bytes) -> None:
        """Forget a key that the token has not made, if it was looked for often enough."""
        ...


class SiteRecord(Inventory, Protocol):
    """The record that all daemons of a site share: what is in tokens, and which key stores the site's keys are in."""

    def admit(self, identity: str, *, fits: Callable[[str], bool], reached: Callable[[str], bool]) -> None:
        """Record the device of a key store that a daemon has opened, or refuse it.

        Args:
            identity: of the device: see `stationkey.keystore.KeyStore.identity`.
            fits: whether a device with this identity fits the URI of the key store.
            reached: whether it fits the URI of any key store of the daemon.

        Raises:
            ConfigurationError: the site's keys are in another device, which the daemon does not reach.
            StationKeyError: the record cannot be read or written.
        """
        ...


class FileInventory:
    """A file for each key, named by its CKA_ID, in the state directory of one station.

    Its content is the URI of the key, by which its token is known. A file that a crash left empty is of any token.

    Args:
        directory: of the files; made where it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._looks: Counter[bytes] = Counter()
        self._known = {bytes.fromhex(name) for name in self._names()}  # by earlier processes, or once in the ledger

    def new(self, token: Mapping[str, str], *, within: float = 0.0) -> bytes:  # noqa: ARG002 - a disk is there or not
        """See `Inventory.new`.

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

    def drop(self, identifier: bytes, *, found: bool = True) -> None:  # noqa: ARG002 - one that was not made has no use
        """See `Inventory.drop`."""
        del self._looks[identifier]  # a Counter takes that for one that it does not have
        with suppress(OSError):  # it is looked for again at the next start
            (self.directory / identifier.hex()).unlink(missing_ok=True)

    def drop_missing(self, identifier: bytes) -> None:
        """See `Inventory.drop_missing`."""
        if self._looked(identifier):
            self.drop(identifier)

    def ended(self, living: Collection[bytes] | None, token: Callable[[], Mapping[str, str]]) -> Ended:
        """See `Inventory.ended`.

        A key of this process that was never in the ledger may be on its way there for a while, though a request that
        misses its deadline leaves its key behind. One of an earlier process is not.
        """
        if living is None:
            raise ValueError("files do not tell which keys the ledger has")
        names = {bytes.fromhex(name) for name in self._names()}
        self._known |= names & set(living)
        self._known |= {identifier for identifier in names - self._known if self._looked(identifier)}
        ended = sorted((names & self._known) - set(living))
        if not ended:
            return Ended([])
        there = token()
        return Ended([identifier for identifier in ended if self.is_in(identifier, there)])

    def end(self, identifier: bytes) -> bool:  # noqa: ARG002 - the ledger that has the key is its only user's
        """See `Inventory.end`."""
        return True

    def _looked(self, identifier: bytes) -> bool:
        """Count a look at a key; return whether it was the last that is needed."""
        self._looks[identifier] += 1
        if self._looks[identifier] < _LOOKS:
            return False
        del self._looks[identifier]
        return True

    def is_in(self, identifier: bytes, token: Mapping[str, str]) -> bool:
        """See `Inventory.is_in`."""
        return self._uri(identifier.hex()) in {"", object_uri(token, identifier)}

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
    return FileInventory(state_dir / DIRECTORY_NAME).uris()


def refused_pin(directory: Path, uri: str) -> Path:
    """Return the file that remembers the PIN that the token of a key store refused.

    Args:
        directory: of the record in the state directory.
        uri: of the key store.
    """
    place = hashlib.sha256(uri.partition("?")[0].encode()).hexdigest()[:16]
    return directory / f"pin-refused-{place}"
