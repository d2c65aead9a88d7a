"""The state directory: whose it is, who may enter, and what is in it. The daemon's own rules are asked."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from stationkey.contract.active_names import DIRECTORY_NAME
from stationkey.doctor.host.context import Context
from stationkey.doctor.host.files import ENTER, READ, WRITE, Facts, User, account_of, look_at, octal, permits, user_name
from stationkey.doctor.report import RUN_AS, Verdict, failure, listed, not_checked, ok, warning
from stationkey.errors import StationKeyError
from stationkey.system.state_dir import DATABASE_NAME, LOCK_NAME, refuse_planted, refuse_unfit

_GET_FLAGS: Final = 0x80006601 | struct.calcsize("l") << 16
"""FS_IOC_GETFLAGS, as most machines number it; another one refuses it, and nothing is said."""
_FIXED: Final = 0x10 | 0x20
"""FS_IMMUTABLE_FL, FS_APPEND_FL."""
_OURS: Final = frozenset(
    {LOCK_NAME, DIRECTORY_NAME, *(f"{DATABASE_NAME}{end}" for end in ("", "-wal", "-shm", "-journal"))}
)


def look_at_directory(context: Context) -> tuple[Facts, User, Facts, StationKeyError | None, bool]:
    """Look at the directory, and ask what the daemon would say of it at its start."""
    path, user = context.settings.state_dir, context.daemon.user
    facts, refused, immutable = look_at(path, follow=True, user=user), None, False
    try:
        immutable = _is_immutable(refuse_unfit(path, user=user.uid))
    except StationKeyError as error:
        # The way there may be closed to another user alone.
        refused = error if context.me.uid in {0, user.uid} or error.reason != "state_dir_unusable" else None
    except OSError:
        pass  # it is gone since it was looked at, or closed to this user
    return facts, user, nearest(path), refused, immutable


def _is_immutable(path: Path) -> bool:
    """Whether a directory has a mark by which not even root makes a file in it [ioctl_iflags(2)]."""
    flags = bytearray(8)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.ioctl(descriptor, _GET_FLAGS, flags)
    except OSError:  # not every file system has such marks
        return False
    finally:
        os.close(descriptor)
    return bool(int.from_bytes(flags[:4], sys.byteorder) & _FIXED)


def nearest(path: Path) -> Facts:
    """Look at the directory that would have to be written to, to make the missing one."""
    for directory in path.absolute().parents:
        if (facts := look_at(directory, follow=True)).kind == "directory":
            return facts
    return look_at(Path("/"))


def judge_directory(
    facts: Facts, user: User, nearest: Facts, refused: StationKeyError | None, immutable: bool
) -> Verdict:
    """Judge the directory itself.

    Args:
        facts: of what is there, links followed.
        user: the daemon's.
        nearest: the directory in which it would be made.
        refused: what the daemon would say of it at its start, or None.
        immutable: whether the file system lets nobody write there.
    """
    path, mode, owner = facts.path, octal(facts.mode), user_name(facts.uid)
    if facts.closed is not None:
        return failure(f"the daemon's user {user.name} may not enter {facts.closed}", f"chmod o+x {facts.closed}")
    if facts.kind == "unseen":
        return not_checked(f"{path} is not visible from here", RUN_AS)
    if facts.kind == "missing" and refused is None and not permits(nearest, user, WRITE | ENTER):
        return failure(
            f"there is no {path}, and the daemon's user {user.name} may not make it in {nearest.path}",
            f"install -d -m 0700 -o {user.account} {path}, or StateDirectory=stationkey in the unit",
        )
    if facts.kind == "missing" and refused is None:
        return warning(
            f"there is no {path} yet: the daemon has never run with it",
            "start the daemon; if it has run before, is this the right --state-dir?",
            stops=True,
        )
    if facts.kind == "directory" and not permits(facts, user, READ | WRITE | ENTER):
        return failure(
            f"{path} belongs to {owner} (mode {mode}), and the daemon's user {user.name} may not write there",
            f"is it the right directory, and User= in the unit? If so, stop the daemon; chown {user.account} {path}",
            stops=False,
        )
    if facts.kind == "directory" and facts.mode & 0o022:
        return failure(
            f"others may write in {path} (mode {mode}): they can replace the ledger and the active keys",
            f"chmod 0700 {path}, and see that all in it is the daemon's",
            stops=False,
        )
    if refused is not None:
        return failure(refused.message, refused.hint, stops=facts.kind != "directory")
    if facts.kind != "directory":
        return failure(f"{path} is not a directory", "name another one as state_dir")
    if immutable:
        return failure(
            f"nothing can be written in {path}: it is immutable, or append-only",
            f"chattr -i -a {path}; see who set it (lsattr -d)",
            stops=False,
        )
    if facts.mode & 0o077:
        return warning(f"others may look into {path} (mode {mode})", f"chmod 0700 {path}; the daemon does so at start")
    return ok(f"{path} belongs to {owner} and is closed to others")


def look_at_files(context: Context) -> tuple[list[Facts], int, User, StationKeyError | None] | Verdict:
    """Look at what is in the directory, and ask what the daemon would say of it at its start."""
    path, user = context.settings.state_dir, context.daemon.user
    try:
        names = sorted(os.listdir(path))[:1000]  # noqa: PTH208 - names, and no more than these
        refuse_planted(path)
    except OSError:
        return not_checked(f"user {context.me.name} may not look into {path}", RUN_AS)
    except StationKeyError as error:
        return [look_at(path / name) for name in names], path.stat().st_uid, user, error
    return [look_at(path / name) for name in names], path.stat().st_uid, user, None


def judge_files(inside: list[Facts], owner: int, user: User, refused: StationKeyError | None) -> Iterator[Verdict]:
    """Judge what is in the directory.

    Args:
        inside: what is there.
        owner: uid of the directory's owner.
        user: the daemon's.
        refused: what the daemon would say of it at its start, or None.
    """
    ours = [facts for facts in inside if facts.path.name in _OURS and facts.kind in {"file", "directory"}]
    links = [facts.path.name for facts in inside if facts.kind == "link"]
    foreign = [facts for facts in ours if facts.uid != owner]
    shut = [facts.path.name for facts in ours if facts.uid == user.uid != 0 and not facts.mode & 0o200]
    exposed = [facts for facts in ours if facts.mode & 0o077]
    if foreign:
        names = listed(f"{facts.path.name} ({user_name(facts.uid)})" for facts in foreign)
        yield failure(
            f"not all in the state directory belongs to its owner, {user_name(owner)}: {names}",
            f"was the daemon started by hand, as root? Stop it, then chown -h {account_of(owner)}, on each of them",
        )
    elif refused is not None:
        yield failure(refused.message, "find out who put it there, and move it away (mv); ls -li shows it")
    if links:
        yield failure(
            f"there are symbolic links in the state directory: {listed(links)}",
            "the daemon makes none, and follows none; look at where they lead (ls -l), and remove them",
        )
    if shut:
        yield failure(f"the daemon may not write its own {listed(shut)}", "chmod u+w, on each of them")
    if exposed:
        names, advice = listed(f"{one.path.name} ({octal(one.mode)})" for one in exposed), "chmod go= each of them"
        if any(facts.mode & 0o022 for facts in exposed):
            yield failure(f"others may write {names}", advice)
        else:
            yield warning(f"others may read {names}", advice)
    if not (foreign or refused or links or shut or exposed):
        yield ok(f"{len(ours)} files, all of one owner and closed to others")
