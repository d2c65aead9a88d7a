"""The ledger, read without a trace: no lock that another waits for, no file that was not there before."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stationkey.doctor.host.files import look_at
from stationkey.doctor.report import CannotLookError
from stationkey.doctor.runner import within
from stationkey.errors import StationKeyError
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.lifecycle import KeyState
from stationkey.system.state_dir import DATABASE_NAME

if TYPE_CHECKING:
    from stationkey.doctor.host.context import Subject

PATIENCE: Final = 2.0
"""Seconds that a check which is about something else waits for the ledger to be read."""
_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a directory of our own in it, closed to others
_MAX_COPIED: Final = 64 * 1024 * 1024
_LOG: Final = "-wal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What matters of a ledger.

    Attributes:
        keys: all on record.
        active_files: what each file under ``active/`` should hold, by its owner.
        running: milliseconds of running time.
        wrapped: the private part of each active key in a TPM, wrapped by that, by the key's name.
    """

    keys: tuple[KeyRecord, ...]
    active_files: dict[tuple[str, str], bytes] = field(repr=False)
    running: int
    wrapped: dict[str, bytes] = field(repr=False)


class LedgerReading:
    """Reads the ledger once, however many checks want to know; each gets the same contents, or the same error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._contents: Contents | None = None
        self._error: Exception | None = None

    def contents(self, subject: Subject) -> Contents:
        """What is in it.

        Raises:
            CannotLookError: there is none, or it cannot be read without a trace.
            LedgerError: it is damaged, or of another version.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._contents is None:
                try:
                    self._contents = _read(subject)
                except Exception as error:
                    self._error = error
                    raise
            return self._contents

    def soon(self, subject: Subject) -> Contents | None:
        """The same, for a check that can do without; None where it is not there within `PATIENCE`, or never."""
        try:
            return within(PATIENCE, lambda: self.contents(subject), None)
        except (StationKeyError, CannotLookError, OSError):
            return None  # the check of the ledger says why


def _read(subject: Subject) -> Contents:
    with open_for_reading(subject) as ledger:
        keys = ledger.keys.all()
        active = [key.key_id for key in keys if key.state is KeyState.ACTIVE and key.scheme == "tpm2"]
        references = {key_id: ledger.keys.ref(key_id) for key_id in active}
        return Contents(
            keys=tuple(keys),
            active_files=ledger.keys.active_files(),
            running=ledger.retention.running,
            wrapped={key_id: one.private for key_id, one in references.items() if one is not None},
        )


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
