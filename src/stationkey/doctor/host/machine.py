"""The machine: who runs this, the unit, core dumps and memory."""

from __future__ import annotations

import grp
import ipaddress
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from stationkey.doctor.host.context import UNIT, Daemon, Subject, Unit
from stationkey.doctor.host.files import User
from stationkey.doctor.report import Finding, failure, not_checked, ok, warning
from stationkey.doctor.runner import within
from stationkey.errors import ConfigurationError
from stationkey.mqtt.url import Broker

IDS: Final = (
    "machine.user",
    "machine.unit",
    "machine.sandbox",
    "machine.core_dumps",
    "machine.memory",
)
_PATIENCE: Final = 2.0
_TSS_GROUP: Final = "tss"
_SHUT: Final = ("/home", "/root", "/run/user")
_LITTLE_MEMORY: Final = 64
"""MiB. The daemon takes some 40."""


def check_machine(subject: Subject) -> Iterator[Finding]:
    """The machine itself."""
    yield judge_user(subject.me, subject.daemon, _members(_TSS_GROUP))
    yield judge_unit(subject.unit, running=subject.daemon.running)
    yield _check_sandbox(subject)
    pattern = _line(Path("/proc/sys/kernel/core_pattern"))
    limits = None if subject.daemon.pid is None else _text(Path(f"/proc/{subject.daemon.pid}/limits"))
    yield judge_core_dumps(pattern, limits, subject.unit)
    yield judge_memory(_text(Path("/proc/meminfo")) or "")


def _check_sandbox(subject: Subject) -> Finding:
    keystore = subject.configured.keystore or ""
    device = keystore.removeprefix("tpm2:device:") if keystore.startswith("tpm2:device:") else ""
    unit = subject.unit
    restricted = unit is not None and unit["IPAddressDeny"] != ""
    return judge_sandbox(
        unit,
        device=device,
        state_dir=str(subject.settings.state_dir),
        broker=_addresses(subject.settings.broker) if restricted and "broker" not in subject.configured.lost else (),
    )


def _addresses(url: str) -> tuple[str, ...]:
    """Those of the broker; none where its name does not resolve, which is another check's to tell."""
    try:
        broker = Broker.parse(url)
        return within(_PATIENCE, lambda: _resolved(broker), ())
    except (ConfigurationError, OSError, UnicodeError):
        return ()


def _resolved(broker: Broker) -> tuple[str, ...]:
    found = socket.getaddrinfo(broker.host, broker.port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _line(path: Path) -> str | None:
    text = _text(path)
    return None if text is None else text.strip()


def _members(group: str) -> tuple[int, frozenset[str]] | None:
    try:
        entry = grp.getgrnam(group)
    except KeyError:
        return None
    return entry.gr_gid, frozenset(entry.gr_mem)


def judge_user(me: User, daemon: Daemon, tss: tuple[int, frozenset[str]] | None) -> Finding:
    """Who looks, and so how much is seen; and whether the daemon is what it should be. `tss`: number and members."""
    name, user = "machine.user", daemon.user
    who = f"the daemon {'runs' if daemon.running else 'would run'} as {user.name} ({daemon.known_by})"
    if me.uid not in {0, user.uid}:
        return warning(
            name,
            f"this is run by {me.name}, who may see less than the daemon: {who}",
            f"run it as root, or as {user.name}: sudo -u {user.account} stationkey doctor",
        )
    if user.uid == 0:
        return warning(
            name,
            f"{who}, and it needs no rights of root",
            "give it a user of its own in the group tss: User=stationkey, SupplementaryGroups=tss in the unit",
        )
    if tss is not None and tss[0] not in user.groups | {user.gid} and user.name not in tss[1]:
        return warning(
            name,
            f"{who}, and is not in the group {_TSS_GROUP}, which has the TPM on Debian",
            f"usermod -a -G {_TSS_GROUP} {user.account}, then restart the daemon (unless another group has it here)",
        )
    return ok(name, f"{who}; this is run by {me.name}")


def judge_unit(unit: Unit | None, *, running: bool) -> Finding:
    """The systemd unit."""
    name = "machine.unit"
    if unit is None:
        return not_checked(name, "there is no systemd here that answers")
    if not unit.installed:
        return warning(
            name,
            f"there is no {UNIT}: nothing starts the daemon after a power cut",
            "install the unit (packaging/systemd), or have your own supervisor start it",
        )
    if unit["LoadState"] != "loaded":
        return failure(name, f"{UNIT} cannot be loaded ({unit['LoadState']})", f"systemctl status {UNIT} says why")
    if unit["ActiveState"] == "failed":
        return failure(name, f"{UNIT} has failed ({unit['Result']})", f"journalctl -u {UNIT} -n 50 says why")
    if unit["SubState"] == "auto-restart":
        return failure(name, f"{UNIT} ends and is started again and again", f"journalctl -u {UNIT} -n 50 says why")
    if unit["ActiveState"] != "active":
        words = f"{UNIT} is {unit['ActiveState'] or 'unknown'}"
        return warning(name, f"{words}{', and another daemon runs' if running else ''}", f"systemctl start {UNIT}")
    if unit["UnitFileState"] not in {"enabled", "static", "enabled-runtime", "generated", ""}:
        return warning(
            name,
            f"{UNIT} is active and will not start after a power cut ({unit['UnitFileState']})",
            f"systemctl enable {UNIT}",
        )
    restarts = unit["NRestarts"]
    if restarts not in {"", "0"}:
        return warning(name, f"{UNIT} is active, after {restarts} restarts", f"journalctl -u {UNIT} says why it ended")
    return ok(name, f"{UNIT} is active, and starts by itself")


def judge_sandbox(unit: Unit | None, *, device: str, state_dir: str, broker: tuple[str, ...] = ()) -> Finding:
    """Whether the unit lets the daemon have what it needs.

    Args:
        unit: the systemd unit, or None.
        device: the TPM's device file, or an empty text.
        state_dir: the state directory.
        broker: the addresses of the broker, as far as they are known.
    """
    name = "machine.sandbox"
    if unit is None or not unit.installed:
        return not_checked(name, "there is no unit to be seen")
    opened = any(word == device or word.startswith("char-tpm") for word in unit["DeviceAllow"].split())
    writable = unit["ReadWritePaths"].split() + [f"/var/lib/{one}" for one in unit["StateDirectory"].split()]
    shut = [f"{directory}/" for directory in _SHUT if unit["ProtectHome"] not in {"", "no"}]
    strict = unit["ProtectSystem"] == "strict"
    writes = any(f"{state_dir}/".startswith(f"{path.lstrip('-+')}/") for path in writable)
    if device and unit["PrivateDevices"] == "yes":
        return failure(
            name, f"{UNIT} hides {device} from the daemon", "PrivateDevices=no, and DeviceAllow= for the TPM"
        )
    if device and unit["DevicePolicy"] in {"closed", "strict"} and not opened:
        return failure(name, f"{UNIT} does not let the daemon open {device}", f"DeviceAllow={device} rw")
    if not writes and (strict or any(f"{state_dir}/".startswith(directory) for directory in shut)):
        return failure(
            name,
            f"{UNIT} does not let the daemon write in {state_dir}",
            f"StateDirectory=, or ReadWritePaths={state_dir}",
        )
    if unit["PrivateNetwork"] == "yes":
        return failure(
            name, f"{UNIT} leaves the daemon without a network", "PrivateNetwork=no: the broker is over there"
        )
    if broker and not any(_lets_reach(unit, address) for address in broker):
        return failure(
            name,
            f"{UNIT} does not let the daemon reach the broker at {broker[0]}",
            f"systemctl edit {UNIT}, with IPAddressAllow={broker[0]} under [Service]; then restart it",
        )
    return ok(name, f"{UNIT} lets the daemon have TPM, state directory and network")


def _lets_reach(unit: Unit, address: str) -> bool:
    """What is both allowed and denied is allowed [systemd.resource-control(5), IPAddressAllow=]."""
    reached = ipaddress.ip_address(address)

    def holds(name: str) -> bool:
        return any(reached in ipaddress.ip_network(net, strict=False) for net in unit[name].split())

    return holds("IPAddressAllow") or not holds("IPAddressDeny")


def judge_core_dumps(pattern: str | None, limits: str | None, unit: Unit | None) -> Finding:
    """Whether what the daemon has in memory may come to lie on the disk.

    Args:
        pattern: ``/proc/sys/kernel/core_pattern``.
        limits: ``/proc/PID/limits`` of the running daemon, or None.
        unit: the systemd unit, or None.
    """
    name = "machine.core_dumps"
    allowed: str | None = None
    for line in (limits or "").splitlines():
        if line.startswith("Max core file size"):
            allowed = line.removeprefix("Max core file size").split()[0]
    if allowed is None and unit is not None and unit.installed:
        allowed = unit["LimitCORE"] or None
    # By a pipe the kernel passes on a dump of any length but 1 [core(5)].
    if allowed == "0" and not (pattern or "").startswith("|"):
        return ok(name, "the daemon leaves no core dump")
    if allowed is None:
        return not_checked(name, "the daemon does not run, and has no unit")
    if allowed == "0":
        return ok(name, "the daemon may leave no core file; what the kernel passes on to a program is for that to keep")
    where = pattern or "pattern not known"
    return warning(
        name,
        f"a daemon that crashes leaves what it has in memory on the disk (limit {allowed}, {where}): passwords and "
        "authorisation values are in it",
        "LimitCORE=0 in the unit",
    )


def judge_memory(text: str) -> Finding:
    """``/proc/meminfo``."""
    name = "machine.memory"
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    if found is None:
        return not_checked(name, "the kernel does not say")
    free = int(found[1]) // 1024
    if free < _LITTLE_MEMORY:
        return warning(
            name,
            f"only {free} MiB of memory are available",
            "what takes it? The kernel ends processes when there is none left",
        )
    return ok(name, f"{free} MiB of memory are available")
