"""Files that are there whole or not at all, whatever dies while they are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

UNFINISHED: Final = ".new"
"""Ends the name of a file that is being written."""


def exchange(path: Path, content: bytes) -> None:
    """Put `content` in the place of a file, or make it, with mode 0600. `sync_directory` makes that outlive power.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    _write(path, content).replace(path)


def make(path: Path, content: bytes) -> bool:
    """Make a file with mode 0600, durably; False, and nothing changed, where there is one.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = _write(path, content)
    try:
        os.link(unfinished, path, follow_symlinks=False)  # a rename would take the place of one that is there
    except FileExistsError:
        return False
    finally:
        unfinished.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True


def give(descriptor: int, owner: Path) -> None:
    """Where root makes something, let it belong to whom `owner` belongs to.

    As SQLite does with its files: an operator's ``sudo stationkey`` must not lock the daemon out.
    """
    if os.geteuid() == 0:
        status = owner.stat()
        os.fchown(descriptor, status.st_uid, status.st_gid)


def sync_directory(directory: Path) -> None:
    """Make what was renamed, made or removed in a directory outlive a loss of power."""
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
