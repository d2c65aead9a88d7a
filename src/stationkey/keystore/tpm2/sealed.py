"""The ``tpm2:`` store's files besides the keys: small ones in ``tpm/`` under the state directory.

- ``srk-HANDLE.name``: the name of the storage root key that sessions are salted with, as first seen, in hexadecimal.
- ``auth-ID.pem``: an authorisation value of keys that the TPM has sealed. ID says under which storage root key and to
  which values of registers, so that a cleared TPM or a new firmware gets one of its own, and the old one is still there
  should the old one come back.

Each is written once, whole or not at all, and never overwritten.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from stationkey.errors import KeyStoreError, Scope
from stationkey.keystore.tpm2.keyfile import LABEL, KeyFile, read_pem
from stationkey.system import files as durable
from stationkey.system.pem import to_pem

DIRECTORY_NAME: Final = "tpm"
MAX_SEALED: Final = 64
"""Sealed values that are kept. Beyond it the oldest goes: registers that never have the same value twice must not fill
the disk."""
_MAX_FILE: Final = 16 * 1024


class Kept:
    """The directory.

    Args:
        state_dir: the state directory; ``tpm/`` is made in it when something is written, with mode 0700.
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / DIRECTORY_NAME

    def directory(self) -> Path | None:
        """Return the directory, made where it is not there yet; None where it cannot be made."""
        try:
            self._make_directory()
        except OSError:
            return None
        return self.path

    def srk_file(self, handle: int) -> Path:
        """Where the name of the storage root key at a handle is."""
        return self.path / f"srk-{handle:08x}.name"

    def srk_name(self, handle: int, found: bytes) -> bytes:
        """The name of the storage root key at a handle as first seen, which is now where it never was before.

        Raises:
            KeyStoreError: the file cannot be read, or not be written.
        """
        path = self.srk_file(handle)
        content = self._read(path, Scope.STORE)
        if content is None:
            self._make(path, f"{found.hex()}\n".encode())
            content = self._read(path, Scope.STORE) or b""
        try:
            return bytes.fromhex(content.decode("ascii"))
        except ValueError:
            raise damaged(path, Scope.STORE) from None

    def sealed_file(self, parent: bytes, policy: bytes) -> Path:
        """Where the value is that is sealed under the parent of this name, with this policy digest."""
        return self.path / f"auth-{hashlib.sha256(parent + policy).hexdigest()[:16]}.pem"

    def sealed(self, path: Path, seal: Callable[[], KeyFile] | None) -> KeyFile | None:
        """Return the sealed data of a file; without a file, the result of `seal`, which may be None.

        Raises:
            KeyStoreError: the file is damaged, cannot be read or not be written.
        """
        # Every request needs it for a new key, or one key needs it that was made before. The key is not given up: the
        # file may be restored.
        scope = Scope.REQUEST if seal is None else Scope.STORE
        content = self._read(path, scope)
        if content is None and seal is not None:
            self._drop_oldest()
            self._make(path, to_pem(LABEL, seal().der()))
            content = self._read(path, scope)  # another process's, if it was faster
        if content is None:
            return None
        try:
            file = read_pem(content)
        except ValueError:
            file = None
        if file is None:
            raise damaged(path, scope)
        return file

    def _read(self, path: Path, scope: Scope) -> bytes | None:
        """Return the content of a regular file, or None. A symbolic link is not followed."""
        try:
            return durable.read_regular(path, limit=_MAX_FILE, follow=False)
        except FileNotFoundError:
            return None
        except (durable.NotRegular, durable.TooLarge):
            raise damaged(path, scope) from None
        except OSError as error:
            raise _unusable(path, error, scope) from None

    def _make(self, path: Path, content: bytes) -> None:
        try:
            self._make_directory()
            durable.make(path, content)
        except OSError as error:
            raise _unusable(path, error, Scope.STORE) from None

    def _make_directory(self) -> None:
        self.path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            durable.give(descriptor, self.path.parent)
        finally:
            os.close(descriptor)
        durable.sync_directory(self.path.parent)

    def _drop_oldest(self) -> None:
        try:
            files = sorted(self.path.glob("auth-*.pem"), key=lambda file: file.stat().st_mtime)
            for file in files[: max(0, len(files) - MAX_SEALED + 1)]:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise _unusable(self.path, error, Scope.STORE) from None


def damaged(path: Path, scope: Scope) -> KeyStoreError:
    """Return the error for a damaged file; `scope` says who needs it."""
    return KeyStoreError(
        f"{path} is damaged",
        reason="tpm_file_damaged",
        hint="restore it from a backup; see docs/operations.md",
        scope=scope,
    )


def _unusable(path: Path, error: OSError, scope: Scope) -> KeyStoreError:
    return KeyStoreError(
        f"{error.filename or path} cannot be used: {error.strerror}",
        reason="tpm_file_unusable",
        hint="the state directory must be readable and writable, and have room",
        scope=scope,
    )
