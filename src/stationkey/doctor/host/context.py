"""What a check may look at: the settings, as far as they can be read, the daemon, its unit, the ledger."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, TypeVarTuple

from stationkey.config.file import Parts, read_parts, settle
from stationkey.config.options import options_of
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import DEFAULT_DEVICE, NamedStore, Settings
from stationkey.doctor.host.files import Facts, User, look_at
from stationkey.doctor.runner import ask, within
from stationkey.errors import ConfigurationError
from stationkey.system.state_dir import LOCK_NAME

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

UNIT: Final = "stationkey.service"
USER: Final = "stationkey"
"""The user that the package makes for the daemon."""
CREDENTIALS: Final = Path("/run/credentials")
"""Where systemd puts what a unit loads [systemd.exec(5), LoadCredential=]."""
_CHOSEN: Final = ("broker", "topic_prefix", "keystore", "allow_software_keys", "state_dir")
"""Options of the command line that take the place of those of the file."""
_SYSTEMD: Final = Path("/run/systemd/system")
_LOCKS: Final = Path("/proc/locks")
_PATIENCE: Final = 1.5
"""Seconds for each thing that has to be known before the checks begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line and the environment say; None where they say nothing. As for ``serve``."""

    config_file: Path | None = None
    broker: str | None = None
    topic_prefix: str | None = None
    keystore: str | None = None
    allow_software_keys: bool | None = None
    state_dir: Path | None = None
    log_format: str | None = None
    try_keys: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """The settings, as far as they can be read.

    Attributes:
        file: at the path of the configuration file; None where none is named.
        settings: what the daemon would run by, with the default in place of all that is wrong.
        unread: top-level names of the file that cannot be read and that no option replaces.
    """

    file: Facts | None
    complaints: tuple[str, ...]
    settings: Settings
    unread: frozenset[str] = frozenset()


class Unit(dict[str, str]):
    """The properties of the daemon's systemd unit; "" for one that is not there [systemctl(1), show]."""

    def __missing__(self, name: str) -> str:
        return ""

    @property
    def installed(self) -> bool:
        """Whether systemd knows it."""
        return self["LoadState"] not in {"", "not-found"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """The daemon that all this is for, as far as it can be told.

    Attributes:
        running: whether something holds the lock of the state directory.
        user: that it runs as, or would; `known_by`: how that is known, in words.
    """

    running: bool
    pid: int | None
    user: User
    known_by: str


class Context:
    """All that a check may look at.

    Attributes:
        settings: as far as they can be read, with defaults for the rest.
        unit: the daemon's; None if there is no systemd, or it does not answer.
        me: who runs the doctor.
    """

    def __init__(self, options: Options, configured: Configured, daemon: Daemon, unit: Unit | None) -> None:
        self.options = options
        self.configured = configured
        self.settings = configured.settings
        self.daemon = daemon
        self.unit = unit
        self.me = User.present()
        self._shared: dict[object, Future[Any]] = {}
        self._lock = threading.Lock()

    @property
    def sees_all(self) -> bool:
        """Whether what is closed to this user is closed to the daemon, too."""
        return self.me.uid in {0, self.daemon.user.uid}

    def stores(self, scheme: str) -> list[NamedStore]:
        """Return the key stores of a kind."""
        return [store for store in self.settings.stores if store.uri.partition(":")[0] == scheme]

    def once(self, look: Callable[[Context, *Ts], T], *about: *Ts) -> T:
        """Take a look that several checks share, once; each gets the same value, or the same error."""
        with self._lock:
            first = (look, about) not in self._shared
            shared: Future[T] = self._shared.setdefault((look, about), Future())
        if first:
            try:
                shared.set_result(look(self, *about))
            except Exception as error:  # noqa: BLE001 - raised below, to each who asks
                shared.set_exception(error)
        return shared.result()


def survey(options: Options) -> Context:
    """Find out what is to be examined. Takes some seconds at most. Never raises."""
    unread = _settle(options, Parts({}, ("the disk that the configuration file is on does not answer",), None))
    configured = within(_PATIENCE, lambda: _read_configuration(options), unread)
    unit = look_at_unit()
    unknown = Daemon(running=False, pid=None, user=User.present(), known_by="nothing else is known")
    daemon = within(_PATIENCE, lambda: _find_daemon(configured.settings.state_dir, unit), unknown)
    return Context(options, configured, daemon, unit)


def _read_configuration(options: Options) -> Configured:
    path = options.config_file
    if path is None:
        return _settle(options, Parts({}, (), frozenset()))
    facts = look_at(path, follow=True)
    try:
        parts = read_parts(path)
    except (OSError, ValueError):  # a name with a NUL in it, for example
        parts = Parts({}, (f"{path} cannot be read",), None)
    return _settle(options, parts, facts)


def _settle(options: Options, parts: Parts, facts: Facts | None = None) -> Configured:
    given, complaints = parts.given, parts.complaints
    chosen: dict[str, Any] = {name: getattr(options, name) for name in _CHOSEN}
    chosen["needs_keystore"] = Path(DEFAULT_DEVICE).exists()
    try:
        settings = settle(given, **chosen)
    except ConfigurationError as error:  # the file is at odds with the command line
        given = {path: value for path, value in given.items() if path[0] not in {"keystores", "keystore_for"}}
        settings, complaints = settle(given, **chosen), (*complaints, error.message)
    everything = frozenset(option.table or option.name for option in options_of(Settings))
    unread = (everything if parts.lost is None else parts.lost) - {name for name in _CHOSEN if chosen[name]}
    return Configured(file=facts, complaints=complaints, settings=settings, unread=unread)


def path_of(reference: SecretReference) -> Path | None:
    """The file that a reference leads to. One to a credential of the unit is followed from outside, where it runs."""
    try:
        return reference.path
    except ConfigurationError:
        path = Path(CREDENTIALS, UNIT, reference.source.partition(":")[2])
        return path if look_at(path).there else None


def look_at_unit() -> Unit | None:
    """Ask systemd for the daemon's unit."""
    if not _SYSTEMD.is_dir():
        return None
    status, said = ask(["systemctl", "show", "--no-pager", UNIT], seconds=_PATIENCE)
    if status != 0:
        return None
    unit = Unit()
    for line in said.splitlines():
        name, _, value = line.partition("=")
        unit[name] = f"{unit[name]} {value}".strip()  # one line for each of a list
    return unit


def _find_daemon(state_dir: Path, unit: Unit | None) -> Daemon:
    """Whom the daemon runs as, or would: by what runs, its unit, the user that the package makes, the directory."""
    running, pid = holder_of(look_at(state_dir / LOCK_NAME))
    if pid is not None and (runs := _user_of(pid)) is not None:
        return Daemon(running=running, pid=pid, user=runs, known_by="it runs as that")
    directory = look_at(state_dir, follow=True)
    me = User.present()
    if unit is not None and unit.installed and (named := User.named(unit["User"] or "root")) is not None:
        user, known_by = named, f"{UNIT} says so"
    elif (made := User.named(USER)) is not None:
        user, known_by = made, "that is the user which the package makes for it"
    elif directory.kind != "missing" and directory.uid != me.uid:  # one that is not seen is not this user's, either
        user, known_by = User.numbered(directory.uid), f"by the owner of {state_dir}"
    else:
        user, known_by = me, "that is who runs this"
    return Daemon(running=running, pid=pid, user=user, known_by=known_by)


def holder_of(lock: Facts) -> tuple[bool, int | None]:
    """Whether a lock is held, and by whom. By the kernel's list: to try would be to hold it for a moment [proc(5)]."""
    if lock.kind != "file":
        return False, None
    try:
        lines = _LOCKS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return False, None
    return find_lock(lines, device=lock.device, inode=lock.inode)


def find_lock(lines: list[str], *, device: int, inode: int) -> tuple[bool, int | None]:
    """The same, in the lines of ``/proc/locks``."""
    for line in lines:
        match line.split():
            case [_, "FLOCK", _, "WRITE", pid, place, *_]:
                major, minor, number = place.split(":")
                # The kernel names another device than stat does where it is none of a disk (overlay, btrfs).
                same = (int(major, 16), int(minor, 16)) == (os.major(device), os.minor(device))
                if int(number) == inode and (same or os.major(device) == 0):
                    return True, int(pid) if int(pid) > 0 else None
    return False, None


def _user_of(pid: int) -> User | None:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = dict(re.findall(r"^(\w+):(.*)$", text, re.MULTILINE))
    try:
        # The effective ones, which come second.
        uid, gid = int(fields["Uid"].split()[1]), int(fields["Gid"].split()[1])
        return User(uid, gid, frozenset(map(int, fields.get("Groups", "").split())))
    except (KeyError, IndexError, ValueError):
        return None
