"""The disk that the state directory is on: room, and what kind of file system it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stationkey.doctor.host.context import Subject
from stationkey.doctor.host.files import look_at
from stationkey.doctor.report import CannotLookError, Finding, failure, not_checked, ok, warning
from stationkey.doctor.state.directory import nearest
from stationkey.system.state_dir import DATABASE_NAME

DISK_IDS: Final = ("state.disk", "state.filesystem")
_MEBIBYTE: Final = 1024 * 1024
_LEAST: Final = 4 * _MEBIBYTE
"""Of free room: for the log of a minute, and for the ledger to be written anew after a destruction."""
_LITTLE: Final = 64 * _MEBIBYTE
_LEAST_FILES: Final = 16
_LITTLE_FILES: Final = 1000
_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
_FOREIGN: Final = frozenset({"vfat", "msdos", "exfat", "ntfs", "ntfs3"})
_REMOTE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs"})


def check_disk(subject: Subject) -> Iterator[Finding]:
    """Room, and what kind of file system it is."""
    path = subject.settings.state_dir
    there = path if look_at(path, follow=True).kind == "directory" else nearest(path).path
    try:
        room = os.statvfs(there)
    except OSError as error:
        raise CannotLookError(f"{there} is not to be seen from here ({error.strerror})") from None
    ledger = look_at(path / DATABASE_NAME).size
    yield judge_disk(
        Room(
            path=there,
            octets=(room.f_bfree if subject.daemon.user.uid == 0 else room.f_bavail) * room.f_frsize,
            files=room.f_favail if room.f_files else None,
            needed=max(_LEAST, 2 * ledger),
        )
    )
    mount = find_mount(_mounts(), there)
    yield judge_filesystem(there, mount, read_only=bool(room.f_flag & os.ST_RDONLY))


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What is free on a disk.

    Attributes:
        octets: for the daemon's user.
        files: how many more there can be; None where the file system does not count them.
        needed: octets that the daemon may want at once.
    """

    path: Path
    octets: int
    files: int | None
    needed: int


def judge_disk(room: Room) -> Finding:
    """Whether there is room."""
    name, free = "state.disk", f"{room.octets / _MEBIBYTE:.1f} MiB"
    advice = f"make room: du -xh {room.path} | sort -h | tail. Without it requests are rejected (disk_full)"
    fewer = f"remove files, whatever their length: du --inodes -x {room.path} | sort -n | tail shows where they are"
    if room.octets < room.needed:
        return failure(
            name, f"{free} are free at {room.path}, and {room.needed / _MEBIBYTE:.1f} may be needed at once", advice
        )
    if room.files is not None and room.files < _LEAST_FILES:
        return failure(name, f"no more than {room.files} files can be made at {room.path}", fewer)
    if room.octets < max(_LITTLE, room.needed):
        return warning(name, f"only {free} are free at {room.path}", advice)
    if room.files is not None and room.files < _LITTLE_FILES:
        return warning(name, f"no more than {room.files} files can be made at {room.path}", fewer)
    return ok(name, f"{free} are free at {room.path}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A row of ``/proc/self/mountinfo`` [proc(5)]."""

    point: str
    kind: str
    options: frozenset[str]


def _mounts() -> list[str]:
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def find_mount(lines: list[str], path: Path) -> Mount | None:
    """The file system that a path is on: the last of the longest mount points that lead to it."""
    try:
        real = str(path.resolve())
    except (OSError, RuntimeError):
        return None
    best: Mount | None = None
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, more = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(more) < 2:  # noqa: PLR2004 - mount point and options; type
            continue
        point = fields[4].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best.point)):
            options = frozenset(fields[5].split(",") + more[-1].split(","))
            best = Mount(point=point, kind=more[0], options=options)
    return best


def judge_filesystem(path: Path, mount: Mount | None, *, read_only: bool) -> Finding:
    """Whether what is written there stays, and is closed to others."""
    name = "state.filesystem"
    where = f"{path} is on {mount.kind} ({mount.point})" if mount is not None else f"the file system of {path}"
    if read_only:
        return failure(
            name,
            f"{where}, which is read-only",
            f"mount -o remount,rw {mount.point if mount else path}. Did it become so by an error? dmesg says",
        )
    if mount is None:
        return not_checked(name, f"{where} is not to be found out")
    if mount.kind in _MEMORY:
        return warning(
            name,
            f"{where}, which is memory: keys and answers are lost when the machine restarts",
            "name a state_dir on a disk; without it every certificate has to be asked for anew after each power cut",
        )
    if mount.kind in _FOREIGN:
        return failure(
            name,
            f"{where}, which knows neither owners nor modes: the keys are open to others",
            "name one on a Linux file system",
        )
    if mount.kind in _REMOTE:
        return warning(
            name,
            f"{where}, over a network: SQLite's locks and write-ahead log are not safe there",
            "name a state_dir on a disk of this machine",
        )
    return ok(name, where)
