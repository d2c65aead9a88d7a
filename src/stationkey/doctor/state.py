"""The state directory, the disk that it is on, the ledger in it, and the keys on record."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from stationkey.active import DIRECTORY_NAME, file_name
from stationkey.doctor.certificates import MONTH
from stationkey.doctor.files import (
    ENTER,
    READ,
    WRITE,
    Facts,
    User,
    closed_on_the_way,
    look_at,
    octal,
    permits,
    user_name,
)
from stationkey.doctor.findings import CannotLookError, Finding, failure, listed, not_checked, ok, warning
from stationkey.doctor.ledger import open_for_reading
from stationkey.doctor.subject import Subject
from stationkey.errors import LedgerError
from stationkey.ledger import DATABASE_NAME, KeyRecord
from stationkey.lifecycle import KeyState
from stationkey.migrations import SCHEMA_VERSION
from stationkey.profiles import CertificateType
from stationkey.state import LOCK_NAME
from stationkey.terms import DAY

DIRECTORY_IDS: Final = ("state.directory", "state.files", "state.daemon")
DISK_IDS: Final = ("state.disk", "state.filesystem")
LEDGER_IDS: Final = ("state.ledger", "state.keys", "state.active")

_OURS: Final = frozenset({DATABASE_NAME, f"{DATABASE_NAME}-wal", f"{DATABASE_NAME}-shm", f"{DATABASE_NAME}-journal"})
_MEBIBYTE: Final = 1024 * 1024
_LEAST: Final = 4 * _MEBIBYTE
"""Of free room: for the log of a minute, and for the ledger to be written anew after a destruction."""
_LITTLE: Final = 64 * _MEBIBYTE
_LEAST_FILES: Final = 16
_LITTLE_FILES: Final = 1000
_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
_FOREIGN: Final = frozenset({"vfat", "msdos", "exfat", "ntfs", "ntfs3"})
_REMOTE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs"})
_LONG: Final = 7 * DAY
"""Milliseconds after which somebody should ask where a certificate is."""


def check_directory(subject: Subject) -> Iterator[Finding]:
    """The directory, what lies in it, and whether the daemon has it."""
    path, user = subject.settings.state_dir, subject.daemon.user
    facts = look_at(path)
    followed = look_at(path, follow=True)
    yield from judge_directory(followed, facts, user, closed_on_the_way(path, user), _nearest(path))
    yield _judge_daemon(subject)
    if followed.kind != "directory":
        raise CannotLookError(f"there is no directory {path}")
    try:
        entries = sorted(os.listdir(path))[:1000]  # noqa: PTH208 - names, and no more of them than these
    except OSError:
        raise CannotLookError(
            f"user {subject.me.name} may not look into {path}; run it as root or as {user.name}"
        ) from None
    inside = [look_at(path / name) for name in entries]
    yield from judge_files(inside, owner=followed.uid, user=user)


def _nearest(path: Path) -> Facts:
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
        facts: of what is there, links followed; `unfollowed`: of the name itself.
        user: the daemon's.
        closed: a directory on the way that it may not enter, or None.
        nearest: the directory in which it would be made.
    """
    name, path = "state.directory", facts.path
    mine = f"install -d -m 0700 -o {user.name} {path}"
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
            f"chown -R {user.name} {path} && chmod 0700 {path}",
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
    elif facts.uid not in {user.uid, 0} and user.uid == 0:
        yield warning(
            name,
            f"{path} belongs to {user_name(facts.uid)}, and the daemon would run as root",
            f"run it as {user_name(facts.uid)} (User= in the unit): it needs no rights of root",
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
                f"there are symbolic links in the state directory: {listed(links)}. The daemon makes none, and follows none",
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
        advice = f"chown -R {user_name(owner)} {foreign[0].path.parent}; was the daemon started by hand, as root?"
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
    open_to_others = [facts for facts in ours if facts.mode & 0o077]
    if open_to_others:
        names = listed(f"{facts.path.name} ({octal(facts.mode)})" for facts in open_to_others)
        badly = any(facts.mode & 0o022 for facts in open_to_others)
        advice = f"chmod go= {open_to_others[0].path.parent}/*"
        told = f"others may {'write' if badly else 'read'} {names}"
        found.append(failure(name, told, advice) if badly else warning(name, told, advice))
    yield from found or [ok(name, f"{len(ours)} files, all of one owner and closed to others")]


def _judge_daemon(subject: Subject) -> Finding:
    name, daemon = "state.daemon", subject.daemon
    if daemon.pid is not None:
        return ok(name, f"the daemon runs, as {daemon.user.name} (process {daemon.pid})")
    if daemon.running:
        return ok(name, "the daemon runs, in another part of this machine that is not to be seen from here")
    return warning(
        name,
        f"no daemon has this state directory in use; it would run as {daemon.user.name} ({daemon.known_by})",
        "start it: systemctl start stationkey, or stationkey serve",
    )


def check_disk(subject: Subject) -> Iterator[Finding]:
    """Room, and what kind of file system it is."""
    path = subject.settings.state_dir
    there = path if look_at(path, follow=True).kind == "directory" else _nearest(path).path
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
    if room.octets < room.needed:
        return failure(
            name, f"{free} are free at {room.path}, and {room.needed / _MEBIBYTE:.1f} may be needed at once", advice
        )
    if room.files is not None and room.files < _LEAST_FILES:
        return failure(name, f"no more than {room.files} files can be made at {room.path}", advice)
    if room.octets < max(_LITTLE, room.needed):
        return warning(name, f"only {free} are free at {room.path}", advice)
    if room.files is not None and room.files < _LITTLE_FILES:
        return warning(name, f"no more than {room.files} files can be made at {room.path}", advice)
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


def check_ledger(subject: Subject) -> Iterator[Finding]:
    """The ledger, read and not changed; then its keys, and whether ``active/`` shows what it says."""
    name, path = "state.ledger", subject.settings.state_dir / DATABASE_NAME
    facts = look_at(path)
    if facts.kind == "missing" and look_at(path.parent, follow=True).kind != "unseen":
        yield ok(name, "there is no ledger yet; the daemon makes it at its first start")
        raise CannotLookError("there is no ledger")
    if facts.kind == "unseen" or (facts.kind == "file" and not os.access(path, os.R_OK)):
        yield not_checked(
            name, f"user {subject.me.name} may not read {path}", f"run it as root, or as {subject.daemon.user.name}"
        )
        raise CannotLookError("the ledger may not be read by this user")
    if facts.kind != "file":
        yield failure(
            name, f"{path} is a {facts.kind}, and no file", "move it away; docs/operations.md lists every file"
        )
        raise CannotLookError("the ledger cannot be read")
    try:
        with open_for_reading(subject) as ledger:
            keys, wanted, running = ledger.keys(), ledger.active_files(), ledger.running
    except LedgerError as error:
        yield _judge_unreadable(error)
        raise CannotLookError("the ledger cannot be read") from None
    yield ok(name, f"the ledger is whole, of version {SCHEMA_VERSION}, and has {len(keys)} keys on record")
    yield from judge_keys(keys, now=time.time(), running=running, served=subject.settings.policy.certificate_types)
    directory = subject.settings.state_dir / DIRECTORY_NAME
    expected = {file_name(owner): content for owner, content in wanted.items()}
    yield judge_active(look_at(directory), _contents(directory), expected, running=subject.daemon.running)


def _judge_unreadable(error: LedgerError) -> Finding:
    name = "state.ledger"
    if error.reason == "ledger_older":
        return warning(name, error.message, error.hint)
    if error.reason == "ledger_busy":
        return not_checked(name, f"{error.message}", "try again")
    return failure(name, error.message, error.hint or "restore a backup of the state directory, or move it away")


def judge_keys(
    keys: list[KeyRecord], *, now: float, running: int, served: tuple[CertificateType, ...] = tuple(CertificateType)
) -> Iterator[Finding]:
    """The keys that somebody should look at.

    Args:
        keys: all on record.
        now: Unix time.
        running: milliseconds of running time.
        served: certificate types that may be asked for.
    """
    name, found = "state.keys", list[Finding]()
    for key in keys:
        if key.state is KeyState.ACTIVE:
            found += _judge_active_key(key, now)
        elif key.state is KeyState.COMPROMISED:
            found.append(
                warning(
                    name,
                    f"{_called(key)} is marked as compromised and still on record",
                    f"once its certificate is revoked: stationkey keys destroy {key.key_id}",
                )
            )
    living = [key for key in keys if key.has_owner and key.state is not KeyState.DESTROYED]
    owners = {key.owner for key in living if key.state is KeyState.ACTIVE}
    if not owners:
        found.append(
            warning(
                name,
                "no key is active: no certificate was installed, or it was not reported as installed",
                "ask for a CSR, have it signed, and report certificate_installation_status (docs/integration.md)",
            )
        )
    else:
        missing = [one for one in served if all(owner[0] != one for owner in owners)]
        if missing:
            found.append(ok(name, f"no key is active for {listed(missing)}, which may be right"))
    waiting = [key for key in living if key.state is KeyState.PRE_ACTIVATION and not key.failed]
    old = [key for key in waiting if now - key.created_at / 1000 > _LONG / 1000]
    if old:
        longest = max(int(now - key.created_at / 1000) // 86_400 for key in old)
        found.append(
            warning(
                name,
                f"{len(old)} of {len(waiting)} pending keys wait for their certificate since a week and more ({longest} days)",
                "does the CSMS sign? stationkey keys list shows them; they end by themselves",
            )
        )
    failed = [key for key in living if key.failed and key.state is KeyState.PRE_ACTIVATION]
    if failed:
        found.append(
            warning(
                name,
                f"the installation of a certificate failed for {listed(map(_called, failed))}",
                "stationkey keys history ID says more; so does the log of Josev",
            )
        )
    overdue = [key for key in living if key.due is not None and key.due < running - DAY]
    if overdue:
        found.append(
            warning(name, f"{len(overdue)} keys should have ended by now", "does the daemon run, and may it write?")
        )
    if all(not finding.advice for finding in found):
        found.append(ok(name, f"{len(owners)} keys are active, {len(waiting)} are pending; none needs attention"))
    yield from found


def _called(key: KeyRecord) -> str:
    return f"{key.key_id} ({f'{key.certificate_type} {key.evse_id or str()}'.strip()})"


def _judge_active_key(key: KeyRecord, now: float) -> Iterator[Finding]:
    name = "state.keys"
    if key.not_after is None:
        yield ok(name, f"when the certificate of {_called(key)} ends is not known: [josev] certificate_dir is not set")
        return
    left = key.not_after - now
    ends = datetime.fromtimestamp(key.not_after, UTC).strftime("%Y-%m-%d")
    if left <= 0:
        yield failure(
            name,
            f"the certificate of the active key {_called(key)} ended on {ends}",
            "have a new one asked for (OCPP TriggerMessage, or Josev); is the clock right?",
        )
    elif left < MONTH.total_seconds():
        yield warning(
            name,
            f"the certificate of the active key {_called(key)} ends on {ends}, in {int(left // 86_400)} days",
            "have a new one asked for: one month before its end is the rule [A03.FR.02]",
        )


def _contents(directory: Path) -> dict[str, bytes | None] | None:
    """What is in ``active/``: None for a name that is no file or may not be read; None for all where it cannot be listed."""
    try:
        names = os.listdir(directory)[:1000]  # noqa: PTH208 - names, and no more than these
    except FileNotFoundError:
        return {}
    except OSError:
        return None
    contents: dict[str, bytes | None] = {}
    for name in names:
        path = directory / name
        try:
            contents[name] = path.read_bytes() if look_at(path).kind == "file" else None
        except OSError:
            contents[name] = None
    return contents


def judge_active(
    directory: Facts, contents: dict[str, bytes | None] | None, expected: dict[str, bytes], *, running: bool
) -> Finding:
    """Whether the files under ``active/`` are what the ledger says.

    Args:
        directory: ``active/`` itself.
        contents: by name; None for all where they may not be listed.
        expected: by name, as the ledger has it.
        running: whether the daemon runs: it then makes them right within a minute.
    """
    name = "state.active"
    when = "the daemon makes it right within a minute; if it stays so, its log says why"
    when = when if running else "the daemon makes it right at its start"
    if directory.kind == "link" or (directory.kind not in {"directory", "missing", "unseen"}):
        return failure(
            name,
            f"{directory.path} is a {directory.kind}: the daemon does not write there, and services read who knows what",
            f"rm {directory.path}, and find out who made it",
        )
    if contents is None or directory.kind == "unseen":
        return not_checked(name, f"{directory.path} may not be looked into by this user", "run it as root")
    present = {known: content for known, content in contents.items() if known != ".lock" and not known.endswith(".new")}
    missing, more = sorted(expected.keys() - present.keys()), sorted(present.keys() - expected.keys())
    differ = sorted(known for known in expected.keys() & present.keys() if present[known] != expected[known])
    if differ:
        return failure(
            name, f"not what the ledger says, and so of no use or another's: {listed(differ)} under active/", when
        )
    if missing:
        return failure(name, f"missing under active/, so no service can use the key: {listed(missing)}", when)
    if more:
        return warning(
            name, f"under active/ lies what the ledger knows nothing of: {listed(more)}", f"{when}: it is deleted"
        )
    return ok(name, f"the {len(expected)} files under active/ are what the ledger says")
