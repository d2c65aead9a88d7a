"""Read untrusted files, and write files atomically.

A path may lead to a FIFO, a device, a link or an endless file. `opened_regular` and `read_regular` open without
blocking, accept regular files only, and read up to a limit. A file that vanishes is a `FileNotFoundError`.
`read_bounded` and `write_text` are for paths on an operator's command line, where a pipe is fine.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from stationkey.errors import ConfigurationError

MAX_FILE: Final = 256 * 1024
"""Largest file that a command reads, in bytes."""
UNFINISHED: Final = ".new"
"""Suffix of a file that is being written."""


class NotRegular(OSError):
    """The path is not a regular file."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(errno.EINVAL, "not a regular file", str(path))


class TooLarge(OSError):
    """The file is larger than the limit."""

    def __init__(self, path: str | Path, limit: int) -> None:
        super().__init__(errno.EFBIG, f"more than {limit} bytes", str(path))


@contextmanager
def opened_regular(
    path: str | Path, *, follow: bool, directory: int | None = None
) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open a regular file for reading, without blocking.

    Args:
        path: the file.
        follow: whether the last part of the path may be a symbolic link.
        directory: descriptor of the directory that `path` is relative to, or None.

    Yields:
        The file and its status.

    Raises:
        NotRegular: it is a directory, a FIFO, a socket or a device.
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, dir_fd=directory)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotRegular(path)
        with open(descriptor, "rb", closefd=False) as file:
            yield file, status
    finally:
        os.close(descriptor)


def read_regular(path: str | Path, *, limit: int, follow: bool, directory: int | None = None) -> bytes:
    """Return the content of a regular file; see `opened_regular`.

    Args:
        path: the file.
        limit: largest size in bytes.
        follow: whether the last part of the path may be a symbolic link.
        directory: descriptor of the directory that `path` is relative to, or None.

    Raises:
        NotRegular: it is a directory, a FIFO, a socket or a device.
        TooLarge: it has more than `limit` bytes.
        OSError: it cannot be read.
    """
    with opened_regular(path, follow=follow, directory=directory) as (file, _):
        content = file.read(limit + 1)
    if len(content) > limit:
        raise TooLarge(path, limit)
    return content


def read_bounded(path: Path) -> bytes:
    """Return the content of a file of at most `MAX_FILE` bytes; of standard input for ``-``.

    Raises:
        ConfigurationError: it cannot be read, or is too large.
    """
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(MAX_FILE + 1)
        else:
            with path.open("rb") as file:
                data = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:
        words = error.strerror if isinstance(error, OSError) else "not a path"
        raise ConfigurationError(f"{path} cannot be read: {words}", reason="file_unreadable") from None
    if len(data) > MAX_FILE:
        raise ConfigurationError(f"{path} has more than {MAX_FILE} bytes", reason="file_unreadable")
    return data


def read_bounded_text(path: Path) -> str:
    """Return the text of a file; see `read_bounded`.

    Raises:
        ConfigurationError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        return read_bounded(path).decode()
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path} is not UTF-8", reason="file_unreadable") from None


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a file, or replace it atomically.

    Args:
        path: the file.
        text: its content.
        private: make it readable for the owner only, also if others could read the old file.

    Raises:
        ConfigurationError: it cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(path, flags, 0o600 if private else 0o666), "w", encoding="utf-8") as file:
            if private:
                os.fchmod(file.fileno(), 0o600)
            file.write(text)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}", reason="out_unwritable") from None


def exchange(path: Path, content: bytes) -> None:
    """Replace or create a file with mode 0600, atomically; `sync_directory` makes that durable.

    Raises:
        OSError: it cannot be written; the file is unchanged.
    """
    _write(path, content).replace(path)


def make(path: Path, content: bytes) -> bool:
    """Create a file with mode 0600, durably; return False and change nothing if it exists.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = _write(path, content)
    try:
        os.link(unfinished, path, follow_symlinks=False)  # a rename would replace an existing file
    except FileExistsError:
        return False
    finally:
        unfinished.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True


def give(descriptor: int, owner: Path) -> None:
    """Change the owner of a file that root created to that of `owner`.

    SQLite does the same with its files: ``sudo stationkey`` must not lock the daemon out.
    """
    if os.geteuid() == 0:
        status = owner.stat()
        os.fchown(descriptor, status.st_uid, status.st_gid)


def sync_directory(directory: Path) -> None:
    """Make renames, creations and removals in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> Path:
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        give(descriptor, path.parent)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    return unfinished
