"""The state directory: all that the station keeps, for the one daemon that may write there."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from stationkey.errors import ConfigurationError, LedgerError
from stationkey.ledger import DATABASE_NAME

LOCK_NAME: Final = "lock"


class StateDirectory:
    """The directory that holds all of the station's state, for the one process that may write there.

    Made with mode 0700 where it is missing. One that others can enter is closed to them if it is ours alone to close:
    empty, or holding a ledger.

    Raises:
        ConfigurationError: it cannot be made or entered, or should not be taken over.
        LedgerError: another process uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                entries = {entry.name for entry in path.iterdir()}
                if entries and DATABASE_NAME not in entries:
                    raise ConfigurationError(
                        f"the state directory {path} is open to others (mode {mode:04o}) and has other files in it",
                        reason="state_dir_open",
                        hint="name a directory of its own",
                    )
                path.chmod(0o700)
            self._lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigurationError(
                f"the state directory {path} cannot be used: {error.strerror}",
                reason="state_dir_unusable",
                hint="name one with --state-dir that this user may write",
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise LedgerError(
                f"another stationkey uses the state directory {path}",
                reason="state_dir_in_use",
                hint="stop it first, or name another directory with --state-dir",
            ) from None

    @property
    def database(self) -> Path:
        """Where the ledger is."""
        return self.path / DATABASE_NAME

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._lock)


@contextmanager
def without_daemon(path: Path) -> Iterator[bool]:
    """Keep a daemon from starting on a state directory while the block runs; False where one runs there already.

    Changes nothing in the directory: where no daemon has ever been, there is none to be kept away.
    """
    lock = None
    with suppress(OSError):  # not there, or not ours to open: what is done in the block will tell
        lock = os.open(path / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        if lock is not None:
            os.close(lock)
