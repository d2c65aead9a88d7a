"""What is examined: the settings, as far as they can be read, and the daemon that they are for."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from stationkey.config.file import File, Parts, read_file, read_parts, settle
from stationkey.config.secrets import SecretReference
from stationkey.config.settings import DEFAULT_DEVICE, Settings
from stationkey.doctor.host.files import Facts, User, look_at
from stationkey.doctor.host.ledger_reader import LedgerReading
from stationkey.doctor.report import Finding, Level, not_checked
from stationkey.doctor.runner import ask, within
from stationkey.errors import ConfigurationError
from stationkey.system.state_dir import LOCK_NAME

UNIT: Final = "stationkey.service"
USER: Final = "stationkey"
"""The user that the package makes for the daemon."""
CREDENTIALS: Final = Path("/run/credentials")
"""Where systemd puts what a unit loads [systemd.exec(5), LoadCredential=]."""
_SYSTEMD: Final = Path("/run/systemd/system")
_LOCKS: Final = Path("/proc/locks")
_PATIENCE: Final = 1.5
"""Seconds for each thing that has to be known before the checks begin."""
_NONE: Final = "none:"
"""Stands for the key store where none is named."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """The settings, as far as they can be read.

    Attributes:
        file: what there is at the path of the configuration file; None where none is named.
        complaints: what is wrong with the file.
        settings: what the daemon would run by, with the default in place of all that is wrong.
        keystore: URI, or None where none is named and there is no default.
        lost: what the file may say and cannot be read of, and no option says: the settings have a guess there.
    """

    file: Facts | None
    complaints: tuple[str, ...]
    settings: Settings
    keystore: str | None
    lost: frozenset[str] = frozenset()


_TOLD: Final = frozenset({"broker", "topic_prefix", "keystore", "state_dir", "mqtt", "tpm"})
"""Names at the top of the file by which it is found out where to look."""


UNREADABLE: Final = "what the configuration file says of it cannot be read: put that right first"


def unless_guessed(findings: Iterator[Finding], lost: Mapping[str, Collection[str]]) -> Iterator[Finding]:
    """Findings as far as they can be believed: a failure of what was guessed is none.

    Args:
        findings: of a check.
        lost: for each name of the file that could not be read, the findings that hang on what it says.
    """
    guessed = {name for names in lost.values() for name in names}
    for finding in findings:
        if finding.level is Level.FAILURE and finding.id in guessed:
            yield not_checked(finding.id, UNREADABLE)
        else:
            yield finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The systemd unit of the daemon, as systemd shows it [systemctl(1), show].

    Attributes:
        properties: by name, such as ``ActiveState``.
    """

    properties: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.properties.get(name, "")

    @property
    def installed(self) -> bool:
        """Whether systemd knows it."""
        return self["LoadState"] not in {"", "not-found"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """The daemon that all this is for, as far as it can be told.

    Attributes:
        running: whether something holds the lock of the state directory.
        pid: of who holds it, or None where that is not seen.
        user: that it runs as, or would.
        known_by: how that is known, in words.
    """

    running: bool
    pid: int | None
    user: User
    known_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """All that a check may look at.

    Attributes:
        options: as they were given.
        me: who runs the doctor.
        unit: see `Unit`; None where there is no systemd, or it does not answer.
        ledger: reads it for whoever wants to know.
    """

    options: Options
    configured: Configured
    daemon: Daemon
    unit: Unit | None
    me: User = field(default_factory=User.present)
    ledger: LedgerReading = field(default_factory=LedgerReading, compare=False)

    @property
    def settings(self) -> Settings:
        """See `Configured`."""
        return self.configured.settings


def survey(options: Options) -> Subject:
    """Find out what is to be examined. Never raises, and never takes longer than some seconds."""
    configured = _default(options, ("it cannot be read: the disk that it is on does not answer",))
    configured = within(_PATIENCE, lambda: read_configuration(options), configured)
    unit = look_at_unit()
    unknown = Daemon(running=False, pid=None, user=User.present(), known_by="nothing else is known")
    daemon = within(_PATIENCE, lambda: find_daemon(configured.settings.state_dir, unit), unknown)
    return Subject(options=options, configured=configured, daemon=daemon, unit=unit)


def read_configuration(options: Options) -> Configured:
    """Read the configuration file, and of a wrong one what can be used."""
    path = options.config_file
    if path is None:
        return _settle(options, Parts(File(), (), frozenset()))
    facts = look_at(path, follow=True)
    if facts.there and facts.kind != "file":
        what = "directory" if facts.kind == "directory" else "device, pipe or socket"
        return _default(
            options, (f"{path} is no file, but a {what}",), facts
        )  # to open a pipe would be to wait for ever
    try:
        return _settle(options, Parts(read_file(path), (), frozenset()), facts)
    except ConfigurationError:
        return _settle(options, read_parts(path), facts)
    except (OSError, ValueError):  # a name with a NUL in it, for example
        return _default(options, (f"{path} cannot be read",), facts)


def _default(options: Options, complaints: tuple[str, ...], facts: Facts | None = None) -> Configured:
    return _settle(options, Parts(File(), complaints, None), facts)


def _settle(options: Options, parts: Parts, facts: Facts | None = None) -> Configured:
    settings = settle(
        parts.file,
        broker=options.broker,
        topic_prefix=options.topic_prefix,
        keystore=options.keystore,
        allow_software_keys=options.allow_software_keys,
        state_dir=options.state_dir,
        needs_keystore=Path(DEFAULT_DEVICE).exists(),
    )
    keystore = settings.keystore or None
    settings = replace(settings, keystore=keystore or _NONE)
    lost = _TOLD if parts.lost is None else parts.lost & _TOLD
    known = {name for name in ("broker", "topic_prefix", "keystore", "state_dir") if getattr(options, name)}
    return Configured(file=facts, complaints=parts.complaints, settings=settings, keystore=keystore, lost=lost - known)


def path_of(reference: SecretReference) -> Path | None:
    """The file that a reference leads to. One to a credential of the unit is followed from outside, where it runs."""
    try:
        return reference.path
    except ConfigurationError:
        path = Path(CREDENTIALS, UNIT, reference.source.partition(":")[2])
        return path if look_at(path).there else None


_SHOWN: Final = (
    ""
    "LoadState,ActiveState,SubState,Result,UnitFileState,NRestarts,User,LimitCORE,ExecStart,LoadCredential,LoadCredentialEncrypted,SetCredential,SetCredentialEncrypted,ImportCredential,FragmentPath,Environment,DevicePolicy,DeviceAllow,PrivateDevices,ProtectSystem,ProtectHome,StateDirectory,ReadWritePaths,PrivateNetwork,PrivateTmp,IPAddressDeny,IPAddressAllow"
)


def look_at_unit() -> Unit | None:
    """Ask systemd for the daemon's unit."""
    if not _SYSTEMD.is_dir():
        return None
    answer = ask(["systemctl", "show", "--no-pager", f"--property={_SHOWN}", UNIT], seconds=_PATIENCE)
    if answer.status != 0:
        return None
    properties = dict[str, str]()
    for line in answer.out.splitlines():
        name, _, value = line.partition("=")
        properties[name] = f"{properties[name]} {value}" if name in properties else value  # one line for each of a list
    return Unit(properties=properties)


def find_daemon(state_dir: Path, unit: Unit | None) -> Daemon:
    """Whom the daemon runs as, or would: by what runs, its unit, the user that the package makes, the directory."""
    running, pid = holder_of(look_at(state_dir / LOCK_NAME))
    if pid is not None and (runs := user_of(pid)) is not None:
        return Daemon(running=running, pid=pid, user=runs, known_by="it runs as that")
    directory = look_at(state_dir, follow=True)
    me = User.present()
    if unit is not None and unit.installed and (named := User.named(unit["User"] or "root")) is not None:
        user, known_by = named, f"{UNIT} says so"
    elif (made := User.named(USER)) is not None:
        user, known_by = made, "that is the user which the package makes for it"
    elif directory.there and directory.uid not in {0, me.uid}:
        user, known_by = User.numbered(directory.uid), f"{state_dir} belongs to it"
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


def user_of(pid: int) -> User | None:
    """Whom a process runs as."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    try:
        # The effective ones, which come second.
        uid, gid = int(fields["Uid"].split()[1]), int(fields["Gid"].split()[1])
        return User(uid, gid, frozenset(map(int, fields.get("Groups", "").split())))
    except (KeyError, IndexError, ValueError):
        return None
