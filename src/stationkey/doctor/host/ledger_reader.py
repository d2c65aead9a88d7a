"""The ledger, read without a trace: no lock that another waits for, no file that was not there before."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from stationkey.doctor.host.files import look_at
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.lifecycle import KeyState
from stationkey.system.state_dir import DATABASE_NAME

_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a directory of our own in it, closed to others
_MAX_COPIED: Final = 64 * 1024 * 1024
_LOG: Final = "-wal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What matters of a ledger.

    Attributes:
        keys: all on record.
        active_files: what each file under ``active/`` should hold, by its name.
        running: milliseconds of running time.
        wrapped: the private part of each active key in a TPM, wrapped by that, by the key's name.
    """

    keys: tuple[KeyRecord, ...]
    active_files: dict[str, bytes] = field(repr=False)
    running: int
    wrapped: dict[str, bytes] = field(repr=False)


def read_ledger(path: Path, *, running: bool) -> Contents | str:
    """Read a ledger, and leave no trace.

    SQLite makes files beside a database even to read it, and they would be this user's. So a ledger that nobody has
    open is read in place. If its last run was cut short, part of its content is in a log: then both are copied to
    memory, and read there.

    Args:
        path: of the database.
        running: whether the daemon has it open.

    Returns:
        What is in it; or why it cannot be read without a trace.

    Raises:
        LedgerError: it is damaged, busy or of another version.
    """
    facts, log = look_at(path), look_at(path.with_name(path.name + _LOG))
    if facts.kind != "file":
        return f"no ledger at {path}" if facts.kind == "missing" else f"{path} is not a file to read"
    if running:
        return _contents(Ledger(path, read_only=True))
    if not log.there or log.size == 0:
        return _contents(Ledger(path, read_only=True, alone=True))
    if log.kind != "file" or facts.size + log.size > _MAX_COPIED or not _MEMORY.is_dir():
        return "the last run of the daemon was cut short; start it once, and the ledger is in order"
    with tempfile.TemporaryDirectory(prefix="stationkey-doctor-", dir=_MEMORY) as directory:
        copy = Path(directory, DATABASE_NAME)
        try:
            shutil.copyfile(path, copy, follow_symlinks=False)
            shutil.copyfile(log.path, copy.with_name(log.path.name), follow_symlinks=False)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        return _contents(Ledger(copy, read_only=True))


def _contents(opened: Ledger) -> Contents:
    with closing(opened) as ledger:
        keys = ledger.keys.all()
        active = [key.key_id for key in keys if key.state is KeyState.ACTIVE and key.scheme == "tpm2"]
        references = {key_id: ledger.keys.ref(key_id) for key_id in active}
        return Contents(
            keys=tuple(keys),
            active_files=ledger.keys.active_files(),
            running=ledger.retention.running,
            wrapped={key_id: one.private for key_id, one in references.items() if one is not None},
        )
