"""The machine: its clocks, who runs this, the unit, core dumps, memory and OpenSSL."""

from __future__ import annotations

import ctypes
import grp
import ipaddress
import os
import re
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from stationkey.contract.active_names import DIRECTORY_NAME
from stationkey.doctor.broker.checks import resolve
from stationkey.doctor.host.context import UNIT, Context, Daemon, Unit
from stationkey.doctor.host.files import User, look_at
from stationkey.doctor.report import Finding, failure, hidden, ok, unknown, warning
from stationkey.doctor.runner import Check, ask
from stationkey.doctor.state.checks import contents_soon
from stationkey.errors import ConfigurationError
from stationkey.system.state_dir import DATABASE_NAME

WRITTEN: Final = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
"""No station has run this program before."""
_FAR: Final = datetime(2100, 1, 1, tzinfo=UTC).timestamp()
_DIFFERENCE: Final = 300.0
"""Seconds that nobody minds."""
_RTC: Final = Path("/sys/class/rtc/rtc0/since_epoch")
_TIMEX: Final = 512
"""Bytes that are enough for a ``struct timex`` of any machine [adjtimex(2)]."""
_UNSYNCHRONISED: Final = 5
_TSS_GROUP: Final = "tss"
_SHUT: Final = ("/home", "/root", "/run/user")
"""What ProtectHome= hides."""
_ENABLED: Final = frozenset({"enabled", "static", "enabled-runtime", "generated", ""})
_LITTLE_MEMORY: Final = 64
"""MiB. The daemon takes some 40."""
_PATIENCE: Final = 2.0
"""Seconds for each question to OpenSSL."""
_PROVIDER: Final = "tpm2.so"
_PROVIDER_VERSION: Final = re.compile(rb"\0(\d+\.\d+\.\d+)\0")
"""In the file. The provider tells its version only once it has opened the TPM, which a doctor does not have it do."""
_CONCURRENT: Final = (1, 3, 0)
"""The first tpm2-openssl that several threads and workers can use at once."""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _look_at_time(context: Context) -> tuple[float, float | None]:
    facts = look_at(context.settings.state_dir / DATABASE_NAME)
    times = [facts.modified] if facts.there else []
    if (contents := contents_soon(context)) is not None:
        times += [key.created_at / 1000 for key in contents.keys]
    return time.time(), max(times, default=None)


def _date(moment: float) -> str:
    try:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return f"{moment:.0f} s after 1970"


def _judge_time(now: float, latest: float | None) -> Finding:
    """Judge whether the time can be right. `latest`: the latest time on record, or None."""
    if not WRITTEN <= now < _FAR:
        advice = "set it (NTP, or date -s): certificates are judged by it"
        return failure("impossible", f"the clock says {_date(now)}, which cannot be", advice)
    if latest is not None and latest - now > _DIFFERENCE:
        told = f"the clock says {_date(now)}, and the ledger has something of {_date(latest)}: one of the two was wrong"
        return warning("went_back", told, "is the clock right now? Certificates are judged by it; no key ends by it")
    return ok(f"the clock says {_date(now)}")


def _look_at_synchronisation(_: Context) -> tuple[bool | None]:
    """Ask the kernel whether something keeps the clock right: to ask with no mode set changes nothing."""
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX))
    except (OSError, AttributeError):
        return (None,)
    return (None if state < 0 else state != _UNSYNCHRONISED,)


def _judge_synchronised(synchronised: bool | None) -> Finding:
    if synchronised is None:
        return unknown("the kernel does not say")
    if not synchronised:
        advice = "timedatectl set-ntp true, or chrony; all is well where a host, GNSS or the CSMS sets the clock"
        return warning("unsynchronised", "nothing keeps the clock right, as far as the kernel knows", advice)
    return ok("the clock is kept right (NTP, or another source that the kernel knows)")


def _look_at_battery(_: Context) -> tuple[float, float | None]:
    with suppress(OSError, ValueError):
        return time.time(), float(_RTC.read_text(encoding="ascii"))
    return time.time(), None


def _judge_battery(now: float, battery: float | None) -> Finding:
    if battery is None:
        told = "no battery-backed clock: after each power cut the time is wrong until it is set"
        return warning("no_battery", told, "NTP at start, or fake-hwclock, by which it does not fall back by years")
    if abs(battery - now) > _DIFFERENCE:
        told = f"the clock that runs without power says {_date(battery)}"
        return warning("differs", told, "hwclock --systohc --utc; if it falls back again, its battery is empty")
    return ok("the clock that runs without power agrees")


def _look_at_user(context: Context) -> tuple[User, Daemon, tuple[int, frozenset[str]] | None]:
    try:
        entry = grp.getgrnam(_TSS_GROUP)
    except KeyError:
        return context.me, context.daemon, None
    return context.me, context.daemon, (entry.gr_gid, frozenset(entry.gr_mem))


def _judge_user(me: User, daemon: Daemon, tss: tuple[int, frozenset[str]] | None) -> Finding:
    """Judge how much is visible, and whether the daemon's user is right. `tss`: number and members of the group."""
    user = daemon.user
    who = f"the daemon {'runs' if daemon.running else 'would run'} as {user.name} ({daemon.known_by})"
    if me.uid not in {0, user.uid}:
        return hidden(f"all that the daemon sees: {who}")
    if user.uid == 0:
        advice = "give it its own user in the group tss: User=stationkey, SupplementaryGroups=tss in the unit"
        return warning("root", f"{who}, and needs no rights of root", advice)
    if tss is not None and tss[0] not in user.groups | {user.gid} and user.name not in tss[1]:
        advice = f"usermod -a -G {_TSS_GROUP} {user.name}, then restart the daemon (unless another group has it here)"
        return warning("no_group", f"{who}, and is not in the group {_TSS_GROUP}, which has the TPM on Debian", advice)
    return ok(f"{who}; this is run by {me.name}")


def _look_at_unit(context: Context) -> tuple[Unit, Daemon] | Finding:
    return (context.unit, context.daemon) if context.unit else unknown("systemd does not answer")


def _judge_unit(unit: Unit, daemon: Daemon) -> Finding:
    log, active = f"journalctl -u {UNIT} -n 50 says why", unit["ActiveState"]
    if not unit.installed:
        advice = "install the package's unit, or have your own supervisor start the daemon"
        return warning("not_installed", f"{UNIT} is missing: the daemon does not start after a power cut", advice)
    if unit["LoadState"] != "loaded":
        return failure("not_loaded", f"{UNIT} cannot be loaded ({unit['LoadState']})", f"systemctl status {UNIT}")
    if active == "failed" or unit["SubState"] == "auto-restart":
        return failure("failed", f"{UNIT} has failed, or fails at each start ({unit['Result']})", log)
    if active != "active":
        other = ", and another daemon runs" if daemon.running else ""
        return warning("inactive", f"{UNIT} is {active or 'unknown'}{other}", f"systemctl start {UNIT}")
    if unit["UnitFileState"] not in _ENABLED:
        told = f"{UNIT} will not start after a power cut ({unit['UnitFileState']})"
        return warning("disabled", told, f"systemctl enable {UNIT}")
    if unit["NRestarts"] not in {"", "0"}:
        return warning("restarted", f"{UNIT} is active, after {unit['NRestarts']} restarts", log)
    return ok(f"{UNIT} is active and enabled")


def _look_at_sandbox(context: Context) -> tuple[Unit, str, str, tuple[str, ...]] | Finding:
    unit = context.unit
    path = next((store.uri.removeprefix("tpm2:device:") for store in context.stores("tpm2")), "")
    if unit is None or not unit.installed:
        return unknown("no unit is visible")
    addresses: tuple[str, ...] = ()
    with suppress(ConfigurationError):  # broker.url tells it
        if unit["IPAddressDeny"] and not isinstance(found := context.once(resolve), str):
            addresses = tuple(dict.fromkeys(str(address[0]).partition("%")[0] for _, address in found))
    return unit, path if path.startswith("/") else "", str(context.settings.state_dir), addresses


def _judge_sandbox(unit: Unit, device: str, state_dir: str, broker: tuple[str, ...]) -> Finding:
    """Judge whether the unit gives the daemon device file (if any), state directory, and addresses of the broker."""
    opened = any(word == device or word.startswith("char-tpm") for word in unit["DeviceAllow"].split())
    writable = unit["ReadWritePaths"].split() + [f"/var/lib/{one}" for one in unit["StateDirectory"].split()]
    writes = any(Path(state_dir).is_relative_to(path.lstrip("-+")) for path in writable)
    hides = unit["ProtectHome"] not in {"", "no"} and any(Path(state_dir).is_relative_to(one) for one in _SHUT)
    add = f"systemctl edit {UNIT}, add under [Service]: "
    if device and unit["PrivateDevices"] == "yes":
        return failure("device", f"{UNIT} hides {device} from the daemon", f"{add}PrivateDevices=no")
    if device and unit["DevicePolicy"] in {"closed", "strict"} and not opened:
        return failure("device", f"{UNIT} does not let the daemon open {device}", f"{add}DeviceAllow={device} rw")
    if not writes and (hides or unit["ProtectSystem"] == "strict"):
        told = f"{UNIT} does not let the daemon write in {state_dir}"
        return failure("state_dir", told, f"{add}ReadWritePaths={state_dir}")
    if unit["PrivateNetwork"] == "yes":
        return failure("network", f"{UNIT} leaves the daemon without a network", f"{add}PrivateNetwork=no")
    if broker and not any(_lets_reach(unit, address) for address in broker):
        told = f"{UNIT} does not let the daemon reach the broker at {broker[0]}"
        return failure("broker", told, f"{add}IPAddressAllow={broker[0]}")
    return ok(f"{UNIT} lets the daemon have TPM, state directory and network")


def _lets_reach(unit: Unit, address: str) -> bool:
    """What is both allowed and denied is allowed [systemd.resource-control(5), IPAddressAllow=]."""
    reached = ipaddress.ip_address(address)

    allowed, denied = (
        any(reached in ipaddress.ip_network(net, strict=False) for net in unit[name].split())
        for name in ("IPAddressAllow", "IPAddressDeny")
    )
    return allowed or not denied


def _look_at_core_dumps(context: Context) -> tuple[str, str, Unit | None]:
    pid = context.daemon.pid
    limits = "" if pid is None else _text(Path(f"/proc/{pid}/limits"))
    return _text(Path("/proc/sys/kernel/core_pattern")).strip(), limits, context.unit


def _judge_core_dumps(pattern: str, limits: str, unit: Unit | None) -> Finding:
    """Judge whether a crash may write the daemon's memory to the disk, by ``/proc/PID/limits`` or its unit."""
    found = re.search(r"^Max core file size\s+(\S+)", limits, re.MULTILINE)
    allowed = found[1] if found else "" if unit is None else unit["LimitCORE"]
    if not allowed:
        return unknown("the daemon does not run, and has no unit")
    # By a pipe the kernel passes on a dump of any length but 1 [core(5)].
    if allowed == "0":
        piped = "; what the kernel pipes to a program is that program's to keep" if pattern.startswith("|") else ""
        return ok(f"the daemon leaves no core file{piped}")
    told = f"a crash writes the daemon's memory, passwords included, to the disk ({pattern}, limit {allowed})"
    return warning("core_dumps", told, "LimitCORE=0 in the unit")


def _judge_memory(text: str) -> Finding:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    if found is None:
        return unknown("the kernel does not say")
    free = int(found[1]) // 1024
    told = f"{free} MiB of memory are available"
    return warning("low", told, "free some: the kernel ends processes") if free < _LITTLE_MEMORY else ok(told)


def _look_at_openssl(context: Context) -> tuple[str, str, str | None, str, bool] | Finding:
    """Ask for the version, and load the provider in a process of its own. The TPM is not asked for that."""
    if not context.stores("tpm2"):
        return ok("no key store is a TPM")
    _, said = ask(["openssl", "version", "-v", "-m"], seconds=_PATIENCE)
    version = said.splitlines()[0].split()[1] if said.startswith("OpenSSL ") else ""
    found = re.search(r'MODULESDIR: "([^"]*)"', said)
    modules = os.environ.get("OPENSSL_MODULES") or (found[1] if found else "")
    path, complaint, provider = Path(modules, _PROVIDER), None, None
    if modules and path.is_file():
        program = "import ctypes, os, sys; ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW).OSSL_provider_init"
        status, said = ask([sys.executable, "-I", "-c", program, str(path)], seconds=_PATIENCE)
        complaint = "" if status == 0 else [*said.strip().splitlines(), "no reason given"][-1]
        with suppress(OSError):
            provider = _PROVIDER_VERSION.search(path.read_bytes())
    serves = any(Path(context.settings.state_dir, DIRECTORY_NAME).glob("v2g*.pem"))
    return version, modules, complaint, provider[1].decode() if provider else "", serves


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _judge_openssl(version: str, modules: str, complaint: str | None, provider: str, serves: bool) -> Finding:
    """Judge whether a TLS service can use the active keys. The daemon itself does not need it.

    Args:
        version: of the command; empty if there is none.
        modules: where its providers are; empty if that is not known.
        complaint: why the tpm2 provider cannot be loaded, empty if it can; None if it is not there.
        provider: its version; empty if that is not known.
        serves: whether there is an active key for a TLS server.
    """
    what, only = f"OpenSSL {version}", "; only services that use an active key need it, not the daemon"
    if not version:
        return warning("missing", "the command openssl is missing", f"apt-get install openssl{only}")
    if _numbers(version) < (3,):
        return warning("old", f"{what} has no providers", f"install 3.0 or newer{only}")
    if complaint is None:
        told = f"{what} has no tpm2 provider ({modules or 'directory not known'})"
        return warning("no_provider", told, f"apt-get install tpm2-openssl{only}")
    if complaint:
        told = f"the tpm2 provider cannot be loaded: {complaint}"
        return warning("provider_broken", told, f"reinstall tpm2-openssl{only}")
    if serves and provider and _numbers(provider) < _CONCURRENT:
        told = f"tpm2-openssl {provider} fails in a TLS server with several threads or workers"
        return warning("provider_old", told, f"give it one thread and one worker, or install 1.3.0{only}")
    return ok(f"{what} has the {f'tpm2 provider {provider}'.rstrip()}, and it can be loaded")


_STORES: Final = ("keystore", "keystores", "keystore_for")
CHECKS: Final = (
    Check("clock.time", _look_at_time, _judge_time),
    Check("clock.synchronised", _look_at_synchronisation, _judge_synchronised),
    Check("clock.battery", _look_at_battery, _judge_battery),
    Check("machine.user", _look_at_user, _judge_user),
    Check("machine.unit", _look_at_unit, _judge_unit),
    Check("machine.sandbox", _look_at_sandbox, _judge_sandbox, reads=(*_STORES, "broker", "state_dir")),
    Check("machine.core_dumps", _look_at_core_dumps, _judge_core_dumps),
    Check("machine.memory", lambda _: (_text(Path("/proc/meminfo")),), _judge_memory),
    Check("software.openssl", _look_at_openssl, _judge_openssl, reads=_STORES),
)
