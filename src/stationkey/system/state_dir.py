"""The state directory: all persistent state, for the one daemon that may write there.

A user who can put a link, a FIFO or another directory in the place of the daemon's files can make the daemon, or root
with ``sudo stationkey keys``, read, write or block elsewhere. So files are checked before they are opened, and root
acts as the owner of the directory (`as_owner`).
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from stationkey.errors import ConfigurationError, LedgerError

LOCK_NAME: Final = "lock"
DATABASE_NAME: Final = "ledger.sqlite3"

_FILES: Final = (LOCK_NAME, *(f"{DATABASE_NAME}{suffix}" for suffix in ("", "-wal", "-shm", "-journal")))
"""The files that are opened; the suffixes are SQLite's."""
_DIRECTORIES: Final = ("active", "tpm")
"""The directories. Files in them are opened without following links; a link to a directory is followed."""

_MAX_LINKS: Final = 40
"""As many as the kernel follows [path_resolution(7)]."""

_KINDS: Final = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a directory",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


class StateDirectory:
    """The state directory, locked for the one process that may write there.

    Created with mode 0700 if missing. One that is open to others is closed to them if it is empty or has a ledger.

    Raises:
        ConfigurationError: it cannot be created or entered, has other files, or other users could exchange it.
        LedgerError: another process uses it, or a file in it is not the daemon's.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.path = path = settled(path)
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _refuse_foreign(path, path.stat(), os.geteuid()):
                path.chmod(0o700)
            refuse_planted(path)
            # A restored backup has the modes of the copy. No links: that was just checked, and no other user may
            # write here.
            for file in (path / name for name in _FILES):
                status = _lstat(file)
                if status is not None and status.st_mode & 0o177:
                    file.chmod(0o600)
            self._lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except (OSError, ValueError) as error:  # ValueError: a path with NUL
            raise _unusable(path, error) from None
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
        """Path of the ledger."""
        return self.path / DATABASE_NAME

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)


def _refuse_foreign(path: Path, status: os.stat_result, user: int) -> bool:
    """Return whether a directory must be closed to others; refuse another user's, or one with other files."""
    if status.st_uid != user:
        raise ConfigurationError(
            f"the state directory {path} belongs to another user (uid {status.st_uid}; this is {user})",
            reason="state_dir_foreign",
            hint=f"name a directory in it, for example --state-dir {path / 'stationkey'}"
            if status.st_uid == 0 and os.access(path, os.W_OK | os.X_OK, effective_ids=True)
            else "run as that user, or change the owner of the directory and its files to this user",
        )
    mode = stat.S_IMODE(status.st_mode)
    if not mode & 0o077:
        return False
    entries = {entry.name for entry in path.iterdir()}
    if entries and DATABASE_NAME not in entries:
        raise ConfigurationError(
            f"the state directory {path} is open to others (mode {mode:04o}) and has other files in it",
            reason="state_dir_open",
            hint=f"use a separate directory; or, if everything in it is the daemon's, chmod 0700 {path}",
        )
    return True


def refuse_unfit(path: Path, *, user: int) -> Path:
    """Check a state directory as the daemon does at start, before anything is opened or changed.

    Args:
        path: of the state directory; it may be missing.
        user: uid of the daemon.

    Returns:
        The resolved path.

    Raises:
        ConfigurationError: the daemon would refuse it.
    """
    real, found = _settled(path, user=user)
    if found is not None:
        if not stat.S_ISDIR(found.st_mode):
            raise _unusable(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
        _refuse_foreign(real, found, user)
    return real


def _unusable(path: Path, error: OSError | ValueError) -> ConfigurationError:
    why = error.strerror if isinstance(error, OSError) else error
    closed = isinstance(error, PermissionError)
    return ConfigurationError(
        f"the state directory {path} cannot be used: {why}",
        reason="state_dir_unusable",
        hint="run this with sudo" if closed else "name one with --state-dir that this user may write",
    )


def settled(path: Path) -> Path:
    """Resolve `path`, if no other user can redirect it.

    Each directory and link on the way must belong to root or to the owner of the state directory, and no other user may
    write in these directories [unlink(2), rename(2): the right to write in a directory is the right to exchange its
    files]. Sticky directories, such as ``/tmp``, may be open. Group rights are harmless if the group has no other
    member, rights of others in a container of this user alone.

    Raises:
        ConfigurationError: other users can exchange it, or it cannot be reached.
    """
    return _settled(path, user=os.geteuid())[0]


def _settled(path: Path, *, user: int) -> tuple[Path, os.stat_result | None]:
    """Do the same, and return the status too; None if it does not exist yet, and `user` would create it."""
    try:
        real, met = _walked(path)
        found = _lstat(real)
        if found is None and path.is_symlink():
            raise FileNotFoundError(errno.ENOENT, "the link leads to nothing")
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from None
    trusted = {0, user if found is None else found.st_uid}
    for place, status in met:
        if status.st_uid not in trusted:
            who = f"belongs to uid {status.st_uid}"
            hint = f"chown -h root {place}"
        elif stat.S_ISDIR(status.st_mode) and _others_may_write(status, user if found is None else found.st_uid):
            who = "can be written by others"
            hint = f"chmod go-w {place}"
        else:
            continue
        raise ConfigurationError(
            f"the state directory {real} could be exchanged: {place} {who}",
            reason="state_dir_exchangeable",
            hint=f"{hint}, or name another directory with --state-dir",
        )
    return real, found


def _others_may_write(directory: os.stat_result, user: int) -> bool:
    """Return whether another user than root, the owner and `user` can exchange files in a directory."""
    mode = directory.st_mode
    if mode & stat.S_ISVTX:
        return False
    if mode & stat.S_IWOTH:
        return not _alone(user)
    return bool(mode & stat.S_IWGRP) and not (directory.st_gid in {0, directory.st_uid} or _own(directory.st_gid, user))


def _own(group: int, user: int) -> bool:
    """Return whether `user` is the only member of a group, by the user database.

    A container's volume has such a group: its processes have it (``runAsGroup``, ``fsGroup``), but no named user.
    """
    users = pwd.getpwall()
    members = {entry.pw_uid for entry in users if entry.pw_gid == group}
    with suppress(KeyError):  # a group without an entry has no members by name
        names = set(grp.getgrgid(group).gr_mem)
        members |= {entry.pw_uid for entry in users if entry.pw_name in names}
    has_it = user == os.geteuid() and group in {os.getegid(), *os.getgroups()}
    return (has_it or user in members) and not members - {0, user}


def _alone(user: int) -> bool:
    """Return whether all visible processes are `user`'s: the first of the PID namespace is [pid_namespaces(7)].

    That is so in a container that was started as another user than root.
    """
    try:
        return user != 0 and Path("/proc/1").stat().st_uid == user
    except OSError:
        return False


def _walked(path: Path) -> tuple[Path, list[tuple[Path, os.stat_result]]]:
    """Return the resolved path, and each directory and link on the way.

    The root directory is left out: its owner owns the machine. Missing parts at the end stay missing.
    """
    ahead = [*reversed(path.absolute().parts[1:])]
    here, links = Path("/"), 0
    met: list[tuple[Path, os.stat_result]] = []
    while ahead:
        name = ahead.pop()
        if name == "..":
            here = here.parent
            continue
        if here != here.parent:
            met.append((here, here.stat()))
        there = here / name
        status = _lstat(there)
        if status is None:
            if ".." in ahead:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(there))
            return there.joinpath(*reversed(ahead)), met
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            met.append((there, status))
            target = there.readlink()
            here = Path("/") if target.is_absolute() else here
            ahead += [part for part in reversed(target.parts) if part != "/"]
        else:
            here = there
    return here, met


def refuse_planted(directory: Path) -> None:
    """Check the files of a state directory before they are opened: regular, the owner's, without a second hard link.

    Opening a FIFO would block forever, SQLite follows a link in place of the database, and a file with a second hard
    link is changed under that name too.

    Raises:
        ConfigurationError: the directory is closed to this user.
        LedgerError: a file is something else. Nothing was opened.
    """
    try:
        owner = directory.stat().st_uid
        names = (*_FILES, *_DIRECTORIES)
        found = [(path, status) for path in (directory / name for name in names) if (status := _lstat(path))]
    except OSError as error:
        raise _unusable(directory, error) from None
    for path, status in found:
        kind = stat.S_IFMT(status.st_mode)
        if kind != (stat.S_IFDIR if path.name in _DIRECTORIES else stat.S_IFREG):
            what = f"is {_KINDS.get(kind, 'a device')}"
        elif kind == stat.S_IFREG and status.st_nlink != 1:
            what = "has another name elsewhere (a hard link)"
        elif status.st_uid != owner:
            what = f"belongs to another user (uid {status.st_uid})"
        else:
            continue
        raise LedgerError(
            f"{path} {what}; stationkey did not create it",
            reason="state_file_foreign",
            hint="nothing was opened; find out where it comes from, and move it away",
        )


def _lstat(path: Path) -> os.stat_result | None:
    """Stat a path without following links; None if missing: SQLite removes its log when it is unused."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


@contextmanager
def visit(directory: Path) -> Iterator[Path]:
    """Yield the checked state directory for a command beside the daemon; root acts as its owner, see `as_owner`.

    Raises:
        ConfigurationError: it is closed to this user, or other users could exchange it.
        LedgerError: a file in it is not the daemon's.
    """
    real, owner = _settled(directory, user=os.geteuid())
    if owner is None:
        raise _unusable(real, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    with as_owner(owner):
        refuse_planted(real)
        yield real


@contextmanager
def as_owner(owner: os.stat_result) -> Iterator[None]:
    """Let root act as the owner of a directory within the block.

    Links that this user planted then give root no more rights than that user has, and created files belong to that
    user, so that ``sudo stationkey keys`` does not lock the daemon out. For other users nothing changes.

    Args:
        owner: status of the directory when it was checked; a new one might be of another directory.

    Raises:
        ConfigurationError: root cannot become that user here.
    """
    if os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    try:
        os.setgroups([owner.st_gid])
        os.setegid(owner.st_gid)
        os.seteuid(owner.st_uid)
    except (OSError, ValueError):
        raise ConfigurationError(
            f"root cannot become uid {owner.st_uid}, the owner of the state directory",
            reason="state_dir_foreign",
            hint="run this as that user",
        ) from None
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


@contextmanager
def without_daemon(path: Path) -> Iterator[bool]:
    """Prevent a daemon from starting on a state directory while the block runs; yield False if one runs already.

    Changes nothing in the directory.
    """
    lock = None
    with suppress(OSError):  # missing or not ours: the block reports it
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
