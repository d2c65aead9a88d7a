"""The state directory, the disk that it is on, the daemon that has it, and the ledger, read without a trace."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

from stationkey.config.file import SYSTEM_FILE
from stationkey.config.settings import DAY
from stationkey.contract.active_names import DIRECTORY_NAME
from stationkey.contract.profiles import CertificateType
from stationkey.doctor.config.certificates import MONTH
from stationkey.doctor.host.context import Context, Daemon
from stationkey.doctor.host.files import ENTER, READ, WRITE, Facts, User, look_at, octal, permits
from stationkey.doctor.report import Finding, failure, hidden, listed, ok, refusal, unknown, warning
from stationkey.doctor.runner import Check, within
from stationkey.doctor.state.site import look_at_site
from stationkey.errors import LedgerError, StationKeyError
from stationkey.keystore.pkcs11.uri import identifier_of
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.lifecycle import KeyState
from stationkey.ledger.migrations import SCHEMA_VERSION
from stationkey.system.files import read_regular
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
    given = [after for word, after in pairwise(words) if word == "--config"]
    texts = (text.partition("=") for text in (*words, *variables))
    given += [value for name, _, value in texts if name in {"--config", "STATIONKEY_CONFIG"} and value]
    return given[0] if given else ""


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
    advice, fewer = (f"find what fills it: du {one} {path} | sort -h | tail" for one in ("-xh", "--inodes -x"))
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


_MAX_FILE: Final = 1024 * 1024
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a directory of our own in it, closed to others
_MAX_COPIED: Final = 64 * 1024 * 1024
_LOG: Final = "-wal"
_PATIENCE: Final = 2.0
"""Seconds that a check of something else waits for the ledger."""
_LONG: Final = timedelta(days=7).total_seconds()
"""After which somebody should ask where a certificate is."""
_PASSING: Final = frozenset({"ledger_older", "ledger_busy"})
"""Reasons of the ledger by which nothing is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What matters of a ledger.

    Attributes:
        keys: all on record.
        active_files: what each file under ``active/`` should hold, by its name.
        running: milliseconds of running time.
        wrapped: the private part of each active key in a TPM, wrapped by that, by the key's name.
        in_tokens: CKA_ID of each key in a PKCS#11 token.
    """

    keys: tuple[KeyRecord, ...]
    active_files: dict[str, bytes] = field(repr=False)
    running: int
    wrapped: dict[str, bytes] = field(repr=False)
    in_tokens: frozenset[bytes] = frozenset()


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
    if log.kind != "file" or facts.size + log.size > _MAX_COPIED or not _SHARED_MEMORY.is_dir():
        return "the last run of the daemon was cut short; start it once, and the ledger is in order"
    with tempfile.TemporaryDirectory(prefix="stationkey-doctor-", dir=_SHARED_MEMORY) as directory:
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
            in_tokens=frozenset(identifier_of(f"pkcs11:{key.location}") for key in ledger.keys.refs("pkcs11")),
        )


def contents(context: Context) -> Contents | str:
    """Read the ledger, once for all checks; see `read_ledger`."""
    return context.once(_read)


def contents_soon(context: Context) -> Contents | None:
    """Read it for a check that can do without; None if it cannot be read, or not within 2 s."""
    try:
        late: Contents | str = "it takes too long"
        found = within(_PATIENCE, lambda: contents(context), late)
    except (StationKeyError, OSError):
        return None  # the check of the ledger says why
    return None if isinstance(found, str) else found


def _read(context: Context) -> Contents | str:
    if context.settings.ledger:
        return "the ledger of a site is not read key by key"
    return read_ledger(context.settings.state_dir / DATABASE_NAME, running=context.daemon.running)


def _look_at_ledger(context: Context) -> tuple[Facts, Contents | LedgerError | str] | Finding:
    if context.settings.ledger:
        return look_at_site(context.settings)
    path = context.settings.state_dir / DATABASE_NAME
    facts = look_at(path)
    if facts.kind == "unseen" or (facts.kind == "file" and not os.access(path, os.R_OK)):
        return hidden(path)
    if facts.kind != "file" or facts.size == 0:
        return facts, "there is nothing to read"
    try:
        return facts, contents(context)
    except LedgerError as error:
        return facts, error


def _judge_ledger(facts: Facts, contents: Contents | LedgerError | str) -> Finding:
    """Judge the ledger. `contents`: what is in it, or why that is not known."""
    path = facts.path
    if facts.kind == "missing":
        return ok("no ledger yet; the daemon creates it at its first start", stops=True)
    if facts.kind != "file":
        return failure("not_a_file", f"{path} is a {facts.kind}, not a file", "find out who made it, and move it away")
    if facts.size == 0:
        advice = "if the station had keys, restore a backup before the daemon starts; else the daemon fills it"
        return warning("empty", f"{path} is empty: new, or lost with the power", advice, stops=True)
    if isinstance(contents, LedgerError):
        if contents.reason in _PASSING:
            advice = contents.hint or "which program holds it (fuser)? Requests are rejected"
            return warning(contents.reason, contents.message, advice, stops=True)
        return refusal(contents, "restore a backup of the state directory, or move it away")
    if isinstance(contents, str):
        return unknown(contents)
    return ok(f"the ledger is intact, of version {SCHEMA_VERSION}, and has {len(contents.keys)} keys on record")


def _look_at_keys(context: Context) -> tuple[Sequence[KeyRecord], float, int, tuple[CertificateType, ...]] | Finding:
    found = contents(context)
    if isinstance(found, str):
        return unknown(found)
    return found.keys, time.time(), found.running, context.settings.policy.certificate_types


def _judge_keys(
    keys: Sequence[KeyRecord], now: float, running: int, served: tuple[CertificateType, ...]
) -> list[Finding]:
    """Judge the keys on record. `now` is Unix time, `running` milliseconds of running time."""
    living = [key for key in keys if key.has_owner and key.state is not KeyState.DESTROYED]
    pending = [key for key in living if key.state is KeyState.PRE_ACTIVATION]
    waiting = [key for key in pending if not key.failed]
    old = [key for key in waiting if now - key.created_at / 1000 > _LONG]
    failed = [_called(key) for key in pending if key.failed]
    overdue = [key for key in living if key.due is not None and key.due < running - DAY]
    owners = {key.owner for key in living if key.state is KeyState.ACTIVE}
    kept = {(key.owner, key.root) for key in living if key.previous}
    renewed = [key for key in living if key.state is KeyState.ACTIVE and (key.owner, key.root) in kept]
    unconfirmed = [_called(key) for key in renewed if not key.confirmed]
    found = [finding for key in keys for finding in _judge_key(key, now)]
    if not owners:
        told = "no key is active: no certificate was installed, or it was not reported as installed"
        found.append(warning("none_active", told, "request a certificate; Josev then reports it as installed"))
    if old:
        told = f"{len(old)} of {len(waiting)} pending keys have waited for their certificate for more than 7 days"
        found.append(warning("waiting", told, "does the CSMS sign? stationkey keys list shows them; they expire"))
    if failed:
        told = f"the certificate of {listed(failed)} was not installed"
        found.append(warning("not_installed", told, "stationkey keys history ID; Josev's log"))
    if overdue:
        found.append(warning("overdue", f"{len(overdue)} keys are overdue", "does the daemon run, and may it write?"))
    if not any(finding.advice for finding in found):
        found.append(ok(f"{len(owners)} keys are active, {len(waiting)} are pending; none needs attention"))
    if unconfirmed:
        found.append(ok(f"the key before is kept until the renewed one is confirmed: {listed(unconfirmed)}"))
    if owners and (missing := [one for one in served if all(owner.certificate_type != one for owner in owners)]):
        found.append(ok(f"no key is active for {listed(missing)}, which may be right"))
    return found


def _called(key: KeyRecord) -> str:
    return f"{key.key_id} ({' '.join(filter(None, (key.station, key.certificate_type, key.evse_id)))})"


def _judge_key(key: KeyRecord, now: float) -> Iterator[Finding]:
    if key.state is KeyState.COMPROMISED:
        advice = f"once its certificate is revoked: stationkey keys destroy {key.key_id}"
        yield warning("compromised", f"{_called(key)} is marked as compromised and still on record", advice)
    if key.state is not KeyState.ACTIVE:
        return
    if key.not_after is None:
        yield ok(f"the expiry of the certificate of {_called(key)} is not known: [josev] certificate_dir is not set")
        return
    left, ends = timedelta(seconds=key.not_after - now), f"{datetime.fromtimestamp(key.not_after, UTC):%Y-%m-%d}"
    what = f"the certificate of the active key {_called(key)}"
    if left <= timedelta():
        advice = "request a new one (OCPP TriggerMessage, or Josev); is the clock right?"
        yield failure("expired", f"{what} expired on {ends}", advice)
    elif left < MONTH:
        yield warning("expires", f"{what} expires on {ends}, in {left.days} days", "request a new one [A03.FR.02]")


def _look_at_active(context: Context) -> tuple[Facts, Mapping[str, bytes | None], Mapping[str, bytes], str] | Finding:
    found, directory = contents(context), context.settings.state_dir / DIRECTORY_NAME
    if isinstance(found, str):
        return unknown(found)
    facts = look_at(directory)
    try:
        present = _files_in(directory) if facts.kind == "directory" else {}
    except OSError:
        return hidden(directory)
    when = "within a minute; if it does not, its log says why" if context.daemon.running else "at its start"
    return facts, present, found.active_files, f"the daemon corrects it {when}"


def _files_in(directory: Path) -> dict[str, bytes | None]:
    contents: dict[str, bytes | None] = {}
    for name in os.listdir(directory)[:1000]:  # noqa: PTH208 - names, and no more than these
        try:
            contents[name] = read_regular(directory / name, limit=_MAX_FILE, follow=False)
        except OSError:
            contents[name] = None
    return contents


def _judge_active(
    directory: Facts, contents: Mapping[str, bytes | None], expected: Mapping[str, bytes], when: str
) -> Finding:
    """Judge the files under ``active/``, None for what cannot be read; `when` the daemon corrects them, in words."""
    if directory.kind == "unseen":
        return hidden(directory.path)
    if directory.kind not in {"directory", "missing"}:
        told = f"{directory.path} is a {directory.kind}: the daemon does not write there, and services read other keys"
        return failure("not_a_directory", told, "find out who made it, and move it away")
    present = {name: content for name, content in contents.items() if name != ".lock" and not name.endswith(".new")}
    missing, more = sorted(expected.keys() - present.keys()), sorted(present.keys() - expected.keys())
    differ = sorted(name for name in expected.keys() & present.keys() if present[name] != expected[name])
    if differ:
        return failure("differs", f"not what the ledger says: {listed(differ)} under active/", when)
    if missing:
        return failure("missing", f"missing, so that no service can use the key: {listed(missing)} under active/", when)
    if more:
        return warning("unknown_file", f"unknown to the ledger: {listed(more)} under active/", f"{when}: deletes it")
    return ok(f"the {len(expected)} files under active/ are what the ledger says")


_LEDGER: Final = ("state.ledger",)
_READS: Final = ("state_dir",)
CHECKS: Final = (
    Check("state.directory", _look_at_directory, _judge_directory, reads=_READS),
    Check("state.files", _look_at_files, _judge_files, ("state.directory",)),
    Check("state.daemon", _look_at_daemon, _judge_daemon, reads=_READS),
    Check("state.settings", _look_at_command, _judge_settings),
    Check("state.disk", _look_at_room, _judge_room, reads=_READS),
    Check("state.filesystem", _look_at_filesystem, _judge_filesystem, reads=_READS),
    Check("state.ledger", _look_at_ledger, _judge_ledger, reads=(*_READS, "ledger")),
    Check("state.keys", _look_at_keys, _judge_keys, _LEDGER),
    Check("state.active", _look_at_active, _judge_active, _LEDGER),
)
