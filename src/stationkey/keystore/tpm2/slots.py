"""The slots of a TPM without a resource manager: the loaded objects, and which of them are ours.

Such a TPM has some three slots, and keeps the objects of ended programs. If the object of a living program is unloaded,
that program signs with the next object at its handle. So nothing is unloaded that may belong to another program.

- ``device:/dev/tpmN`` can be opened by one program at a time, says the kernel, and its resource manager leaves nothing
  loaded between two commands. Whatever is loaded when it was opened is of the dead.
- To every other TPM (a simulator behind a socket) anybody can connect. What was loaded by a store is written down in
  ``tpm/loaded-N`` in the state directory. The store holds a lock on that file as long as it lives. What a file without
  a lock names is of the dead, if the TPM was not reset since and has the same public area at that handle.

The handle is known only when the TPM has answered. So before a command that loads something, the slot is written down
that the TPM will take, which is its first free one, and what it will hold. The file is not synchronised: a machine that
loses power resets its TPM.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from stationkey.keystore.tpm2 import capabilities

_ONE_PROGRAM: Final = re.compile(r"/dev/tpm\d+")
_FILES: Final = 4
_SIZE: Final = 4096
_TRANSIENT: Final = (0x80000000, 0x80FFFFFF)
_INDEX: Final = 0xFFFFFF  # the part of a handle after its type
_SIZE_FIELD: Final = 2  # bytes before the area in a TPM2B
_HEAD: Final = 8  # bytes of a TPMT_PUBLIC: type, name algorithm, attributes

_SESSION: Final = "start_auth_session"
_HMAC: Final = 0x02000000
_POLICY: Final = 0x03000000
_SE_POLICY: Final = 0x01
"""TPM_SE_POLICY [TPM 2.0 part 2, 6.11]."""
_PUBLIC: Final = {"load": 2, "create_loaded": 2, "create_primary": 1}
LOADING: Final = frozenset({_SESSION, *_PUBLIC})
"""The methods of a context that load something."""


def serves_one_program(tcti: str) -> bool:
    """Whether only one program at a time can open a TCTI."""
    name, _, path = tcti.partition(":")
    return name == "device" and _ONE_PROGRAM.fullmatch(os.path.realpath(path)) is not None


class _Contents(Struct):
    """What one store has loaded.

    Attributes:
        boot: how often the TPM was reset and restarted.
        loaded: SHA-256 of the public area by handle; empty for a session.
        coming: handle and beginning of the public area of the object being loaded.
    """

    boot: list[int]
    loaded: dict[str, str] = {}
    coming: tuple[str, str] | None = None


class _Record:
    """A file that says what a store has loaded.

    Args:
        descriptor: of the file, locked.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path, *, create: bool) -> _Record | None:
        """Open and lock a file; None if a living store holds it, or it cannot be used."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)
        try:
            descriptor = os.open(path, flags, 0o600)
        except OSError:
            return None
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return cls(descriptor)
        except OSError:
            pass
        os.close(descriptor)
        return None

    def read(self) -> _Contents | None:
        try:
            told = json.loads(os.pread(self._descriptor, _SIZE, 0))
            coming = told["coming"] or ("", "")
            return _Contents(list(told["boot"]), dict(told["loaded"]), (str(coming[0]), str(coming[1])))
        except (OSError, ValueError, TypeError, LookupError):  # empty, or damaged
            return None

    def write(self, contents: _Contents) -> None:
        """Write at once: a killed program leaves the new content or the old."""
        with suppress(OSError):
            os.pwrite(self._descriptor, msgspec.json.encode(contents).ljust(_SIZE), 0)

    def close(self) -> None:
        os.close(self._descriptor)


class Slots:
    """The objects loaded in a TPM without a resource manager.

    Args:
        esapi: the context that it is loaded on.
        directory: of the files; None to write nothing down.
        alone: whether no other program can have the TPM open.
    """

    def __init__(self, esapi: Any, directory: Path | None, *, alone: bool) -> None:
        self._esapi = esapi
        self._directory = None if alone else directory
        self._alone = alone
        self._mine = _Contents(list(esapi.boots()))
        self._names: dict[int, tuple[str, ...]] = {}
        self.relieve()
        records = (_Record.open(path, create=True) for path in self._paths())
        self._record = next((record for record in records if record is not None), None)
        self._write()

    def _paths(self) -> list[Path]:
        return [] if self._directory is None else [self._directory / f"loaded-{number}" for number in range(_FILES)]

    def _write(self) -> None:
        if self._record is not None:
            self._record.write(self._mine)

    def close(self) -> None:
        """Release the file."""
        if self._record is not None:
            self._record.close()

    # Before and after each command of `LOADING`.

    def before(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Write down what a command is about to load."""
        if self._record is None:
            return
        if method == _SESSION:
            taken = {handle & _INDEX for handle in capabilities.sessions(self._esapi)}
            handle, area = (_POLICY if arguments[2] == _SE_POLICY else _HMAC) | _first_free(taken, 0), b""
        else:
            taken = set(capabilities.loaded(self._esapi))
            handle = _first_free(taken, _TRANSIENT[0])
            if method != "create_primary":  # the parent is persistent, and has that slot as long as the command lasts
                handle = _first_free({*taken, handle}, _TRANSIENT[0])
            area = _marshalled(arguments[_PUBLIC[method]])[_SIZE_FIELD:]
            area = area if method == "load" else area[:_HEAD]
        self._mine.coming = (f"{handle:x}", area.hex())
        self._write()

    def failed(self) -> None:
        """Discard the recorded intention: the TPM has refused."""
        self._mine.coming = None
        self._write()

    def loaded(self, resource: Any, public: Any = None) -> None:
        """Write down what a command has loaded.

        Args:
            resource: its ESYS_TR, or the TPM's own handle.
            public: TPM2B_PUBLIC of an object; None for a session.
        """
        digest = "" if public is None else hashlib.sha256(_marshalled(public)).hexdigest()
        name = f"{resource if type(resource) is int else self._esapi.tr_get_tpm_handle(resource):x}"
        coming = () if self._mine.coming is None else (self._mine.coming[0],)  # the answer may be altered on the bus
        self._names[int(resource)] = (name, *coming)
        self._mine.loaded.update(dict.fromkeys((name, *coming), digest))
        self._mine.coming = None
        self._write()

    def unloaded(self, resource: Any) -> None:
        """Record the unloaded handles."""
        for name in self._names.pop(int(resource), ()):
            self._mine.loaded.pop(name, None)
        self._write()

    # Objects of ended programs.

    def relieve(self) -> None:
        """Unload objects of programs that have certainly ended."""
        if self._alone:
            present = capabilities.loaded(self._esapi) + capabilities.sessions(self._esapi, saved=False)
            self._flush(handle for handle in present if f"{handle:x}" not in self._mine.loaded)
            return
        for path in self._paths():
            record = _Record.open(path, create=False)
            if record is None:
                continue
            contents = record.read()
            if contents is not None and contents.boot == self._mine.boot:
                self._flush(self._left(contents))
            record.write(_Contents(self._mine.boot))
            record.close()

    def _left(self, contents: _Contents) -> Iterator[int]:
        """The handles of what a dead store has left loaded."""
        present = capabilities.loaded(self._esapi) + capabilities.sessions(self._esapi, saved=False)
        coming, area = contents.coming or ("", "")
        for handle in present:
            name = f"{handle:x}"
            if name in self._mine.loaded or name not in {*contents.loaded, coming}:
                continue
            if handle < _TRANSIENT[0]:
                yield handle
                continue
            public, _ = self._esapi.public_of(handle)
            is_coming = name == coming and public[_SIZE_FIELD:].hex().startswith(area)
            if is_coming or contents.loaded.get(name) == hashlib.sha256(public).hexdigest():
                yield handle

    def _flush(self, handles: Iterable[int]) -> None:
        for handle in handles:
            self._esapi.flush_context(handle)


def _marshalled(structure: Any) -> bytes:
    return structure if isinstance(structure, bytes) else bytes(structure.marshal())


def _first_free(taken: set[int], first: int) -> int:
    """Return the lowest free number from `first` on, which the TPM assigns next."""
    return next(number for number in range(first, first + len(taken) + 1) if number not in taken)
