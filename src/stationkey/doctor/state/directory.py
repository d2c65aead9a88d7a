"""The state directory: whose it is, who may enter, what lies in it, and whether the daemon has it."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from stationkey.contract.active_names import DIRECTORY_NAME
from stationkey.doctor.host.context import UNREADABLE, Subject
from stationkey.doctor.host.files import (
    ENTER,
    READ,
    WRITE,
    Facts,
    User,
    account_of,
    closed_on_the_way,
    look_at,
    octal,
    permits,
    user_name,
)
from stationkey.doctor.report import CannotLookError, Finding, Level, failure, listed, not_checked, ok, warning
from stationkey.errors import StationKeyError
from stationkey.system.state_dir import DATABASE_NAME, LOCK_NAME, refuse_planted, refuse_unfit

DIRECTORY_IDS: Final = ("state.directory", "state.files", "state.daemon", "state.settings")
_NOTHING: Final = 2.0
"""Seconds: the kernel counts the start of a process in hundredths, and from another beginning."""
_GET_FLAGS: Final = 0x80006601 | struct.calcsize("l") << 16
"""FS_IOC_GETFLAGS, as most machines number it; on another one it is refused, and nothing is said."""
_FIXED: Final = 0x10 | 0x20
"""FS_IMMUTABLE_FL, FS_APPEND_FL."""
_OURS: Final = frozenset({DATABASE_NAME, f"{DATABASE_NAME}-wal", f"{DATABASE_NAME}-shm", f"{DATABASE_NAME}-journal"})


def check_directory(subject: Subject) -> Iterator[Finding]:
    """The directory, what lies in it, and whether the daemon has it."""
    path, user = subject.settings.state_dir, subject.daemon.user
    facts = look_at(path)
    followed = look_at(path, follow=True)
    if facts.kind == "missing" and "state_dir" in subject.configured.lost:
        raise CannotLookError(UNREADABLE)
    found = list(judge_directory(followed, facts, user, closed_on_the_way(path, user), nearest(path)))
    if all(finding.level is not Level.FAILURE for finding in found) and (refused := _refused(subject)):
        found = [refused]
    yield from found
    yield _judge_daemon(subject)
    yield _check_settings(subject)
    if followed.kind != "directory":
        raise CannotLookError(f"there is no directory {path}")
    try:
        entries = sorted(os.listdir(path))[:1000]  # noqa: PTH208 - names, and no more than these
    except OSError:
        raise CannotLookError(
            f"user {subject.me.name} may not look into {path}; run it as root, or as the daemon's user"
        ) from None
    inside = [look_at(path / name) for name in entries]
    files = list(judge_files(inside, owner=followed.uid, user=user))
    if all(finding.level is not Level.FAILURE for finding in files) and (planted := _planted(path)):
        files = [planted]
    yield from files


def _refused(subject: Subject) -> Finding | None:
    """What the daemon itself would say of the directory at its start, where it would not take it.

    Its rules are asked, not repeated: who else could put another directory there is a long story. Of another user's
    directories only root sees enough for that.
    """
    path, user = subject.settings.state_dir, subject.daemon.user
    if subject.me.uid not in {0, user.uid}:
        return None
    try:
        real = refuse_unfit(path, user=user.uid)
        if _is_immutable(real):
            return failure(
                "state.directory",
                f"nothing can be written in {real}: it is marked as immutable, or to be appended to alone",
                f"chattr -i -a {real}; see who set it (lsattr -d)",
            )
    except StationKeyError as error:
        return failure("state.directory", error.message, error.hint)
    except OSError:
        return None  # it is gone since it was looked at
    return None


def _planted(path: Path) -> Finding | None:
    """What the daemon would say of the files in it at its start, where it would open none of them."""
    try:
        refuse_planted(path)
    except StationKeyError as error:
        return failure(
            "state.files", error.message, "find out who put it there, and move it away (mv); ls -li shows it"
        )
    return None


def _is_immutable(path: Path) -> bool:
    """Whether the file system has a mark on a directory by which not even root makes a file in it [ioctl_iflags(2)]."""
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
    """The directory that would have to be written to, to make the missing one."""
    for directory in path.absolute().parents:
        if (facts := look_at(directory, follow=True)).kind == "directory":
            return facts
    return look_at(Path("/"))


def judge_directory(
    facts: Facts, unfollowed: Facts, user: User, closed: Path | None, nearest: Facts
) -> Iterator[Finding]:
    """The directory itself.

    Args:
        facts: of what is there, links followed.
        unfollowed: of the name itself.
        user: the daemon's.
        closed: a directory on the way that it may not enter, or None.
        nearest: the directory in which it would be made.
    """
    name, path = "state.directory", facts.path
    mine = f"install -d -m 0700 -o {user.account} {path}"
    if closed is not None:
        yield failure(
            name, f"the daemon's user {user.name} may not enter {closed}, on the way to {path}", f"chmod o+x {closed}"
        )
    elif facts.kind == "unseen":
        yield not_checked(name, f"{path} is not to be seen from here", "run it as root, or as the daemon's user")
    elif facts.kind == "missing" and unfollowed.kind == "link":
        yield failure(name, f"{path} is a link that leads nowhere", f"rm {path}, or make what it leads to")
    elif facts.kind == "missing" and not permits(nearest, user, WRITE | ENTER):
        yield failure(
            name,
            f"there is no {path}, and the daemon's user {user.name} may not make it in {nearest.path}",
            f"{mine}, or StateDirectory=stationkey in the unit",
        )
    elif facts.kind == "missing":
        yield warning(
            name,
            f"there is no {path} yet: the daemon has never run with it",
            "start the daemon; if it has run before, is this the right --state-dir?",
        )
    elif facts.kind != "directory":
        yield failure(name, f"{path} is no directory", "name another one as state_dir")
    elif facts.exposed is not None:
        yield failure(
            name, f"every user may exchange {path}: {facts.exposed} is open to all", f"chmod o-w {facts.exposed}"
        )
    elif not permits(facts, user, READ | WRITE | ENTER):
        yield failure(
            name,
            f"{path} belongs to {user_name(facts.uid)} (mode {octal(facts.mode)}), and the daemon's user {user.name} "
            "may not write there",
            f"chown -R {user.account} {path} && chmod 0700 {path}",
        )
    elif facts.mode & 0o022:
        yield failure(
            name,
            f"others may write in {path} (mode {octal(facts.mode)}): they can exchange the ledger and the active keys",
            f"chmod 0700 {path}, and see that all in it is the daemon's",
        )
    elif facts.mode & 0o077:
        yield warning(
            name,
            f"others may look into {path} (mode {octal(facts.mode)})",
            f"chmod 0700 {path}; the daemon does so at its start, where there is a ledger in it",
        )
    elif facts.uid != user.uid:
        yield failure(
            name,
            f"{path} belongs to {user_name(facts.uid)}, and the daemon's user {user.name} does not take another's",
            f"run it as {account_of(facts.uid)} (User= in the unit), or chown -R {user.account} {path}",
        )
    else:
        yield ok(name, f"{path} belongs to {user_name(facts.uid)} and is closed to others")


def judge_files(inside: list[Facts], *, owner: int, user: User) -> Iterator[Finding]:
    """What lies in the directory: links, files of others, files that others may read, files that are not ours."""
    name, found = "state.files", list[Finding]()
    links = [facts.path.name for facts in inside if facts.kind == "link"]
    if links:
        found.append(
            failure(
                name,
                f"there are symbolic links in the state directory: {listed(links)}. The daemon makes none, and "
                "follows none",
                "who could write there? Remove them, after a look at where they lead (ls -l)",
            )
        )
    ours = [
        facts for facts in inside if facts.path.name in _OURS | {LOCK_NAME, DIRECTORY_NAME} and facts.kind != "link"
    ]
    foreign = [facts for facts in ours if facts.uid != owner]
    if foreign:
        names = listed(f"{facts.path.name} ({user_name(facts.uid)})" for facts in foreign)
        told = f"not all in the state directory belongs to its owner, {user_name(owner)}: {names}"
        advice = f"chown -R {account_of(owner)} {foreign[0].path.parent}; was the daemon started by hand, as root?"
        locked_out = any(not permits(facts, user, READ | WRITE) for facts in foreign)
        found.append(failure(name, told, advice) if locked_out else warning(name, told, advice))
    wrong = [
        facts.path.name
        for facts in ours
        if facts.kind not in {"file", "directory"} or (facts.kind == "directory") != (facts.path.name == DIRECTORY_NAME)
    ]
    if wrong:
        found.append(
            failure(
                name, f"not what it should be: {listed(wrong)}", "move it away; docs/operations.md lists every file"
            )
        )
    shut = [facts.path.name for facts in ours if facts.uid == user.uid and not facts.mode & 0o200]
    if shut and user.uid != 0:
        found.append(failure(name, f"the daemon may not write its own {listed(shut)}", "chmod u+w, on each of them"))
    open_to_others = [facts for facts in ours if facts.mode & 0o077 and facts.path.name not in wrong]
    if open_to_others:
        names = listed(f"{facts.path.name} ({octal(facts.mode)})" for facts in open_to_others)
        badly = any(facts.mode & 0o022 for facts in open_to_others)
        advice = f"chmod go= {open_to_others[0].path.parent}/*"
        told = f"others may {'write' if badly else 'read'} {names}"
        found.append(failure(name, told, advice) if badly else warning(name, told, advice))
    yield from found or [ok(name, f"{len(ours)} files, all of one owner and closed to others")]


def _check_settings(subject: Subject) -> Finding:
    pid = subject.daemon.pid
    if pid is None:
        return not_checked("state.settings", "no daemon is to be seen")
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
        base, started = Path(f"/proc/{pid}/cwd").readlink(), started_at(pid)
    except (OSError, ValueError, IndexError):
        return not_checked("state.settings", f"user {subject.me.name} may not look at the daemon", "run it as root")
    return judge_settings(config_of(words, variables), base, subject.configured.file, started)


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal, or by who debugs it [proc(5), /proc/pid/stat]."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[:1] in (["T"], ["t"])


def started_at(pid: int) -> float:
    """When a process was started, Unix time [proc(5), /proc/pid/stat and /proc/uptime].

    Raises:
        OSError, ValueError, IndexError: that cannot be found out.
    """
    ticks = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
    up = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    return time.time() - (up - ticks / os.sysconf("SC_CLK_TCK"))


def config_of(words: list[str], variables: list[str]) -> str:
    """The configuration file that a command line and an environment name; an empty text for none."""
    for number, word in enumerate(words):
        if word == "--config" and number + 1 < len(words):
            return words[number + 1]
        if word.startswith("--config="):
            return word.partition("=")[2]
    named = [variable.partition("=")[2] for variable in variables if variable.startswith("STATIONKEY_CONFIG=")]
    return named[0] if named else ""


def judge_settings(named: str, base: Path, file: Facts | None, started: float) -> Finding:
    """Whether the running daemon has the settings that are examined here.

    Args:
        named: the configuration file that the daemon was given, or an empty text.
        base: the directory that the daemon is in.
        file: the one that is examined, or None.
        started: when the daemon was started, Unix time.
    """
    name = "state.settings"
    if not named and file is None:
        return ok(name, "the daemon has no configuration file, and none is examined")
    examined = "none" if file is None else str(file.path)
    if not named or file is None or os.path.realpath(base / named) != os.path.realpath(file.path):
        return warning(
            name,
            f"the running daemon has the configuration file {named or 'none'}, and {examined} is examined",
            f"stationkey doctor --config {named}" if named else "leave --config out, or give it to the daemon",
        )
    if file.modified > started + _NOTHING:
        return warning(
            name,
            f"{file.path} was changed after the daemon was started: what it says does not hold yet",
            "restart the daemon: systemctl restart stationkey",
        )
    return ok(name, "the running daemon has the settings that are examined")


def _judge_daemon(subject: Subject) -> Finding:
    name, daemon = "state.daemon", subject.daemon
    if daemon.pid is not None and _is_stopped(daemon.pid):
        return failure(
            name,
            f"the daemon (process {daemon.pid}) is stopped: it holds the state directory, and answers nothing",
            f"kill -CONT {daemon.pid}, or systemctl restart stationkey; who sent it SIGSTOP, or is it in a debugger?",
        )
    if daemon.pid is not None:
        return ok(name, f"the daemon runs, as {daemon.user.name} (process {daemon.pid})")
    if daemon.running:
        return ok(name, "the daemon runs, in another part of this machine that is not to be seen from here")
    return warning(
        name,
        f"no daemon has this state directory in use; it would run as {daemon.user.name} ({daemon.known_by})",
        "start it: systemctl start stationkey, or stationkey serve",
    )
