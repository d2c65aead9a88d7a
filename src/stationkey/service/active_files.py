"""The directory ``active/``: for each certificate type and EVSE, the key in use and its chain, in one PEM file.

And in another, the key before it, where the station may have to go back to that.

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

from stationkey.contract.active_names import DIRECTORY_NAME
from stationkey.errors import LedgerError
from stationkey.system import files
from stationkey.system.files import opened_regular

_LOCK: Final = ".lock"
_MODE: Final = 0o700
_IN_THE_WAY: Final = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST, errno.ELOOP})
"""A directory or a link where there should be a file."""

LOCK_TIMEOUT: Final = 5.0
"""Seconds to wait for another writer, who needs milliseconds."""


class ActiveDirectory:
    """The directory, for whoever may write the state directory: the daemon, and the ``keys`` commands beside it.

    Args:
        state_dir: the state directory; ``active/`` is made in it, with mode 0700.
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / DIRECTORY_NAME

    def sync(self, wanted: Callable[[], Mapping[str, bytes]]) -> list[Path]:
        """Make the directory show what `wanted` says, and nothing else.

        Args:
            wanted: gives the content of each file by its name, in the order in which they are written. Called with the
                directory locked, so that the last of two writers shows the last state of the ledger.

        Returns:
            The files that were written.

        Raises:
            LedgerError: the directory cannot be written; what could not be exchanged is as it was.
        """
        try:
            self._make()
            with self._locked():
                contents = wanted()
                troubles: list[OSError] = []
                # First what must not be there: it goes on a full disk, too, and makes room.
                gone = [file for file in self.path.iterdir() if file.name not in contents and file.name != _LOCK]
                for file in gone:
                    with _noted(troubles):
                        _remove(file)
                written = []
                for name, content in contents.items():
                    with _noted(troubles):
                        written.append(self._write(name, content))
                if gone or any(written):
                    files.sync_directory(self.path)
        except OSError as error:
            raise self._unwritable(error) from None
        if troubles:
            raise self._unwritable(troubles[0])
        return [path for path in written if path is not None]

    def _unwritable(self, error: OSError) -> LedgerError:
        path = error.filename or self.path
        hint = "make room, or give this user the rights; the ledger is right, and the file is made up for later"
        if error.errno in _IN_THE_WAY:
            hint = f"something else is in the way: move {path} out of {self.path}, which is stationkey's alone"
        return LedgerError(f"{path} cannot be written: {error.strerror}", reason="active_unwritable", hint=hint)

    def _make(self) -> None:
        """Make the directory, or close it to others. A link in its place is refused: it leads who knows where."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) != _MODE:
                os.fchmod(descriptor, _MODE)
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
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
        if _is_there(path, content):
            return None
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        files.exchange(path, content)
        return path


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_there(path: Path, content: bytes) -> bool:
    """Whether a regular file of ours, under this one name, has that content. Nothing that was planted is waited for."""
    try:
        with opened_regular(path, follow=False) as (file, status):
            if status.st_uid != os.geteuid() or status.st_nlink != 1 or status.st_mode & 0o077:
                return False
            return status.st_size == len(content) and file.read(len(content) + 1) == content
    except OSError:
        return False


def _remove(path: Path) -> None:
    """Take away a name, and never what a link leads to.

    Raises:
        OSError: a directory that is not empty. What is in it may be somebody's work, and is not deleted.
    """
    try:
        path.unlink()
    except IsADirectoryError:
        path.rmdir()


@contextmanager
def _noted(troubles: list[OSError]) -> Iterator[None]:
    """Go on after a trouble with one file: the others are to be right all the same."""
    try:
        yield
    except OSError as error:
        troubles.append(error)
