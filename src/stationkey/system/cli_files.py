"""Files that a command is told to read and to write."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from stationkey.errors import ConfigurationError

MAX_FILE: Final = 256 * 1024
"""Bytes."""


def read_bounded(path: Path) -> bytes:
    """A file of `MAX_FILE` bytes at the most; standard input for ``-``.

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
        words = error.strerror if isinstance(error, OSError) else "that is no path"
        raise ConfigurationError(f"{path} cannot be read: {words}", reason="file_unreadable") from None
    if len(data) > MAX_FILE:
        raise ConfigurationError(f"{path} has more than {MAX_FILE} bytes", reason="file_unreadable")
    return data


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a file anew.

    Args:
        path: where.
        text: what.
        private: nobody else may read it, also where a file was there that others could read.

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
