"""The machine that the daemon runs on: its clocks, its random numbers and its disk; see ``machine.c``.

The disk knows what a loss of power leaves. A write is durable once its file was synced, and a name (created, renamed,
removed) once its directory was; names become durable in their order, as on a file system with a journal. Of what was
not synced, each sector of 512 bytes is there or not, by the seed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final

SECTOR: Final = 512
SOURCE: Final = Path(__file__).with_name("machine.c")
LIBRARY: Final = "STATIONKEY_MACHINE"
"""Environment variable with the path of the library in a process that has it."""
BOOT: Final = 1_000_000 * 10**9
"""What the clock that only counts says at the beginning, in nanoseconds."""


class Operation(IntEnum):
    """What is told to the hook; the order is that of ``machine.c``."""

    OPEN = 0
    CREATED = 1
    WRITE = 2
    TRUNCATE = 3
    SYNC = 4
    SYNC_DIRECTORY = 5
    RENAME = 6
    LINK = 7
    UNLINK = 8
    MKDIR = 9
    SLEEP = 10


CHANGES: Final = frozenset(Operation) - {Operation.OPEN, Operation.SLEEP}
"""What a disk that is gone refuses."""


def enter(arguments: list[str], folder: Path) -> None:
    """Replace this process by one that runs on the machine; returns in the one that does.

    Args:
        arguments: of the interpreter, for the same program.
        folder: where the library is built.
    """
    if LIBRARY in os.environ:
        return
    library = folder / "machine.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = ["gcc", "-shared", "-fPIC", "-O2", "-U_FORTIFY_SOURCE", "-o", str(unfinished), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        unfinished.replace(library)
    environment = {**os.environ, LIBRARY: str(library), "LD_PRELOAD": str(library), "PYTHONHASHSEED": "0"}
    os.execve(sys.executable, [sys.executable, *arguments], environment)  # the same process, anew


@dataclass(slots=True)
class _File:
    """A file: what a loss of power leaves of it, and what was done since."""

    durable: bytearray = field(default_factory=bytearray)
    since: list[tuple[int, bytes] | int] = field(default_factory=list)
    """Writes, by offset, and new sizes."""

    def sync(self) -> None:
        for change in self.since:
            _apply(self.durable, change)
        self.since.clear()

    def after(self, kept: Callable[[], bool]) -> bytes:
        """What is there after a loss of power that kept some sectors."""
        content = bytearray(self.durable)
        for change in self.since:
            if isinstance(change, int):
                if kept():
                    _apply(content, change)
                continue
            offset, data = change
            end = offset + len(data)
            while offset < end:
                part = min(SECTOR - offset % SECTOR, end - offset)
                if kept():
                    _apply(content, (offset, data[:part]))
                data, offset = data[part:], offset + part
        return bytes(content)

    @property
    def size(self) -> int:
        size = len(self.durable)
        for change in self.since:
            size = change if isinstance(change, int) else max(size, change[0] + len(change[1]))
        return size


def _apply(content: bytearray, change: tuple[int, bytes] | int) -> None:
    if isinstance(change, int):
        del content[change:]
        content.extend(bytes(change - len(content)))
        return
    offset, data = change
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


@dataclass(slots=True)
class _Names:
    """Which file is behind each name; a directory is None."""

    entries: dict[str, int | None] = field(default_factory=dict)

    def change(self, operation: Operation, path: str, other: str | None, inode: int) -> None:
        match operation:
            case Operation.CREATED:
                self.entries[path] = inode
            case Operation.MKDIR:
                self.entries[path] = None
            case Operation.RENAME if other is not None:
                for name in [name for name in self.entries if name == path or name.startswith(path + "/")]:
                    self.entries[other + name.removeprefix(path)] = self.entries.pop(name)
            case Operation.LINK if other is not None:
                self.entries[other] = inode
            case Operation.UNLINK:
                self.entries.pop(path, None)


_Change = tuple[Operation, str, "str | None", int]
Image = Mapping[str, bytes | None]
"""What is on the disk: path to content; None for a directory."""


class Machine:
    """Clocks and disk of one simulation. One at a time in a process that `enter` made.

    Args:
        root: a folder; what happens to files below it is told.
        seed: of the random numbers that programs get.

    Attributes:
        disk: the folder in it that is the disk; beside it are the files of others.
        now: nanoseconds on the clock that only counts.
        wall: nanoseconds that the clock on the wall is ahead of that one.
        changes: how often a file or a name was changed.
        watch: called before each operation; may change files, wait, or return the number of an error.
        full: whether there is no room for a file to grow.
        dead: whether the power is off.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.disk = root / "disk"
        self.disk.mkdir(parents=True, exist_ok=True)
        self.now = BOOT
        self.wall = 0
        self.watch: Callable[[Operation, str], int] = lambda _operation, _path: 0
        self.sleep: Callable[[int], None] = self.pass_by
        self.full = False
        self.dead = False
        self.changes = 0
        self._files: dict[int, _File] = {}
        self._names = _Names()
        self._unsynced: list[_Change] = []
        self._library = ctypes.CDLL(os.environ[LIBRARY])
        self._library.machine_clock.argtypes = (ctypes.c_int64, ctypes.c_int64)
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_int, *[ctypes.c_char_p] * 2, ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p,
            ctypes.c_int64,
        )  # fmt: skip
        self._hook = kind(self._told)
        self._library.machine_begin(str(root).encode() + b"/", self._hook, ctypes.c_uint64(seed))
        self._set_clock()

    def end(self) -> None:
        """Give the process its own clocks back."""
        self._library.machine_begin(b"/nowhere/", None, ctypes.c_uint64(0))

    def _set_clock(self) -> None:
        self._library.machine_clock(self.now, self.now + self.wall)

    def pass_by(self, nanoseconds: int) -> None:
        """Let time pass."""
        self.now += max(0, nanoseconds)
        self._set_clock()

    def set_wall(self, nanoseconds: int) -> None:
        """Set the clock on the wall so far ahead of the other."""
        self.wall = nanoseconds
        self._set_clock()

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Files of others may be changed within: they are on no disk that is simulated."""
        self._library.machine_quiet(1)
        try:
            yield
        finally:
            self._library.machine_quiet(-1)

    def _told(
        self, number: int, path: bytes | None, other: bytes | None, inode: int, offset: int, data: int, size: int
    ) -> int:
        if number == Operation.SLEEP:
            with suppress(BaseException):  # as below
                self.sleep(size)
            return 0
        operation, name = Operation(number), os.fsdecode(path or b"")
        if name.endswith("-shm"):
            return 0  # shared memory: gone with the power, and mapped, so that it is not written to here
        try:
            failed = 0 if self.dead else self.watch(operation, name)
        except BaseException:  # noqa: BLE001 - nothing may be raised through C; the thread was killed
            failed = errno.EIO
        if self.dead and operation in CHANGES:  # perhaps since this very moment
            failed = errno.EIO
        elif failed and operation is Operation.SYNC and inode in self._files:
            self._files[inode].since.clear()  # Linux forgets what it could not write [fsync(2)]
        if failed:
            return failed
        return self._done(operation, name, None if other is None else os.fsdecode(other), inode, (offset, data, size))

    def _done(
        self, operation: Operation, name: str, other: str | None, inode: int, written: tuple[int, int, int]
    ) -> int:
        offset, data, size = written
        self.changes += operation in CHANGES
        match operation:
            case Operation.WRITE:
                file = self._files.setdefault(inode, _File())
                if self.full and offset + size > file.size:
                    return errno.ENOSPC
                file.since.append((offset, ctypes.string_at(data, size)))
            case Operation.TRUNCATE:
                self._files.setdefault(inode, _File()).since.append(size)
            case Operation.SYNC:
                if inode in self._files:
                    self._files[inode].sync()
            case Operation.SYNC_DIRECTORY:
                self._sync_names(name)
            case Operation.CREATED | Operation.RENAME | Operation.LINK | Operation.UNLINK | Operation.MKDIR:
                if operation is Operation.CREATED:
                    self._files[inode] = _File()
                self._unsynced.append((operation, name, other, inode))
            case _:
                pass
        return 0

    def _sync_names(self, directory: str) -> None:
        """Make the names in a directory durable, and the directories that lead to it."""
        waiting, self._unsynced = self._unsynced, []
        for change in waiting:
            operation, name, other, _ = change
            leads = operation is Operation.MKDIR and f"{directory}/".startswith(f"{name}/")
            if leads or os.path.dirname(other or name) == directory:  # noqa: PTH120 - of text, thousands of times
                self._names.change(*change)
            else:
                self._unsynced.append(change)

    def image(self, rng: random.Random | None) -> Image:
        """What is on the disk now; with `rng`, what a loss of power would leave of it."""
        names = _Names(dict(self._names.entries))
        share = 1.0 if rng is None else rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        count = len(self._unsynced) if rng is None else rng.randint(0, len(self._unsynced))
        for change in self._unsynced[:count]:
            names.change(*change)

        def kept() -> bool:
            return rng is None or rng.random() < share

        content = {inode: file.after(kept) for inode, file in sorted(self._files.items())}
        return {path: None if inode is None else content.get(inode, b"") for path, inode in names.entries.items()}

    def power_up(self, image: Image) -> None:
        """Make the disk hold just this, all of it durable. Nothing may have a file open."""
        with self.unwatched():
            for path in self.disk.iterdir():
                shutil.rmtree(path)
            self._files, self._unsynced, self._names = {}, [], _Names()
            for name, content in sorted(image.items()):
                path = Path(name)
                if content is None:
                    path.mkdir(mode=0o700, parents=True, exist_ok=True)
                    self._names.entries[name] = None
                elif path.parent.is_dir():
                    path.write_bytes(content)
                    path.chmod(0o600)
                    inode = path.stat().st_ino
                    self._names.entries[name] = inode
                    self._files[inode] = _File(bytearray(content))
        self.dead = self.full = False
        self.changes += 1
