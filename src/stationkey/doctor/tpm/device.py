"""The way to the TPM, as far as it can be seen from outside: device, driver, who else has it."""

from __future__ import annotations

import grp
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stationkey.doctor.host.files import READ, WRITE, Facts, User, closed_on_the_way, look_at, octal, permits
from stationkey.doctor.report import Finding, failure, not_checked, ok, warning

_SYS: Final = Path("/sys/class/tpm")
_PROC: Final = Path("/proc")
_MANAGED: Final = re.compile(r"/dev/tpmrm\d+")
_BARE: Final = re.compile(r"/dev/tpm\d+")
_CLASSES: Final = frozenset({"tpm", "tpmrm"})
_ESTABLISHED: Final = "01"
_LISTENING: Final = "0A"
_GET_CAPABILITY: Final = b"\x00\x00\x00\x01"
"""A question to swtpm's control port that changes nothing [swtpm_ioctls(3)]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A TCTI, taken apart.

    Attributes:
        tcti: as tpm2-tss takes it.
        name: the kind: ``device``, ``swtpm``, ``tabrmd`` and others.
        path: of the device, or of a socket.
        host: of a simulator.
        port: of a simulator.
    """

    tcti: str
    name: str
    path: Path | None = None
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, tcti: str) -> Way:
        """Take a TCTI apart as tpm2-tss does, its defaults filled in."""
        name, _, rest = tcti.partition(":")
        short = name.removeprefix("libtss2-tcti-").partition(".")[0]
        if short == "device":
            return cls(tcti=tcti, name=short, path=Path(rest) if rest else None)
        if short in {"swtpm", "mssim"}:
            options = dict(option.split("=", 1) for option in rest.split(",") if "=" in option)
            port = options.get("port", "2321")
            path = Path(options["path"]) if "path" in options else None
            return cls(
                tcti=tcti,
                name=short,
                path=path,
                host=options.get("host", "localhost"),
                port=int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0,  # noqa: PLR2004 - 65535
            )
        return cls(tcti=tcti, name=short)

    @property
    def is_local(self) -> bool:
        """Whether a simulator is on this machine."""
        return self.host in {"localhost", "127.0.0.1", "::1"}

    @property
    def is_simulator(self) -> bool:
        """Whether what is at its end is a program, by its kind."""
        return self.name in {"swtpm", "mssim", "libtpms"}

    @property
    def is_managed(self) -> bool:
        """Whether a resource manager is in between, so that several programs can use the TPM."""
        return self.name == "tabrmd" or (self.path is not None and _MANAGED.fullmatch(str(self.path)) is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What the kernel says of the first TPM.

    Attributes:
        known: whether it has found one.
        major: version of TPM, ``2`` or ``1``; empty where an old kernel does not say.
        devices: that there are under ``/dev``.
    """

    known: bool
    major: str = ""
    devices: tuple[str, ...] = ()


def look_at_chip() -> Chip:
    """Ask the kernel."""
    try:
        names = sorted(entry.name for entry in _SYS.iterdir())
    except OSError:
        names = []
    major = ""
    for name in names[:1]:
        try:
            major = (_SYS / name / "tpm_version_major").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
    try:
        devices = tuple(sorted(str(path) for path in Path("/dev").glob("tpm*")))
    except OSError:
        devices = ()
    return Chip(known=bool(names), major=major, devices=devices)


def is_tpm(facts: Facts) -> bool:
    """Whether a device file stands for a TPM: by what the kernel calls its kind, or else by its name."""
    numbers = f"{os.major(facts.special)}:{os.minor(facts.special)}"
    try:
        kind = Path("/sys/dev/char", numbers, "subsystem").readlink().name
    except OSError:
        kind = "misc"  # not said; the first driver of a TPM was one of these
    name = str(facts.path)
    return kind in _CLASSES or (kind == "misc" and bool(_BARE.fullmatch(name) or _MANAGED.fullmatch(name)))


def judge_device(facts: Facts, chip: Chip, user: User, *, tpm: bool = True) -> Iterator[Finding]:
    """The device file: there, a device, a TPM (which `tpm` says), and open to the daemon's user."""
    name, path = "tpm.device", facts.path
    if chip.major == "1":
        yield failure(
            name,
            "the TPM of this machine is a TPM 1.2, which has no elliptic curves",
            "stationkey needs a TPM 2.0; some chips can be changed over in the firmware's set-up",
        )
    elif facts.kind == "missing" and path.is_symlink():
        yield failure(name, f"{path} is a link that leads nowhere", f"ls -l {path} shows where to; name the TPM itself")
    elif facts.kind == "missing":
        yield _judge_missing(path, chip)
    elif facts.kind == "unseen":
        yield not_checked(name, f"{path} is not to be seen from here")
    elif facts.kind != "character device":
        yield failure(
            name,
            f"{path} is no device but a {facts.kind}",
            "remove it, and see which program made it; a TPM is a character device such as /dev/tpmrm0",
        )
    elif not tpm:
        yield failure(
            name, f"{path} is a device, and no TPM", 'name the TPM as keystore, for example "tpm2:device:/dev/tpmrm0"'
        )
    elif not permits(facts, user, READ | WRITE):
        group = facts.gid
        if not permits(facts, User(-1, group), READ | WRITE) or group == 0:
            advice = "install tpm-udev (Debian), which gives the device to the group tss, and restart the machine"
        else:
            advice = f"usermod -a -G {group_name(group)} {user.account}, then restart the daemon"
        yield failure(
            name,
            f"the daemon's user {user.name} may not open {path} (mode {octal(facts.mode)}, group {group_name(group)})",
            advice,
        )
    elif facts.mode & 0o006:
        yield warning(
            name,
            f"every user of this machine may use the TPM: {path} has mode {octal(facts.mode)}",
            f"chmod o= {path}, and find the udev rule that opens it",
        )
    else:
        yield ok(name, f"{path} is a device that {user.name} may open (mode {octal(facts.mode)})")


def _judge_missing(path: Path, chip: Chip) -> Finding:
    name = "tpm.device"
    if chip.known or chip.devices:
        others = ", ".join(chip.devices) or "none under /dev"
        return failure(
            name,
            f"{path} is not there, and the kernel has found a TPM ({others})",
            'name one that is there, best keystore = "tpm2:device:/dev/tpmrm0" (since kernel 4.12)',
        )
    return failure(
        name,
        f"{path} is not there, and the kernel has found no TPM",
        "is it switched on in the firmware's set-up, is it in the device tree, is its driver loaded (tpm_tis, "
        "tpm_crb, tpm_tis_spi)? dmesg | grep -i tpm says more",
    )


def judge_socket(way: Way, user: User) -> Iterator[Finding]:
    """The other ways than a device."""
    name = "tpm.device"
    if way.path is not None and (closed := closed_on_the_way(way.path, user)) is not None:
        yield failure(name, f"the daemon's user {user.name} may not enter {closed}", f"chmod o+x {closed}")
    elif way.path is not None and (facts := look_at(way.path, follow=True)).kind in {"missing", "file", "directory"}:
        what = "is not there" if facts.kind == "missing" else f"is no socket but a {facts.kind}"
        yield failure(name, f"{way.path} {what}", "start what makes it, or correct the path")
    elif way.host and way.path is None and not way.is_local:
        yield warning(
            name,
            f"the TPM is asked over the network, at {way.host}, and nothing protects what goes there",
            "use the TPM of this machine",
        )
    elif way.name == "device":
        yield ok(name, "which device it is, tpm2-tss chooses")
    else:
        yield ok(name, f"the TPM is reached by {way.name}, which is no device")


def group_name(gid: int) -> str:
    """The name of a group, or its number."""
    try:
        return grp.getgrgid(gid).gr_name
    except (KeyError, OverflowError):
        return f"number {gid}"


def holders_of_device(facts: Facts) -> list[tuple[int, str]]:
    """Who has a device open: number and name of each process, as far as this user may see them."""
    return list(_processes_with({str(facts.path)}))


def holders_of_port(port: int) -> list[tuple[int, str]]:
    """Who has a connection to a loopback port, likewise."""
    sockets = {f"socket:[{inode}]" for inode in connections_to(port)}
    return list(_processes_with(sockets)) if sockets else []


def _processes_with(wanted: set[str]) -> Iterator[tuple[int, str]]:
    for process in _PROC.iterdir():
        if not process.name.isdigit():
            continue
        pid = int(process.name)
        if pid == os.getpid():
            continue
        try:
            targets = [str(entry.readlink()) for entry in (process / "fd").iterdir()]
            name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:  # it ended, or is another user's
            continue
        if not wanted.isdisjoint(targets):
            yield pid, name


def _rows() -> Iterator[list[str]]:
    for table in ("tcp", "tcp6"):
        try:
            lines = (_PROC / "net" / table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        yield from (line.split() for line in lines)


def connections_to(port: int) -> list[int]:
    """The inodes of this machine's sockets that are connected to `port` [proc(5), /proc/net/tcp]."""
    ends = f":{port:04X}"
    return [int(row[9]) for row in _rows() if row[2].endswith(ends) and row[3] == _ESTABLISHED and row[9] != "0"]


def listeners_on(port: int) -> list[str]:
    """The addresses that something on this machine listens on, as hexadecimal digits; all zero is every address."""
    ends = f":{port:04X}"
    return [row[1].partition(":")[0] for row in _rows() if row[1].endswith(ends) and row[3] == _LISTENING]


def simulator_lives(way: Way, *, seconds: float = 1.5) -> bool | None:
    """Whether swtpm answers on its control port, which it does beside other work; None where it has none."""
    try:
        with socket.create_connection((way.host, way.port + 1), seconds) as control:
            control.settimeout(seconds)
            control.sendall(_GET_CAPABILITY)
            return bool(control.recv(1))
    except TimeoutError:
        return False
    except (OSError, OverflowError):
        return None
