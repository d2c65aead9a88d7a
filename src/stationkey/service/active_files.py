"""The directory ``active/``: for each certificate type and EVSE, the active key and its chain, in one PEM file.

The key before it, if the station may go back to it, is in a second file.

Key and chain are in one file because a file can be replaced atomically: a reader gets the old pair or the new pair. The
directory mirrors the ledger; `ActiveDirectory.sync` updates it after every change and at every start, which also
repairs it after a power cut.
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

from stationkey.contract.active_names import DIRECTORY_NAME, read_name
from stationkey.errors import LedgerError
from stationkey.system import files
from stationkey.system.files import opened_regular

_LOCK: Final = ".lock"
_MODE: Final = 0o700
_IN_THE_WAY: Final = frozenset({errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST, errno.ELOOP})
"""A directory or a link in the place of a file."""

LOCK_TIMEOUT: Final = 5.0
"""Seconds to wait for another writer, which needs milliseconds."""


class ActiveDirectory:
    """The directory, as written by the daemon and by the ``keys`` commands beside it.

    Args:
        state_dir: the state directory; ``active/`` is made in it, with mode 0700.
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / DIRECTORY_NAME
        self._durable = False

    def sync(
        self, wanted: Callable[[], Mapping[str, bytes]], *, owns: Callable[[str], bool] = lambda _: True
    ) -> list[Path]:
        """Make the directory contain the files of `wanted`, and nothing else, but for other shards' files.

        Args:
            wanted: returns the content of each file by its name, in the order of writing. Called with the directory
                locked, so that the last of two writers shows the last state of the ledger.
            owns: whether a station is in `wanted` if it has a file. Files of others stay as they are.

        Returns:
            The files that were written.

        Raises:
            LedgerError: the directory cannot be written; files that could not be replaced are unchanged.
        """
        try:
            self._make()
            with self._locked():
                contents = wanted()
                troubles: list[OSError] = []
                # Remove first: that works on a full disk, too, and makes room.
                kept = {*contents, _LOCK}
                gone = [file for file in self.path.iterdir() if file.name not in kept and _is_of(file, owns)]
                for file in gone:
                    with _noted(troubles):
                        _remove(file)
                written = []
                for name, content in contents.items():
                    with _noted(troubles):
                        written.append(self._write(name, content))
                if gone or any(written) or not self._durable:
                    self._durable = False  # if this fails, the next call tries again
                    files.sync_directory(self.path)
                    self._durable = True
        except OSError as error:
            raise self._unwritable(error) from None
        if troubles:
            raise self._unwritable(troubles[0])
        return [path for path in written if path is not None]

    def stations(self) -> set[str]:
        """Return the stations that have a file; none if the directory cannot be read."""
        try:
            names = [read_name(file.name) for file in self.path.iterdir()]
        except OSError:
            return set()
        return {name.owner.station for name in names if name is not None}

    def _unwritable(self, error: OSError) -> LedgerError:
        path = error.filename or self.path
        hint = "make room, or give this user the rights; the ledger is right, and the file is written later"
        if error.errno in _IN_THE_WAY:
            hint = f"move {path} out of {self.path}, which is for stationkey only"
        return LedgerError(f"{path} cannot be written: {error.strerror}", reason="active_unwritable", hint=hint)

    def _make(self) -> None:
        """Create the directory, or close it to others. A link in its place is refused."""
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
                    raise TimeoutError(errno.ETIMEDOUT, "another process holds the lock", str(self.path / _LOCK))
                time.sleep(0.01)  # flock has no timeout, and a suspended command may hold it forever
            yield
        finally:
            os.close(descriptor)

    def _write(self, name: str, content: bytes) -> Path | None:
        """Replace a file atomically and return its path; None if it is already right."""
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


def _is_of(file: Path, owns: Callable[[str], bool]) -> bool:
    """Return whether a file is one of such a station, or of nobody."""
    name = read_name(file.name)
    return name is None or owns(name.owner.station)


def _is_there(path: Path, content: bytes) -> bool:
    """Return whether a regular file of ours with one name has this content; never blocks on a planted FIFO."""
    try:
        with opened_regular(path, follow=False) as (file, status):
            if status.st_uid != os.geteuid() or status.st_nlink != 1 or status.st_mode & 0o077:
                return False
            return status.st_size == len(content) and file.read(len(content) + 1) == content
    except OSError:
        return False


def _remove(path: Path) -> None:
    """Remove a name, never the target of a link.

    Raises:
        OSError: it is a directory that is not empty, which is not deleted.
    """
    try:
        path.unlink()
    except IsADirectoryError:
        path.rmdir()


@contextmanager
def _noted(troubles: list[OSError]) -> Iterator[None]:
    """Note an error of one file and go on with the others."""
    try:
        yield
    except OSError as error:
        troubles.append(error)
