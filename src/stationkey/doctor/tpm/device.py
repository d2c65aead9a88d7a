"""The way to the TPM, as far as it can be seen from outside: device, driver, who else has it."""

from __future__ import annotations

import grp
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from stationkey.doctor.host.context import Context
from stationkey.doctor.host.files import READ, WRITE, Facts, User, look_at, octal, permits
from stationkey.doctor.host.sockets import connections_to
from stationkey.doctor.report import Finding, failure, hidden, ok, warning
from stationkey.doctor.runner import Check
from stationkey.system.addresses import is_loopback

_SYS: Final = Path("/sys/class/tpm")
_MANAGED: Final = re.compile(r"/dev/tpmrm\d+")
_BARE: Final = re.compile(r"/dev/tpm\d+")
_CLASSES: Final = frozenset({"tpm", "tpmrm"})
CHOICE: Final = 'keystore = "tpm2:device:/dev/tpmrm0"'
"""The usual key store, for advice."""


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
        return is_loopback(self.host)

    @property
    def is_simulator(self) -> bool:
        """Whether what is at its end is a program, by its kind."""
        return self.name in {"swtpm", "mssim", "libtpms"}

    @property
    def is_managed(self) -> bool:
        """Whether a resource manager is in between, so that several programs can use the TPM."""
        return self.name == "tabrmd" or (self.path is not None and _MANAGED.fullmatch(str(self.path)) is not None)


class Chip(NamedTuple):
    """What the kernel says of the first TPM.

    Attributes:
        known: whether it has found one.
        major: version of TPM, ``2`` or ``1``; empty where an old kernel does not say.
        devices: that there are under ``/dev``.
        is_tpm: whether the device file that is named stands for a TPM.
    """

    known: bool
    major: str = ""
    devices: tuple[str, ...] = ()
    is_tpm: bool = True


def _chip(facts: Facts | None) -> Chip:
    """Ask the kernel. `facts`: of the device file that is named, or None."""
    found = sorted(_SYS.glob("*"))
    major = ""
    with suppress(IndexError, OSError, ValueError):
        major = (found[0] / "tpm_version_major").read_text(encoding="ascii").strip()
    devices = tuple(sorted(map(str, Path("/dev").glob("tpm*"))))
    return Chip(bool(found), major, devices, facts is None or _is_tpm(facts))


def _is_tpm(facts: Facts) -> bool:
    """Whether a device file stands for a TPM: by what the kernel calls its kind, or else by its name."""
    if facts.kind != "character device":
        return False
    try:
        numbers = f"{os.major(facts.special)}:{os.minor(facts.special)}"
        kind = Path("/sys/dev/char", numbers, "subsystem").readlink().name
    except OSError:
        kind = "misc"  # not said; the first driver of a TPM was one of these
    name = str(facts.path)
    return kind in _CLASSES or (kind == "misc" and bool(_BARE.fullmatch(name) or _MANAGED.fullmatch(name)))


def way_of(context: Context) -> Way:
    """Return the way to the TPM that is configured."""
    return Way.parse((context.configured.keystore or "").partition(":")[2])


def _look_at_device(context: Context) -> tuple[Way, Facts | None, Chip, User]:
    """Look at the device file or the socket on the way to the TPM, and at what the kernel says."""
    way, user = way_of(context), context.daemon.user
    facts = None if way.path is None else look_at(way.path, follow=True, user=user)
    return way, facts, _chip(facts), user


def _judge_device(way: Way, facts: Facts | None, chip: Chip, user: User) -> Finding:
    """Judge what is on the way: there, a TPM, and open to the daemon's user. `facts`: of its path, or None."""
    if facts is None and way.host and not way.is_local:
        told = f"the TPM is asked over the network, at {way.host}: nothing protects what goes there"
        return warning("network", told, "use the TPM of this machine")
    if facts is None:
        return ok("tpm2-tss chooses the device" if way.name == "device" else f"the TPM is reached by {way.name}")
    path, mode = facts.path, octal(facts.mode)
    if facts.closed is not None:
        advice = f"let it: setfacl -m u:{user.name}:x {facts.closed}"
        return failure("closed", f"the daemon's user {user.name} may not enter {facts.closed}", advice, stops=False)
    if facts.kind == "unseen":
        return hidden(path)
    if way.name != "device":
        if facts.kind in {"missing", "file", "directory"}:
            what = "is missing" if facts.kind == "missing" else f"is a {facts.kind}, not a socket"
            return failure("no_socket", f"{path} {what}", "start what makes it, or correct the path")
        return ok(f"the TPM is reached by {way.name}")
    if chip.major == "1":
        advice = "stationkey needs a TPM 2.0; some chips can be converted in the firmware's set-up"
        return failure("tpm_1", "the TPM of this machine is a TPM 1.2, which has no elliptic curves", advice)
    if facts.kind == "missing":
        return _judge_missing(path, chip)
    if not chip.is_tpm:
        return failure("not_a_tpm", f"{path} is a {facts.kind}, not a TPM", f"name the TPM as keystore: {CHOICE}")
    if not permits(facts, user, READ | WRITE):
        group = _group_name(facts.gid)
        told = f"the daemon's user {user.name} may not open {path} (mode {mode}, group {group})"
        if facts.gid == 0 or not permits(facts, User(-1, facts.gid), READ | WRITE):
            advice = "install tpm-udev (Debian), which gives the device to the group tss, and restart the machine"
            return failure("no_udev", told, advice, stops=False)
        return failure("no_rights", told, f"usermod -a -G {group} {user.name}, then restart the daemon", stops=False)
    if facts.mode & 0o006:
        told = f"every user may use the TPM: {path} has mode {mode}"
        return warning("open", told, f"chmod o= {path}, and find the udev rule that opens it")
    return ok(f"{path} is a device that {user.name} may open (mode {mode})")


def _judge_missing(path: Path, chip: Chip) -> Finding:
    if path.is_symlink():
        return failure("dangling", f"{path} is a link that leads nowhere", f"name the TPM itself: {CHOICE}")
    if chip.known or chip.devices:
        there = ", ".join(chip.devices) or "none under /dev"
        return failure("missing", f"{path} is missing, and the kernel has found a TPM ({there})", f"name it: {CHOICE}")
    advice = "is it enabled in the firmware's set-up or the device tree, its driver loaded? dmesg | grep -i tpm"
    return failure("no_tpm", f"{path} is missing, and the kernel has found no TPM", advice)


def _group_name(gid: int) -> str:
    """Return the name of a group, or its number."""
    try:
        return grp.getgrgid(gid).gr_name
    except (KeyError, OverflowError):
        return f"number {gid}"


def holders(way: Way) -> list[str]:
    """Return who has the device open, or a connection to the simulator, as far as this user may see them."""
    if way.name == "device" and way.path is not None:
        wanted = {str(way.path)}
    else:
        wanted = {f"socket:[{inode}]" for inode in connections_to(way.port)} if way.port else set()
    found = []
    for process in Path("/proc").iterdir() if wanted else ():
        if not process.name.isdigit() or process.name == str(os.getpid()):
            continue
        try:
            targets = [str(entry.readlink()) for entry in (process / "fd").iterdir()]
            name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:  # it ended, or is another user's
            continue
        if not wanted.isdisjoint(targets):
            found.append(f"{name} (process {process.name})")
    return found


CHECK: Final = Check("tpm.device", _look_at_device, _judge_device, ("tpm.keystore",))
