"""The machine: who runs this, the unit, core dumps and memory."""

from __future__ import annotations

import grp
import ipaddress
import re
import socket
from pathlib import Path
from typing import Final

from stationkey.doctor.host.context import UNIT, Context, Daemon, Unit
from stationkey.doctor.host.files import User
from stationkey.doctor.report import Verdict, failure, not_checked, ok, warning
from stationkey.doctor.runner import within
from stationkey.errors import ConfigurationError
from stationkey.mqtt.url import Broker

_PATIENCE: Final = 2.0
_TSS_GROUP: Final = "tss"
_SHUT: Final = ("/home", "/root", "/run/user")
"""What ProtectHome= hides."""
_ENABLED: Final = frozenset({"enabled", "static", "enabled-runtime", "generated", ""})
_LITTLE_MEMORY: Final = 64
"""MiB. The daemon takes some 40."""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def look_at_user(context: Context) -> tuple[User, Daemon, tuple[int, frozenset[str]] | None]:
    """Look at who runs this, whom the daemon runs as, and who is in the group of the TPM."""
    try:
        entry = grp.getgrnam(_TSS_GROUP)
    except KeyError:
        return context.me, context.daemon, None
    return context.me, context.daemon, (entry.gr_gid, frozenset(entry.gr_mem))


def judge_user(me: User, daemon: Daemon, tss: tuple[int, frozenset[str]] | None) -> Verdict:
    """Judge how much is visible, and whether the daemon's user is right. `tss`: number and members of the group."""
    user = daemon.user
    who = f"the daemon {'runs' if daemon.running else 'would run'} as {user.name} ({daemon.known_by})"
    if me.uid not in {0, user.uid}:
        return warning(
            f"this is run by {me.name}, who may see less than the daemon: {who}",
            f"run it as root, or as {user.name}: sudo -u {user.account} stationkey doctor",
        )
    if user.uid == 0:
        return warning(
            f"{who}, and needs no rights of root",
            "give it its own user in the group tss: User=stationkey, SupplementaryGroups=tss in the unit",
        )
    if tss is not None and tss[0] not in user.groups | {user.gid} and user.name not in tss[1]:
        return warning(
            f"{who}, and is not in the group {_TSS_GROUP}, which has the TPM on Debian",
            f"usermod -a -G {_TSS_GROUP} {user.account}, then restart the daemon (unless another group has it here)",
        )
    return ok(f"{who}; this is run by {me.name}")


def look_at_unit(context: Context) -> tuple[Unit, Daemon] | Verdict:
    """Look at the unit and the daemon."""
    return (context.unit, context.daemon) if context.unit else not_checked("there is no systemd here that answers")


def judge_unit(unit: Unit, daemon: Daemon) -> Verdict:
    """Judge whether systemd starts the daemon, and keeps it running."""
    log, active = f"journalctl -u {UNIT} -n 50 says why", unit["ActiveState"]
    if not unit.installed:
        return warning(
            f"there is no {UNIT}: nothing starts the daemon after a power cut",
            "install the unit (packaging/systemd), or have your own supervisor start it",
        )
    if unit["LoadState"] != "loaded":
        return failure(f"{UNIT} cannot be loaded ({unit['LoadState']})", f"systemctl status {UNIT} says why")
    if active == "failed" or unit["SubState"] == "auto-restart":
        return failure(f"{UNIT} has failed, or fails at each start ({unit['Result']})", log)
    if active != "active":
        other = ", and another daemon runs" if daemon.running else ""
        return warning(f"{UNIT} is {active or 'unknown'}{other}", f"systemctl start {UNIT}")
    if unit["UnitFileState"] not in _ENABLED:
        return warning(f"{UNIT} will not start after a power cut ({unit['UnitFileState']})", f"systemctl enable {UNIT}")
    if unit["NRestarts"] not in {"", "0"}:
        return warning(f"{UNIT} is active, after {unit['NRestarts']} restarts", log)
    return ok(f"{UNIT} is active and enabled")


def look_at_sandbox(context: Context) -> tuple[Unit, str, str, tuple[str, ...]] | Verdict:
    """Look at the unit, and at what the daemon needs: device, state directory, addresses of the broker."""
    unit, (scheme, _, path) = context.unit, (context.configured.keystore or "").rpartition(":")
    if unit is None or not unit.installed:
        return not_checked("no unit is visible")
    device = path if scheme == "tpm2:device" else ""
    broker = () if unit["IPAddressDeny"] == "" else _addresses(context.settings.broker)
    return unit, device, str(context.settings.state_dir), broker


def _addresses(url: str) -> tuple[str, ...]:
    """Resolve the broker; nothing if its name does not resolve, which broker.name tells."""
    try:
        broker = Broker.parse(url)
        return within(_PATIENCE, lambda: _resolved(broker), ())
    except (ConfigurationError, OSError, UnicodeError):
        return ()


def _resolved(broker: Broker) -> tuple[str, ...]:
    found = socket.getaddrinfo(broker.host, broker.port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))


def judge_sandbox(unit: Unit, device: str, state_dir: str, broker: tuple[str, ...]) -> Verdict:
    """Judge whether the unit gives the daemon what it needs.

    Args:
        unit: the systemd unit.
        device: the TPM's device file, or an empty text.
        state_dir: the state directory.
        broker: the addresses of the broker, as far as they are known.
    """
    opened = any(word == device or word.startswith("char-tpm") for word in unit["DeviceAllow"].split())
    writable = unit["ReadWritePaths"].split() + [f"/var/lib/{one}" for one in unit["StateDirectory"].split()]
    writes = any(Path(state_dir).is_relative_to(path.lstrip("-+")) for path in writable)
    hidden = unit["ProtectHome"] not in {"", "no"} and any(Path(state_dir).is_relative_to(one) for one in _SHUT)
    if device and unit["PrivateDevices"] == "yes":
        return failure(f"{UNIT} hides {device} from the daemon", "PrivateDevices=no, and DeviceAllow= for the TPM")
    if device and unit["DevicePolicy"] in {"closed", "strict"} and not opened:
        return failure(f"{UNIT} does not let the daemon open {device}", f"DeviceAllow={device} rw")
    if not writes and (hidden or unit["ProtectSystem"] == "strict"):
        return failure(
            f"{UNIT} does not let the daemon write in {state_dir}", f"StateDirectory=, or ReadWritePaths={state_dir}"
        )
    if unit["PrivateNetwork"] == "yes":
        return failure(f"{UNIT} leaves the daemon without a network", "PrivateNetwork=no")
    if broker and not any(_lets_reach(unit, address) for address in broker):
        return failure(
            f"{UNIT} does not let the daemon reach the broker at {broker[0]}",
            f"systemctl edit {UNIT}, with IPAddressAllow={broker[0]} under [Service]; then restart it",
        )
    return ok(f"{UNIT} lets the daemon have TPM, state directory and network")


def _lets_reach(unit: Unit, address: str) -> bool:
    """What is both allowed and denied is allowed [systemd.resource-control(5), IPAddressAllow=]."""
    reached = ipaddress.ip_address(address)

    def holds(name: str) -> bool:
        return any(reached in ipaddress.ip_network(net, strict=False) for net in unit[name].split())

    return holds("IPAddressAllow") or not holds("IPAddressDeny")


def look_at_core_dumps(context: Context) -> tuple[str, str, Unit | None]:
    """Look at where the kernel writes core dumps, and at the limits of the daemon."""
    pid = context.daemon.pid
    limits = "" if pid is None else _text(Path(f"/proc/{pid}/limits"))
    return _text(Path("/proc/sys/kernel/core_pattern")).strip(), limits, context.unit


def judge_core_dumps(pattern: str, limits: str, unit: Unit | None) -> Verdict:
    """Judge whether a crash may write the daemon's memory to the disk.

    Args:
        pattern: ``/proc/sys/kernel/core_pattern``.
        limits: ``/proc/PID/limits`` of the running daemon, or an empty text.
        unit: the systemd unit, or None.
    """
    found = re.search(r"^Max core file size\s+(\S+)", limits, re.MULTILINE)
    allowed = found[1] if found else "" if unit is None else unit["LimitCORE"]
    if not allowed:
        return not_checked("the daemon does not run, and has no unit")
    # By a pipe the kernel passes on a dump of any length but 1 [core(5)].
    if allowed == "0":
        piped = "; what the kernel pipes to a program is that program's to keep" if pattern.startswith("|") else ""
        return ok(f"the daemon leaves no core file{piped}")
    return warning(
        f"a crash writes the daemon's memory to the disk (limit {allowed}, {pattern or 'pattern not known'}): "
        "passwords and authorisation values are in it",
        "LimitCORE=0 in the unit",
    )


def look_at_memory(_: Context) -> tuple[str]:
    """Read ``/proc/meminfo``."""
    return (_text(Path("/proc/meminfo")),)


def judge_memory(text: str) -> Verdict:
    """Judge the memory that is available."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    if found is None:
        return not_checked("the kernel does not say")
    free = int(found[1]) // 1024
    told = f"{free} MiB of memory are available"
    return warning(told, "the kernel ends processes when there is none left") if free < _LITTLE_MEMORY else ok(told)
