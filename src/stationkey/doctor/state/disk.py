"""The disk that the state directory is on: room, and what kind of file system it is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stationkey.doctor.host.context import Context
from stationkey.doctor.host.files import look_at
from stationkey.doctor.report import Verdict, failure, not_checked, ok, warning
from stationkey.doctor.state.directory import nearest
from stationkey.system.state_dir import DATABASE_NAME

_MEBIBYTE: Final = 1024 * 1024
_LEAST: Final = 4 * _MEBIBYTE
"""Of free room: for the log of a minute, and for the ledger to be written anew after a destruction."""
_LITTLE: Final = 64 * _MEBIBYTE
_LEAST_FILES: Final = 16
_LITTLE_FILES: Final = 1000
_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
_FOREIGN: Final = frozenset({"vfat", "msdos", "exfat", "ntfs", "ntfs3"})
_REMOTE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs"})


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


def _place(context: Context) -> Path:
    path = context.settings.state_dir
    return path if look_at(path, follow=True).kind == "directory" else nearest(path).path


def look_at_room(context: Context) -> tuple[Room] | Verdict:
    """Look at what is free."""
    path = _place(context)
    try:
        room = os.statvfs(path)
    except OSError as error:
        return not_checked(f"{path} is not visible from here ({error.strerror})")
    seen = Room(
        path=path,
        octets=(room.f_bfree if context.daemon.user.uid == 0 else room.f_bavail) * room.f_frsize,
        files=room.f_favail if room.f_files else None,
        needed=max(_LEAST, 2 * look_at(context.settings.state_dir / DATABASE_NAME).size),
    )
    return (seen,)


def judge_room(room: Room) -> Verdict:
    """Judge whether there is room."""
    free = f"{room.octets / _MEBIBYTE:.1f} MiB"
    advice = f"make room: du -xh {room.path} | sort -h | tail. Without it requests are rejected (disk_full)"
    fewer = f"remove files, whatever their length: du --inodes -x {room.path} | sort -n | tail shows where they are"
    if room.octets < room.needed:
        return failure(
            f"{free} are free at {room.path}, and {room.needed / _MEBIBYTE:.1f} may be needed at once", advice
        )
    if room.files is not None and room.files < _LEAST_FILES:
        return failure(f"no more than {room.files} files can be made at {room.path}", fewer)
    if room.octets < max(_LITTLE, room.needed):
        return warning(f"only {free} are free at {room.path}", advice)
    if room.files is not None and room.files < _LITTLE_FILES:
        return warning(f"no more than {room.files} files can be made at {room.path}", fewer)
    return ok(f"{free} are free at {room.path}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A row of ``/proc/self/mountinfo`` [proc(5)]."""

    point: str
    kind: str
    options: frozenset[str]


def look_at_filesystem(context: Context) -> tuple[Path, Mount | None] | Verdict:
    """Look at the mount that the directory is on."""
    path = _place(context)
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return path, find_mount(lines, path.resolve())
    except (OSError, RuntimeError):
        return not_checked(f"the file system of {path} is not visible from here")


def find_mount(lines: list[str], path: Path) -> Mount | None:
    """Find the file system that a path without links is on: the last of the longest mount points that lead to it."""
    real = str(path)
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


def judge_filesystem(path: Path, mount: Mount | None) -> Verdict:
    """Judge whether what is written there stays, and is closed to others."""
    if mount is None:
        return not_checked(f"the file system of {path} is not known")
    where = f"{path} is on {mount.kind} ({mount.point})"
    if "ro" in mount.options:
        return failure(
            f"{where}, which is read-only", f"mount -o remount,rw {mount.point}. Did an error cause it? dmesg says"
        )
    if mount.kind in _MEMORY:
        return warning(
            f"{where}, which is memory: keys and answers are lost at restart",
            "name a state_dir on a disk; without it every certificate must be requested again after each power cut",
        )
    if mount.kind in _FOREIGN:
        return failure(
            f"{where}, without owners and modes: the keys are open to others", "name one on a Linux file system"
        )
    if mount.kind in _REMOTE:
        return warning(
            f"{where}, over a network: SQLite's locks and write-ahead log are not safe there",
            "name a state_dir on a disk of this machine",
        )
    return ok(where)
