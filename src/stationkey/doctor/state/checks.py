"""The state directory, the disk that it is on, and the daemon that has it. The daemon's own rules are asked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from stationkey.config.file import SYSTEM_FILE
from stationkey.contract.active_names import DIRECTORY_NAME
from stationkey.doctor.host.context import Context, Daemon
from stationkey.doctor.host.files import ENTER, READ, WRITE, Facts, User, look_at, octal, permits
from stationkey.doctor.report import Finding, failure, hidden, listed, ok, refusal, unknown, warning
from stationkey.doctor.runner import Check
from stationkey.doctor.state import keys
from stationkey.errors import StationKeyError
from stationkey.system.state_dir import DATABASE_NAME, LOCK_NAME, refuse_planted, refuse_unfit

_OURS: Final = frozenset(
    {LOCK_NAME, DIRECTORY_NAME, *(f"{DATABASE_NAME}{end}" for end in ("", "-wal", "-shm", "-journal"))}
)
_TOLERANCE: Final = 2.0
"""Seconds: the kernel counts the start of a process in hundredths, and from another beginning."""
_STARTED: Final = 19
"""Field of /proc/PID/stat behind the name, from 0 [proc(5)]."""
_MEBIBYTE: Final = 1024 * 1024
_LEAST: Final = 4 * _MEBIBYTE
"""Of free room: for the log of a minute, and for the ledger to be rewritten after a destruction."""
_LITTLE: Final = 64 * _MEBIBYTE
_LEAST_FILES: Final = 16
_LITTLE_FILES: Final = 1000
_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
_FOREIGN: Final = frozenset({"vfat", "msdos", "exfat", "ntfs", "ntfs3"})
_REMOTE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs"})


def _look_at_directory(context: Context) -> tuple[Facts, User, Facts, StationKeyError | None, bool]:
    path, user = context.settings.state_dir, context.daemon.user
    facts, refused = look_at(path, follow=True, user=user), None
    try:
        refuse_unfit(path, user=user.uid)
    except StationKeyError as error:
        # The way there may be closed to another user alone.
        refused = error if context.sees_all or error.reason != "state_dir_unusable" else None
    except OSError:
        pass  # it is gone since it was looked at, or closed to this user
    # Not even root writes in an immutable directory, whatever its mode.
    return facts, user, _nearest(path), refused, not context.sees_all or os.access(path, os.W_OK)


def _nearest(path: Path) -> Facts:
    """Look at the directory that would have to be written to, to make the missing one."""
    for directory in path.absolute().parents:
        if (facts := look_at(directory, follow=True)).kind == "directory":
            return facts
    return look_at(Path("/"))


def _judge_directory(
    facts: Facts, user: User, nearest: Facts, refused: StationKeyError | None, writable: bool
) -> Finding:
    """Judge the directory itself. `nearest` is the one to make it in, `writable` what the kernel says of it."""
    path, mode, owner = facts.path, octal(facts.mode), User.numbered(facts.uid).name
    if facts.closed is not None:
        advice = f"let it: setfacl -m u:{user.name}:x {facts.closed}; or set another state_dir"
        return failure("unreachable", f"the daemon's user {user.name} may not enter {facts.closed}", advice)
    if facts.kind == "unseen":
        return hidden(path)
    if refused is not None:
        return refusal(refused, stops=facts.kind != "directory")
    if facts.kind == "missing" and not permits(nearest, user, WRITE | ENTER):
        told = f"{path} is missing, and the daemon's user {user.name} may not make it in {nearest.path}"
        advice = f"install -d -m 0700 -o {user.name} {path}, or StateDirectory=stationkey in the unit"
        return failure("not_creatable", told, advice)
    if facts.kind == "missing":
        told, advice = f"{path} is missing: the daemon never ran with it", "start the daemon, or correct state_dir"
        return warning("missing", told, advice, stops=True)
    if not permits(facts, user, READ | WRITE | ENTER):
        told = f"{path} belongs to {owner} (mode {mode}): the daemon's user {user.name} may not write there"
        advice = f"is it the right directory, and User= in the unit? If so, stop the daemon; chown {user.name} {path}"
        return failure("unwritable", told, advice, stops=False)
    if facts.mode & 0o022:
        told = f"others may write in {path} (mode {mode}): they can replace the ledger and the active keys"
        return failure("others_write", told, f"chmod 0700 {path}, and see that all in it is the daemon's", stops=False)
    if not writable:
        told = f"nothing can be written in {path}: it is immutable, or its disk is read-only"
        return failure("immutable", told, f"lsattr -d {path}; chattr -i {path}; see who set it", stops=False)
    if facts.mode & 0o077:
        return warning("others_read", f"others may look into {path} (mode {mode})", f"chmod 0700 {path}")
    return ok(f"{path} belongs to {owner} and is closed to others")


def _look_at_files(context: Context) -> tuple[list[Facts], User, StationKeyError | None] | Finding:
    path, refused = context.settings.state_dir, None
    try:
        inside = [look_at(entry) for entry in sorted(path.iterdir()) if entry.name in _OURS]
        refuse_planted(path)
    except OSError:
        return hidden(path)
    except StationKeyError as error:
        refused = error
    return inside, context.daemon.user, refused


def _judge_files(inside: list[Facts], user: User, refused: StationKeyError | None) -> Iterator[Finding]:
    """Judge the daemon's own files; `refused` is what the daemon would say of them at its start."""
    shut = [one.path.name for one in inside if one.uid == user.uid != 0 and not one.mode & 0o200]
    exposed = [one for one in inside if one.mode & 0o077 and one.kind != "link"]
    if refused is not None:
        yield failure(refused.reason, refused.message, f"{refused.hint} (ls -li); was the daemon started as root?")
    if shut:
        yield failure("unwritable", f"the daemon may not write its own {listed(shut)}", "chmod u+w, on each of them")
    if exposed:
        names, advice = listed(f"{one.path.name} ({octal(one.mode)})" for one in exposed), "chmod go= each of them"
        if any(one.mode & 0o022 for one in exposed):
            yield failure("others_write", f"others may write {names}", advice)
        else:
            yield warning("others_read", f"others may read {names}", advice)
    if not (refused or shut or exposed):
        yield ok(f"{len(inside)} files, all of one owner and closed to others")


def _look_at_daemon(context: Context) -> tuple[Daemon, str] | Finding:
    lock = context.settings.state_dir / LOCK_NAME
    if not context.daemon.running and look_at(lock).kind == "unseen":
        return hidden(lock)
    try:
        state = "" if context.daemon.pid is None else _stat(context.daemon.pid)[0]
    except OSError:
        state = ""
    return context.daemon, state


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def _judge_daemon(daemon: Daemon, state: str) -> Finding:
    """Judge whether a daemon has the state directory. `state`: of its process, one letter, or an empty text."""
    if state in {"T", "t"}:
        told = f"the daemon (process {daemon.pid}) is stopped: it answers nothing"
        return failure("stopped", told, f"kill -CONT {daemon.pid}; who sent SIGSTOP, or is it in a debugger?")
    if daemon.pid is not None:
        return ok(f"the daemon runs, as {daemon.user.name} (process {daemon.pid})")
    if daemon.running:
        return ok("the daemon runs, in a part of this machine that is not visible from here")
    told = f"no daemon uses this state directory; it would run as {daemon.user.name} ({daemon.known_by})"
    return warning("not_running", told, "start it: systemctl start stationkey, or stationkey serve")


def _look_at_command(context: Context) -> tuple[str, Path, Facts | None, float] | Finding:
    pid = context.daemon.pid
    if pid is None:
        return unknown("no daemon is visible")
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
        up = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        started = time.time() - (up - int(_stat(pid)[_STARTED]) / os.sysconf("SC_CLK_TCK"))
        named = config_of(words, variables) or (str(SYSTEM_FILE) if look_at(SYSTEM_FILE).there else "")
        return named, Path(f"/proc/{pid}/cwd").readlink(), context.configured.file, started
    except (OSError, ValueError, IndexError):
        return hidden(f"process {pid}")


def config_of(words: list[str], variables: list[str]) -> str:
    """Return the configuration file that a command line or an environment names, or an empty text."""
    for number, word in enumerate(words):
        if word == "--config" and number + 1 < len(words):
            return words[number + 1]
        if word.startswith("--config="):
            return word.partition("=")[2]
    named = [variable.partition("=")[2] for variable in variables if variable.startswith("STATIONKEY_CONFIG=")]
    return named[0] if named else ""


def _judge_settings(named: str, base: Path, file: Facts | None, started: float) -> Finding:
    """Judge the configuration file of the daemon, `named` from directory `base` when it was `started` (Unix time)."""
    if not named and file is None:
        return ok("the daemon has no configuration file, and none is examined")
    if not named or file is None or os.path.realpath(base / named) != os.path.realpath(file.path):
        told = f"the daemon has the configuration file {named or 'none'}; examined: {file.path if file else 'none'}"
        advice = f"stationkey doctor --config {named}" if named else "leave --config out, or give it to the daemon"
        return warning("another_file", told, advice)
    if file.modified > started + _TOLERANCE:
        told = f"{file.path} was changed after the daemon was started: the changes do not apply yet"
        return warning("changed", told, "systemctl restart stationkey")
    return ok("the running daemon has the settings that are examined")


def _place(context: Context) -> Path:
    path = context.settings.state_dir
    return path if look_at(path, follow=True).kind == "directory" else _nearest(path).path


def _look_at_room(context: Context) -> tuple[Path, int, int | None, int] | Finding:
    path = _place(context)
    try:
        room = os.statvfs(path)
    except OSError:
        return hidden(path)
    octets = (room.f_bfree if context.daemon.user.uid == 0 else room.f_bavail) * room.f_frsize
    needed = max(_LEAST, 2 * look_at(context.settings.state_dir / DATABASE_NAME).size)
    return path, octets, room.f_favail if room.f_files else None, needed


def _judge_room(path: Path, octets: int, files: int | None, needed: int) -> Finding:
    """Judge how many octets and files are free; None where files are not counted. The daemon may need `needed`."""
    free = f"{octets / _MEBIBYTE:.1f} MiB are free at {path}"
    number = f"{files} more files can be made at {path}"
    advice, fewer = (
        f"make room: du -xh {path} | sort -h | tail",
        f"remove files: du --inodes -x {path} | sort -n | tail",
    )
    if octets < needed:
        return failure("full", f"{free}, and {needed / _MEBIBYTE:.1f} may be needed: requests are rejected", advice)
    if files is not None and files < _LEAST_FILES:
        return failure("no_inodes", number, fewer)
    if octets < max(_LITTLE, needed):
        return warning("low", free, advice)
    if files is not None and files < _LITTLE_FILES:
        return warning("few_inodes", number, fewer)
    return ok(free)


class Mount(NamedTuple):
    """A row of ``/proc/self/mountinfo`` [proc(5)]."""

    point: str
    kind: str
    options: frozenset[str]


def _look_at_filesystem(context: Context) -> tuple[Path, Mount | None] | Finding:
    path = _place(context)
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return path, find_mount(lines, path.resolve())
    except (OSError, RuntimeError):
        return hidden(path)


def find_mount(lines: list[str], path: Path) -> Mount | None:
    """Find the file system that a path without links is on: the last of the longest mount points that lead to it."""
    best: Mount | None = None
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, more = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(more) < 2:  # noqa: PLR2004 - mount point and options; type
            continue
        point = fields[4].replace("\\040", " ")
        if path.is_relative_to(point) and (best is None or len(point) >= len(best.point)):
            best = Mount(point, more[0], frozenset(fields[5].split(",") + more[-1].split(",")))
    return best


def _judge_filesystem(path: Path, mount: Mount | None) -> Finding:
    if mount is None:
        return unknown(f"the file system of {path} is not known")
    where, elsewhere = f"{path} is on {mount.kind} ({mount.point})", "set a state_dir on a disk of this machine"
    if "ro" in mount.options:
        advice = f"dmesg says whether an error caused it; if not: mount -o remount,rw {mount.point}"
        return failure("read_only", f"{where}, which is read-only", advice)
    if mount.kind in _MEMORY:
        return warning("memory", f"{where}, which is memory: keys and answers are lost at a restart", elsewhere)
    if mount.kind in _FOREIGN:
        return failure("no_modes", f"{where}, without owners and modes: the keys are open to others", elsewhere)
    if mount.kind in _REMOTE:
        return warning("network", f"{where}, over a network: SQLite's locks are not safe there", elsewhere)
    return ok(where)


_READS: Final = ("state_dir",)
CHECKS: Final = (
    Check("state.directory", _look_at_directory, _judge_directory, reads=_READS),
    Check("state.files", _look_at_files, _judge_files, ("state.directory",)),
    Check("state.daemon", _look_at_daemon, _judge_daemon, reads=_READS),
    Check("state.settings", _look_at_command, _judge_settings),
    Check("state.disk", _look_at_room, _judge_room, reads=_READS),
    Check("state.filesystem", _look_at_filesystem, _judge_filesystem, reads=_READS),
    *keys.CHECKS,
)
