"""The ledger, read without a trace: no lock that another waits for, no file that was not there before."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from stationkey.doctor.files import look_at
from stationkey.doctor.findings import CannotLookError
from stationkey.doctor.subject import Subject
from stationkey.ledger import DATABASE_NAME, Ledger

_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a directory of our own in it, closed to others
_MAX_COPIED: Final = 64 * 1024 * 1024
_LOG: Final = "-wal"


@contextmanager
def open_for_reading(subject: Subject) -> Iterator[Ledger]:
    """The ledger, to be read.

    SQLite makes files beside a database even to read it, and they would be this user's. So a ledger that nobody has
    open is read as it lies there. One whose last run was cut short has part of its content in a log: then both are
    copied to memory, and read there.

    Raises:
        CannotLookError: there is none, or it cannot be read without a trace.
        LedgerError: it is damaged, or of another version.
    """
    path = subject.settings.state_dir / DATABASE_NAME
    facts, log = look_at(path), look_at(path.with_name(path.name + _LOG))
    if facts.kind != "file":
        raise CannotLookError(
            f"there is no ledger at {path}" if facts.kind == "missing" else f"{path} is no file to read"
        )
    if subject.daemon.running:
        with closing(Ledger(path, read_only=True)) as ledger:
            yield ledger
    elif not log.there or log.size == 0:
        with closing(Ledger(path, read_only=True, alone=True)) as ledger:
            yield ledger
    else:
        if log.kind != "file" or facts.size + log.size > _MAX_COPIED or not _MEMORY.is_dir():
            raise CannotLookError("the last run of the daemon was cut short; start it once, and the ledger is in order")
        with tempfile.TemporaryDirectory(prefix="stationkey-doctor-", dir=_MEMORY) as directory:
            copy = Path(directory, DATABASE_NAME)
            try:
                shutil.copyfile(path, copy, follow_symlinks=False)
                shutil.copyfile(log.path, copy.with_name(log.path.name), follow_symlinks=False)
            except OSError as error:
                raise CannotLookError(f"{path} cannot be read: {error.strerror}") from None
            with closing(Ledger(copy, read_only=True)) as ledger:
                yield ledger
