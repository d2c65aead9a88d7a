"""The directory ``active/``: for each certificate type and EVSE, the key in use and its chain, in one PEM file.

Key and chain are in one file because a file is what can be exchanged atomically: whoever opens it reads the old pair
or the new pair. The directory only shows what the ledger says; `ActiveDirectory.sync` makes it so after every change
and at every start, which also repairs what a loss of power left behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from stationkey import durable
from stationkey.errors import LedgerError

DIRECTORY_NAME: Final = "active"
_SUFFIX: Final = ".pem"
_LOCK: Final = ".lock"
_MODE: Final = 0o700

LOCK_TIMEOUT: Final = 5.0
"""Seconds to wait for another writer, who needs milliseconds."""

Owner = tuple[str, str]
"""Certificate type and EVSE ID, the latter empty where there is none: what there is one active key for."""


def file_name(owner: Owner) -> str:
    """``<certificate_type>[.<evse_id>].pem``.

    In the EVSE ID, all but letters, digits, ``_``, ``-`` and ``~`` is percent-encoded, so that it has neither dot nor
    slash and can be read back (`owner_of`).
    """
    certificate_type, evse_id = owner
    encoded = "." + quote(evse_id, safe="").replace(".", "%2E") if evse_id else ""
    return f"{certificate_type}{encoded}{_SUFFIX}"


def owner_of(name: str) -> Owner | None:
    """Whose file `name` is; None where it is no name that `file_name` gives."""
    if not name.endswith(_SUFFIX):
        return None
    certificate_type, _, encoded = name.removesuffix(_SUFFIX).partition(".")
    owner = (certificate_type, unquote(encoded))
    return owner if file_name(owner) == name else None


class ActiveDirectory:
    """The directory, for whoever may write the state directory: the daemon, and the ``keys`` commands beside it.

    Args:
        state_dir: the state directory; ``active/`` is made in it, with mode 0700.
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / DIRECTORY_NAME

    def sync(self, wanted: Callable[[], Mapping[Owner, bytes]]) -> list[Path]:
        """Make the directory show what `wanted` says, and nothing else.

        Args:
            wanted: gives for each owner the content of his file. Called with the directory locked, so that the last of
                two writers shows the last state of the ledger.

        Returns:
            The files that were written.

        Raises:
            LedgerError: the directory cannot be written; what could not be exchanged is as it was.
        """
        try:
            self._make()
            with self._locked():
                contents = {file_name(owner): content for owner, content in wanted().items()}
                # First what must not be there: it goes on a full disk, too, and makes room.
                gone = [file for file in self.path.iterdir() if file.name not in contents and file.name != _LOCK]
                for file in gone:
                    file.unlink()
                written = [self._write(name, content) for name, content in contents.items()]
                if gone or any(written):
                    durable.sync_directory(self.path)
        except OSError as error:
            raise LedgerError(
                f"{error.filename or self.path} cannot be written: {error.strerror}",
                reason="active_unwritable",
                hint="make room, or give this user the rights; the ledger is right, and the file is made up for later",
            ) from None
        return [path for path in written if path is not None]

    def _make(self) -> None:
        """Make the directory, or close it to others. A symbolic link in its place is refused: it leads who knows where.

        What root makes is given to whom the state directory belongs.
        """
        self.path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) != _MODE:
                os.fchmod(descriptor, _MODE)
            durable.give(descriptor, self.path.parent)
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            durable.give(descriptor, self.path.parent)
            end = time.monotonic() + LOCK_TIMEOUT
            while not _try_lock(descriptor):
                if time.monotonic() > end:
                    raise TimeoutError(errno.ETIMEDOUT, "another process has it locked", str(self.path / _LOCK))
                time.sleep(0.01)  # flock has no timeout, and a command that was suspended may hold it for ever
            yield
        finally:
            os.close(descriptor)

    def _write(self, name: str, content: bytes) -> Path | None:
        """Exchange a file atomically; None where it is as it should be."""
        path = self.path / name
        if _read(path) == content:
            return None
        durable.exchange(path, content)
        return path


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path) -> bytes | None:
    """The content of a regular file of ours; None for anything else, a planted symbolic link included."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        file = os.fdopen(descriptor, "rb")
    except OSError:
        return None
    with file:
        status = os.fstat(descriptor)
        return file.read() if stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077 else None
